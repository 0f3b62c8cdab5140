"""Studies run together: every unfinished job on a core of its own, then one report of all that is stored."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from ..doctor import versions
from .datasets import Task
from .errors import UserError
from .jobs import Work, run_all
from .reports import Report
from .runs import write_json
from .study import Study
from .terminal import say
from .trials import Job, task_of


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
    """Those that are not done yet, each of them checked: a mistake in the last one shows before the first is begun."""
    waiting = [placed for placed in placed_jobs(studies, folder) if not placed.job.finished(placed.folder)]
    data = task = None
    for placed in waiting:
        config = placed.job.config
        wanted = (config.dataset, config.image_size, config.classes, config.held_out)
        if task is None or wanted != data:  # neighbours mostly have the same data
            data, task = wanted, task_of(config)
        placed.check(task)
    return waiting


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
        run_all(_Placed.carry_out, waiting, title, workers, work, lambda placed, _: say(f"done: {placed.folder}"))
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
