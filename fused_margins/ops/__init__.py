"""Reductions of a labelled similarity matrix, a folder each, and what is built of them in one call each way.

    contrast    one chosen entry of a row, and log-sum-exp over the others; with an epilogue the loss of them
    nearest     the largest entries of a row, or the smallest
    scores      the matrix itself
    sample      one column of a row at random, by a weight of its distance
    magnet      the magnet loss of a batch
    kmeans      k-means of every class apart

Each folder reads top to bottom: ``__init__.py`` the formula and the edge rules, ``op.py`` what a call is,
``reference.py`` the definition, ``kernel_*.py`` the backends, ``cases.py`` inputs and tolerances. What torch needs of
an op is made of its list of arguments in `fused_margins.ops.op`, once for all of them.
"""

import importlib as _importlib
import pkgutil as _pkgutil

from ..backends import registry as _registry

for _folder in _pkgutil.iter_modules(__path__):
    if _folder.ispkg:
        _importlib.import_module(f"{__name__}.{_folder.name}")
_registry.load_kernels()
