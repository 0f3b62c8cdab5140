"""Three reductions of a labelled similarity matrix, one folder each: `contrast`, `nearest` and `scores`; beside them
`draw`, which is `nearest` with random numbers, and two losses of one call each way, `margin_softmax` and `magnet`.

Each folder reads top to bottom: ``__init__.py`` the formula and the edge rules, ``op.py`` schema and autograd,
``reference.py`` the definition, ``kernel_*.py`` the backends, ``cases.py`` inputs and tolerances. Ops never import each
other; what they share is here: the similarity matrix, argument checks, the registry of backends.
"""
