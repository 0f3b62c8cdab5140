"""Studies run together: every unfinished job on a core of its own, then one report of all that is stored.

A process a core with one thread each suits tiny networks best.
"""

import gc
import importlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TypeVar

import torch

from ..doctor import versions
from .datasets import Task
from .process import available_cores, handling, keep_freed_memory
from .reports import Report
from .runs import write_json
from .studies import Study
from .terminal import INTERRUPTED, UserError, progress, say
from .trials import Job, task_of

Item = TypeVar("Item")
Result = TypeVar("Result")

POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Work:
    """What a progress bar shows of jobs that take long: `done` of `total` units, asked every second."""

    done: Callable[[], int]
    total: int
    unit: str


def import_nothing() -> None:
    """Beyond what a worker imports anyway: this module."""


def import_optimizers() -> None:
    """What the first optimizer imports, for seconds."""
    importlib.import_module("torch._dynamo")


def run_all(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    description: str,
    workers: int | None = None,
    work: Work | None = None,
    on_result: Callable[[Item, Result], None] = lambda item, result: None,
    meanwhile: Callable[[], None] = lambda: None,
    at_start: Callable[[], None] = import_nothing,
) -> None:
    """`function(item)` for every item.

    Args:
        function: importable by name; its results travel between processes, so let them be plain Python and NumPy.
        items: what to work on, the longest jobs first.
        description: beside the progress bar.
        workers: processes; by default as many as cores, and none at all for a single worker.
        work: what the bar shows; by default the number of finished items.
        on_result: called as each item is finished.
        meanwhile: called before the first item, while the workers start; what it raises ends them.
        at_start: what each worker does first, importable by name as well.
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
            meanwhile()
            for item in items:
                finish(item, function(item))
            return
        with _Pool(workers) as pool:
            starting = [pool.submit(_call, at_start) for _ in range(workers)]  # a worker each
            meanwhile()
            waiting = list(items)[::-1]
            running: dict[Future[Result], Item] = {}
            try:
                pool.check()
                for started in starting:
                    started.result()
                while waiting or running:
                    pool.check()
                    # As many as there are workers: what an executor has in its queue it may start after an interrupt.
                    while waiting and len(running) < workers:
                        item = waiting.pop()
                        running[pool.submit(function, item)] = item
                    for future in wait(running, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED).done:
                        finish(running.pop(future), future.result())
                    show()
            except BrokenProcessPool:
                raise UserError(
                    f"{description}: a worker was killed from outside (is memory short?); what is done is kept"
                ) from None


class _Pool:
    """Workers that end with the block: if it fails or is interrupted, once they have saved what they have.

    SIGTERM, which schedulers send, is an interrupt here: alone, it would leave the workers behind. Workers never see
    SIGINT, which a terminal sends to them as well: it is for the parent to decide what it means. An interrupt while
    they save kills them. One that is lost in the block, since much that is imported catches all exceptions, is raised
    again by `check`.
    """

    def __init__(self, workers: int) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy torch's threads in mid-air
        self.executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare_worker)
        self.others = multiprocessing.active_children()
        self.signals = ExitStack()
        self.interrupted = False

    def submit(self, function: Callable[[Item], Result], item: Item) -> Future[Result]:
        # Interrupts act after it: a worker that is half started would say so at length. One that this starts sees no
        # SIGINT for good.
        with _held_back(signal.SIGINT), handling([signal.SIGTERM], self._note):
            future = self.executor.submit(_in_worker, function, item)
        self.check()
        return future

    def check(self) -> None:
        if self.interrupted:
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.interrupted = True

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.interrupted = True
        raise KeyboardInterrupt

    def __enter__(self) -> "_Pool":
        # Who ignores a signal (nohup, say) goes on ignoring it.
        heeded = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
        self.signals.enter_context(handling(heeded, self._interrupt))
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


def _call(function: Callable[[], None]) -> None:
    function()


def _prepare_worker() -> None:
    keep_freed_memory()
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Of a parent that was killed nobody else tells the workers, which would train on unseen, their folders locked."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)  # as the parent would have: save, and end


def _in_worker(function: Callable[[Item], Result], item: Item) -> Result:
    gc.collect()
    gc.freeze()  # what was imported is not looked at again: each training begins with a collection
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


@dataclass(frozen=True)
class _Placed:
    """A job and its folder."""

    job: Job
    folder: Path

    def check(self, task: Task) -> None:
        with self._named():
            self.job.check(self.folder, task)

    def carry_out(self) -> None:
        with self._named():
            self.job.carry_out(self.folder)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """An error within the block says which job it is of."""
        try:
            yield
        except UserError as error:
            raise UserError(f"{self.folder}: {error}") from None


def placed_jobs(studies: Sequence[Study], folder: Path) -> list[_Placed]:
    """Every job of the studies with its folder below `folder`."""
    names = [study.name for study in studies]
    if len(set(names)) < len(names):
        raise UserError(f"studies: expected different names, got {', '.join(names)}")
    return [_Placed(job, folder / study.name / job.name) for study in studies for job in study.jobs]


def waiting_jobs(studies: Sequence[Study], folder: Path) -> list[_Placed]:
    """Those that are not done yet."""
    return [placed for placed in placed_jobs(studies, folder) if not placed.job.finished(placed.folder)]


def check_all(jobs: Sequence[_Placed]) -> None:
    """Raise what a job would raise as it begins: a mistake in the last one shows before the first is begun."""
    data = task = None
    for placed in jobs:
        config = placed.job.config
        wanted = (config.dataset, config.image_size, config.classes, config.held_out)
        if task is None or wanted != data:  # neighbours mostly have the same data
            data, task = wanted, task_of(config)
        placed.check(task)


def run_suite(studies: Sequence[Study], folder: Path, title: str, workers: int | None = None) -> None:
    """Do what is not done yet, and write the report. Interrupted and called again, it goes on where it stopped.

    Results of finished jobs are read from their folders, so that a second call reports without training again.
    """
    waiting = waiting_jobs(studies, folder)
    work = Work(
        lambda: sum(placed.job.progress(placed.folder) for placed in waiting),
        sum(placed.job.work for placed in waiting),
        "epochs",
    )
    if not waiting:
        say(f"nothing to train: all of it is in {folder}")
    else:
        run_all(
            _Placed.carry_out,
            waiting,
            title,
            workers,
            work,
            on_result=lambda placed, _: say(f"done: {placed.folder}"),
            meanwhile=lambda: check_all(waiting),
            at_start=import_optimizers if any(study.trials for study in studies) else import_nothing,
        )
    report_suite(studies, folder, title)


def report_suite(studies: Sequence[Study], folder: Path, title: str) -> None:
    """Write studies.json, report.md and report.html of finished studies."""
    results = [(study, study.results(folder)) for study in studies]
    write_json(
        folder / "studies.json",
        {
            "title": title,
            "versions": versions(),
            "seconds": sum(stored["seconds"] for _, r in results for stored in r.stored.values()),
            "studies": [
                {
                    "name": study.name,
                    "title": study.title,
                    "lead": study.lead,
                    "tables": [asdict(table) for table in study.tables(r)],
                    "trials": [{"group": trial.group, **stored} for trial, stored in r.stored.items()],
                }
                for study, r in results
            ],
        },
    )
    lead = "Every figure is from the runs beside this page; the same command writes it again without training."
    Report(title, lead, [study.section(r) for study, r in results]).write(folder)
