"""Many small trainings side by side: a process a core with one thread each, which suits tiny networks best."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from .errors import UserError
from .memory import keep_freed_memory
from .terminal import INTERRUPTED, progress

Item = TypeVar("Item")
Result = TypeVar("Result")


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_threads(threads: int | None) -> None:
    """Refuse more threads than can be meant: a process that cannot start them ends without a word."""
    most = max(64, 4 * available_cores())  # 64 in any case, so that runs of larger machines are resumed
    if threads is not None and threads > most:
        raise UserError(f"threads: expected at most {most} on this machine, got {threads}")


def set_threads(threads: int | None) -> int:
    """From now on torch takes so many threads, by default as many as before: their number."""
    check_threads(threads)
    threads = threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    return threads


POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Work:
    """What a progress bar shows of jobs that take long: `done` of `total` units, asked every second."""

    done: Callable[[], int]
    total: int
    unit: str


def run_all(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    description: str,
    workers: int | None = None,
    work: Work | None = None,
    on_result: Callable[[Item, Result], None] = lambda item, result: None,
) -> list[Result]:
    """`function(item)` for every item, in the order of the items.

    Args:
        function: importable by name; its results travel between processes, so let them be plain Python and NumPy.
        items: what to work on, the longest jobs first.
        description: beside the progress bar.
        workers: processes; by default as many as cores, and none at all for a single worker.
        work: what the bar shows; by default the number of finished items.
        on_result: called as each item is finished.
    """
    workers = min(workers or available_cores(), len(items))
    finished: list[Item] = []
    work = work or Work(lambda: len(finished), len(items), "runs")
    with progress(description, total=work.total, unit=work.unit) as advance:
        shown = 0

        def show() -> None:
            nonlocal shown
            for _ in range(work.done() - shown):
                advance()
                shown += 1

        def finish(item: Item, result: Result) -> None:
            finished.append(item)
            on_result(item, result)
            show()

        if workers <= 1:
            results = []
            for item in items:
                results.append(function(item))
                finish(item, results[-1])
            return results
        with _Pool(workers) as pool:
            waiting = list(enumerate(items))[::-1]
            running: dict[Future[Result], int] = {}
            in_order: dict[int, Result] = {}
            while waiting or running:
                # As many as there are workers: what an executor has in its queue it may start after an interrupt.
                while waiting and len(running) < workers:
                    number, item = waiting.pop()
                    running[pool.submit(function, item)] = number
                ended, _ = wait(running, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
                for future in ended:
                    number = running.pop(future)
                    try:
                        in_order[number] = future.result()
                    except BrokenProcessPool:
                        raise UserError(
                            f"{description}: a worker was killed from outside (is memory short?); what is done is kept"
                        ) from None
                    finish(items[number], in_order[number])
                show()
            return [in_order[number] for number in range(len(items))]


class _Pool:
    """Workers that end with the block: if it fails or is interrupted, once they have saved what they have.

    SIGTERM, which schedulers send, is an interrupt here: alone, it would leave the workers behind. Workers never see
    SIGINT, which a terminal sends to them as well: it is for the parent to decide what it means. An interrupt while
    they save kills them.
    """

    def __init__(self, workers: int) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy torch's threads in mid-air
        self.executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare_worker)
        self.others = multiprocessing.active_children()
        self.signals = ExitStack()

    def submit(self, function: Callable[[Item], Result], item: Item) -> Future[Result]:
        with _held_back(signal.SIGINT):  # and for good in a worker that this starts
            return self.executor.submit(_in_worker, function, item)

    def __enter__(self) -> "_Pool":
        self.signals.enter_context(_on_signal(signal.SIGTERM, signal.default_int_handler))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        started = [child for child in multiprocessing.active_children() if child not in self.others]
        with self.signals:
            try:
                if kind is not None:
                    for worker in started:
                        worker.terminate()  # SIGTERM: a training saves what it has, everything else ends at once
                self.executor.shutdown(cancel_futures=True)
            except KeyboardInterrupt:
                for worker in started:
                    worker.kill()
                raise


def _prepare_worker() -> None:
    keep_freed_memory()
    torch.set_num_threads(1)


def _in_worker(function: Callable[[Item], Result], item: Item) -> Result:
    try:
        return function(item)
    except KeyboardInterrupt:
        # Not back to the queue: another worker that SIGTERM ended there may have left its lock shut.
        os._exit(INTERRUPTED)


@contextmanager
def _held_back(number: signal.Signals) -> Iterator[None]:
    """A signal that comes to this thread within the block acts after it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _on_signal(number: signal.Signals, handler: Callable[..., object] | signal.Handlers) -> Iterator[None]:
    """Within this block the signal has this handler; only the main thread may set one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)
