"""Many small trainings side by side: a process a core with one thread each, which suits tiny networks best."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

import torch

from .terminal import progress

Item = TypeVar("Item")
Result = TypeVar("Result")


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_all(
    function: Callable[[Item], Result], items: Sequence[Item], description: str, workers: int | None = None
) -> list[Result]:
    """`function(item)` for every item, in the order of the items.

    Args:
        function: importable by name; its results travel between processes, so let them be plain Python and NumPy.
        items: what to work on, the longest jobs first.
        description: beside the progress bar.
        workers: processes; by default as many as cores, and none at all for a single worker.
    """
    workers = min(workers or available_cores(), len(items))
    with progress(description, total=len(items), unit="runs") as advance:
        if workers <= 1:
            results = []
            for item in items:
                results.append(function(item))
                advance()
            return results
        context = multiprocessing.get_context("spawn")  # a fork would copy torch's threads in mid-air
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare_worker) as pool:
            futures = [pool.submit(function, item) for item in items]
            try:
                for future in as_completed(futures):
                    future.result()
                    advance()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            return [future.result() for future in futures]


def _prepare_worker() -> None:
    torch.set_num_threads(1)
    # Ctrl-C reaches every process of the terminal; the parent alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
