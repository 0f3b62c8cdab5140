"""How fast, and in how much memory, against whom: one harness for every op, backend, shape, dtype and peer.

A *workload* (``workloads/``) is something to compute, such as the margin softmax loss with its gradients. Its
*contestants* are every backend of fused-margins and the other ways to compute it; one of them, "eager", is the usual
PyTorch code, the yardstick. A *row* is a workload at one size in one dtype. For every row (``rows.py``):

1. Correctness first. A contestant that does not compute the row's function gets no figure, and its test fails.
2. Turns (``timing.py``). All contestants run in one process, one after another, round after round (A B C A B C ...),
   so that whatever disturbs the machine disturbs them alike. The figure is the median, the ratio that of two medians.
3. Memory (``memory.py``). What one call adds at its peak, each contestant in a process of its own; on a GPU by its
   allocator's account.

Forward and backward are timed together wherever there is a gradient. Rows that we lose are shown as all others.

``make bench`` runs everything, ``make bench BENCH_ARGS="-k few_shot"`` a part; results go to ``benchmarks/results``
and replace those of the same rows. ``python -m benchmarks.tables`` writes them into the README.

``--device cuda`` (``make gpu-bench``) measures on a GPU, at the sizes that a workload has for it.

An op or backend that the registry knows is measured without a change here; a loss is a file in ``workloads/``.
"""
