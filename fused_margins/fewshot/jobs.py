"""Many small trainings side by side: a process a core with one thread each, which suits tiny networks best."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
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
        others = multiprocessing.active_children()
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare_worker) as pool:
            with _interrupts_ignored():
                futures = [pool.submit(function, item) for item in items]
            started = [child for child in multiprocessing.active_children() if child not in others]
            try:
                for future in as_completed(futures):
                    future.result()
                    advance()
            except BaseException:
                for worker in started:
                    worker.terminate()  # rather than wait for jobs that nobody wants any more
                raise
            return [future.result() for future in futures]


def _prepare_worker() -> None:
    torch.set_num_threads(1)


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Processes started in this block ignore Ctrl-C, which reaches them all: the parent decides what it means."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
