"""Backends compared at the scale of a training run: step by step at equal weights, and by the figures at the end.

What differs at each step, and what that difference grows into.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...doctor import relative_difference
from ..config import TOLERANCE, InfoNCE, Judging, Loss, Magnet, MarginLoss, MarginSoftmax, TrainConfig, Triplet
from ..datasets import ImageSet, Task
from ..plots import parity_curves
from ..reports import Picture, Table, figure_text
from ..runs import plain, read_json, write_json
from ..terminal import UserError
from ..trainer import Trainer
from ..trials import Job, Trial, task_of
from . import Results, Study

# What the end of a training is compared by: the first that the data allow.
END_FIGURES = (*(f"novel_{ways}way_1shot" for ways in (5, 4, 3, 2)), "recall@1", "novel_recall@1")
PERTURBATION = 2.0**-23  # one step of float32
LOSSES: dict[str, Loss] = {
    "margin softmax, m = -0.1": MarginSoftmax(scale=10.0, margin=-0.1),
    "triplet, easy positives": Triplet(),
    "margin, easy positives": MarginLoss(),
    "InfoNCE, easy positives": InfoNCE(),
    "magnet": Magnet(warm_epochs=0),  # from the first step on
}


@dataclass(frozen=True)
class StepDifference:
    """One step. The differences are relative; see `relative_difference`."""

    step: int
    loss: float  # of the first backend
    loss_difference: float  # same weights, same batch
    gradient_difference: float  # same weights, same batch; largest over the parameters
    worst_parameter: str
    own_loss: float  # of the second backend's own model
    drift: float  # between the losses of the two models, each trained on its own backend from the first step

    @property
    def largest(self) -> float:
        return max(self.loss_difference, self.gradient_difference)


class Parity:
    """Models with the same seed, trained side by side on two backends.

    Two questions are kept apart. *Does the kernel compute the same?* At each step the second backend is also given the
    very weights, batch and random state of the first; loss and gradients must then agree. *What becomes of the
    rounding?* The second model trains on its own from the first step; its distance (`drift`) grows as that of any two
    runs whose arithmetic differs in the last bit, and is reported without a limit.

    Args:
        config: the run; its `backend` is not used.
        images: the training set.
        backends: names of the first and the second backend.
    """

    def __init__(self, config: TrainConfig, images: ImageSet, backends: Sequence[str] = ("reference", "cpu")) -> None:
        if len(backends) != 2:
            raise UserError(f"backends: expected two names, got {list(backends)}")
        configs = [config.but(backend=backend) for backend in backends]
        self.first, self.second = (Trainer(c, images) for c in configs)
        self._probe = Trainer(configs[1], images)

    def steps(self, num_steps: int | None = None) -> Iterator[StepDifference]:
        """Train for `num_steps`, or to the end."""
        total = self.first.total_steps
        for step in range(total if num_steps is None else min(num_steps, total)):
            images, batch = self.first.next_batch()
            self._probe.mirror(self.first)
            loss = self.first.loss_and_gradients(images, batch)
            same = self._probe.loss_and_gradients(images, batch)
            own = self.second.loss_and_gradients(*self.second.next_batch())
            worst, gradient_difference = self._compare_gradients()
            yield StepDifference(
                step,
                float(loss),
                relative_difference(loss, same),
                gradient_difference,
                worst,
                float(own),
                relative_difference(loss, own),
            )
            if loss.isfinite() and not own.isfinite():
                return  # the drift says it: there is nothing to go on with
            self.first.update(loss)
            self.second.update(own)

    def _compare_gradients(self) -> tuple[str, float]:
        """The parameter whose gradients differ most, and by how much."""
        differences = {
            name: relative_difference(a, b)
            for (name, a), (_, b) in zip(_gradients(self.first), _gradients(self._probe))
        }
        worst = max(differences, key=lambda name: differences[name])
        return worst, differences[worst]


def _gradients(trainer: Trainer) -> Iterator[tuple[str, Tensor]]:
    for owner in (trainer.model, trainer.objective):
        for name, parameter in owner.named_parameters():
            yield name, torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


@dataclass(frozen=True)
class StepParity(Job):
    """The first steps of a training on two backends: the job that a parity study has beside its trainings."""

    loss_name: str
    config: TrainConfig
    backends: tuple[str, str]
    num_steps: int

    @property
    def name(self) -> str:
        return f"{Trial(self.loss_name, self.config).name}-steps-{'-'.join(self.backends)}"

    @property
    def title(self) -> str:
        return f"{self.loss_name}: {self.backends[1]}"

    def finished(self, folder: Path) -> bool:
        stored = read_json(folder / "steps.json")
        return bool(stored) and (stored["config"], stored["steps"]) == (plain(self.config), self.num_steps)

    def check(self, folder: Path, task: Task) -> None:
        for backend in self.backends:
            Trainer(self.config.but(backend=backend), task.training)

    def carry_out(self, folder: Path) -> None:
        parity = Parity(self.config, task_of(self.config).training, self.backends)
        differences = [dataclasses.asdict(difference) for difference in parity.steps(self.num_steps)]
        stored = {"config": plain(self.config), "steps": self.num_steps, "differences": differences}
        write_json(folder / "steps.json", stored)

    def differences(self, study_folder: Path) -> list[StepDifference]:
        """What was found, step by step."""
        stored = read_json(study_folder / self.name / "steps.json")
        return [_from_json(step) for step in stored["differences"]]


def _from_json(step: dict[str, Any]) -> StepDifference:
    """JSON knows no infinity: a difference that was not finite is stored as null."""
    values: dict[str, Any] = {name: math.inf if value is None else value for name, value in step.items()}
    return StepDifference(**values)


def parity_study(
    config: TrainConfig,
    losses: Mapping[str, Loss],
    backends: Sequence[str],
    judging: Judging,
    num_steps: int = 200,
    tolerance: float = TOLERANCE,
    name: str = "parity",
    to_the_end: bool = True,
) -> Study:
    """Each loss on each backend from the same seed, and on the first one from weights changed in the last bit.

    The first of the `backends` is what the others are compared with, for `num_steps` at equal weights, whose largest
    relative difference is held to `tolerance`; that is all unless every backend trains `to_the_end` as well.
    """
    first, *others = backends
    trials, steps = [], []
    for loss_name, loss in losses.items():
        settings = config.but(loss=loss)
        for backend in backends:
            trials.append(Trial(f"{loss_name}, {backend}", settings.but(backend=backend), judging))
        control = settings.but(backend=first, perturbation=PERTURBATION)
        trials.append(Trial(f"{loss_name}, {first}, one bit changed", control, judging))
        steps += [StepParity(loss_name, settings, (first, other), num_steps) for other in others]
    beside = (
        " Beside that every backend trains to the end on its own, where rounding drives runs apart; the run whose "
        "first weights differ in the last bit shows how far."
    )
    if not to_the_end:
        trials, beside = [], ""

    def tables(results: Results) -> list[Table]:
        return [_steps_table(steps, results.folder, tolerance), *([_end_table(results)] if trials else [])]

    def pictures(results: Results) -> list[Picture]:
        return [_curves(job, results.folder, tolerance) for job in steps]

    return Study(
        name,
        f"Parity of {' and '.join(backends)} on {config.data}, {config.backbone.title}",
        f"For the first {num_steps} steps the second backend also gets the weights and the batch of the first."
        + beside,
        trials,
        {},
        more_jobs=steps,
        more_tables=tables,
        pictures=pictures,
    )


def worst_difference(study: Study, study_folder: Path) -> StepDifference:
    """The step at which loss or gradients differ most at equal weights, of all losses and backends."""
    steps = [d for job in study.more_jobs if isinstance(job, StepParity) for d in job.differences(study_folder)]
    return max(steps, key=lambda d: d.largest)


def _steps_table(steps: Sequence[StepParity], folder: Path, tolerance: float) -> Table:
    rows = []
    for job in steps:
        found = job.differences(folder)
        within = "yes" if max(d.largest for d in found) <= tolerance else "NO"
        largest = (max(values) for values in zip(*((d.loss_difference, d.gradient_difference, d.drift) for d in found)))
        rows.append([job.title, str(len(found)), *(f"{value:.1e}" for value in largest), within])
    columns = ["loss: backend", "steps", "loss", "gradients", "loss, own weights", f"within {tolerance:g}"]
    return Table(f"Largest relative difference from {steps[0].backends[0]}", columns, rows)


def _curves(job: StepParity, folder: Path, tolerance: float) -> Picture:
    """Losses of both backends, each on its own weights, and their differences at each step."""
    found = job.differences(folder)
    first, second = job.backends
    path = folder / f"{job.name}.png"
    parity_curves(
        path,
        {first: [d.loss for d in found], second: [d.own_loss for d in found]},
        {
            "loss, equal weights": [d.loss_difference for d in found],
            "gradients, equal weights": [d.gradient_difference for d in found],
            "loss, own weights": [d.drift for d in found],
        },
        tolerance,
    )
    return Picture(path, f"{job.title}: losses over each other, and relative differences.")


def _end_table(results: Results) -> Table:
    """Figures, whether their intervals overlap with the first backend's, and what a run took."""
    rows = []
    for group in results.groups:
        (trial, stored), *_ = results.of(group)
        figures = stored["figures"]
        name = next(f for f in END_FIGURES if f in figures)
        value, interval = figures[name], figures.get(f"{name}_interval")
        overlap = "-"
        if trial.config.backend == results.trials[0].config.backend and not trial.config.perturbation:
            first = (value, interval)
        elif interval is not None:
            overlap = "yes" if abs(value - first[0]) <= interval + (first[1] or 0.0) else "NO"
        cost = (f"{stored['seconds']:.1f}", f"{stored['peak_mib']:.0f}")
        rows.append([group, figure_text(name, value, interval), overlap, *cost])
    return Table(f"At the end: {name}", ["loss, backend", name, "intervals overlap", "seconds", "peak MiB"], rows)
