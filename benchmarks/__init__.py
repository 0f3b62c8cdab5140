"""How fast, and in how much memory, against whom: one harness for every op, backend, shape, dtype and peer.

A *workload* (``workloads/``) is something to compute, such as the margin softmax loss with its gradients. Its
*implementations* are every backend of fused-margins and the other ways to compute it; one of them, "eager", is the
usual PyTorch code, the yardstick. A *row* is a workload at one size in one dtype. For every row (``rows.py``):

1. Correctness first. An implementation that does not compute the row's function gets no figure, and the run fails.
2. Turns (``timing.py``). All run in one process, one after another, round after round (A B C A B C ...), so that
   whatever disturbs the machine disturbs them alike. The figure is the median, the ratio that of two medians.
3. Memory (``memory.py``). What one call adds at its peak, each in a process of its own; on a GPU by its allocator.

Forward and backward are timed together wherever there is a gradient. Rows that we lose are shown as all others.

``python -m benchmarks [NAME ...]`` does that and stores the results, one file a machine; ``benchmarks.tables`` writes
them into docs/benchmarks. ``python -m pytest benchmarks -k NAME`` times single rows with pytest-benchmark and
stores nothing. An op or backend that the registry knows is measured without a change here; a loss is a file in
``workloads/``.
"""
