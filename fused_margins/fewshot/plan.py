"""What a training would do and how long it would take, found out before it is begun."""

import copy
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from .datasets import ImageSet, Task
from .process import set_threads
from .reports import Table
from .studies import Study
from .trainer import Trainer
from .trials import task_of


@dataclass(frozen=True)
class Estimate:
    """Times of a training on this machine, without its evaluation."""

    epoch_seconds: float  # mean over the epochs
    total_seconds: float
    data_share: float  # of these, what goes into reading and augmenting images


def estimate(trainer: Trainer, warm_up: int = 3, timed: int = 10) -> Estimate:
    """Measure some steps of a training that has not begun; afterwards the trainer is what it was, to the bit.

    Epochs of different kinds (the magnet loss begins with softmax) are measured apart, each with what its beginning
    costs: embedding and clustering the training set, for instance.

    Args:
        trainer: with no step done.
        warm_up: steps that are not counted, since caches and buffers are still cold.
        timed: steps of which the median counts, fewer in an epoch of fewer.

    Raises:
        ValueError: the trainer has begun, or `warm_up` or `timed` is too small.
    """
    if trainer.steps_done:
        raise ValueError(f"trainer: expected one that has not begun, it has done {trainer.steps_done} steps")
    if warm_up < 0 or timed < 1:
        raise ValueError(f"warm_up, timed: expected at least 0 and 1, got {warm_up} and {timed}")
    total, of_data, refresh = 0.0, 0.0, getattr(trainer.config.loss, "refresh_epochs", 1)
    for num_batches, epochs in groupby(range(trainer.config.epochs), trainer.objective.num_batches):
        first, *others = epochs
        with _unchanged(trainer):
            trainer.epoch = first
            begin, batch, step = _time_epoch(trainer, min(warm_up + timed, num_batches), warm_up)
        total += (1 + len(others)) * (begin / refresh + num_batches * step)
        of_data += (1 + len(others)) * num_batches * batch
    return Estimate(total / trainer.config.epochs, total, of_data / total)


def _time_epoch(trainer: Trainer, num_steps: int, warm_up: int) -> tuple[float, float, float]:
    """Seconds that an epoch takes to begin, and seconds of one of its batches of images and of one of its steps."""
    batches, steps = [], []
    for _ in range(num_steps):
        start = time.perf_counter()
        batch = trainer.next_batch()
        batches.append(time.perf_counter() - start)
        trainer.update(trainer.loss_and_gradients(*batch))  # reads the loss, and so waits for a GPU
        steps.append(time.perf_counter() - start)
    begin = max(0.0, batches[0] - statistics.median(batches))
    steps[0] -= begin
    batches[0] -= begin
    medians = [statistics.median(times[warm_up:] or times[-1:]) for times in (batches, steps)]
    return begin, medians[0], medians[1]


@contextmanager
def _unchanged(trainer: Trainer) -> Iterator[None]:
    """Whatever the block does to the trainer is undone, and torch's own generators draw on as if it had not been."""
    state = copy.deepcopy(trainer.state_dict())
    devices = [trainer.device] if trainer.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            trainer.load_state_dict(state)
            trainer.optimizer.zero_grad()


def plan_table(trainer: Trainer, task: Task, folder: Path, times: Estimate) -> Table:
    """What `trainer` would do on `task` and write to `folder`."""
    config = trainer.config
    batches = sorted({trainer.objective.num_batches(epoch) for epoch in range(config.epochs)})
    parameters, of_loss = (sum(p.numel() for p in m.parameters()) for m in (trainer.model, trainer.objective))
    rows = [
        ["training set", f"{_describe(task.training)}, {config.labels} labels"],
        ["held-out images", _describe(task.held_out)],
        ["novel classes", _describe(task.novel)],
        ["parameters", f"{parameters:,} of the network, {of_loss:,} of the loss ({config.loss.name})"],
        ["batches an epoch", " or ".join(map(str, batches))],
        ["epochs", f"{config.epochs}, {trainer.total_steps:,} steps in all"],
        [
            "time on " + config.device,
            f"about {duration(times.epoch_seconds)} an epoch, {duration(times.total_seconds)}; "
            f"{times.data_share:.1%} of it reads and augments images",
        ],
        ["output folder", f"{folder}" + (" (holds a run already)" if (folder / "config.json").exists() else "")],
    ]
    return Table(f"Plan: {config.loss.name} on {config.dataset}; nothing is written", ["what", "plan"], rows, False)


def suite_table(studies: Sequence[Study], folder: Path, workers: int) -> Table:
    """What a suite would train; trainings alike but for seed and margin are taken to last alike, and timed once."""
    seconds: dict[tuple[Any, ...], float] = {}
    rows, total = [], 0.0
    for study in studies:
        times = []
        for trial in study.trials:
            c = trial.config
            kind = (
                c.dataset,
                c.loss.name,
                getattr(c.loss, "positives", ""),
                c.backbone,
                c.batch_size,
                c.labels,
                c.backend,
            )
            if kind not in seconds:
                set_threads(c.threads)
                seconds[kind] = estimate(Trainer(c, task_of(c).training)).total_seconds / c.epochs
            times.append(0.0 if trial.finished(folder / study.name / trial.name) else seconds[kind] * c.epochs)
        waiting = sum(t > 0 for t in times)
        rows.append(
            [study.name, study.title, f"{len(times)}, {waiting} of them to do", f"about {duration(sum(times))}"]
        )
        total += sum(times)
    rows.append(["in all", f"{workers} at a time, in {folder}", "", f"about {duration(total / workers)}"])
    return Table(
        "Plan; nothing is written. Time is of training alone", ["study", "what", "trainings", "time"], rows, False
    )


def _describe(images: ImageSet | None) -> str:
    if images is None:
        return "none"
    shape = " x ".join(map(str, images.shape))
    if images.are_features:
        return f"features of {len(images):,} images ({images.shape[0]} each) of {len(images.class_names):,} classes"
    return f"{len(images):,} images ({shape}) of {len(images.class_names):,} classes"


def duration(seconds: float) -> str:
    """Two digits that matter, in the unit that suits.

    >>> [duration(s) for s in (0.034, 7.26, 48.2, 750, 12100)]
    ['0.034 s', '7.3 s', '48 s', '12 min', '3 h 22 min']
    """
    if seconds < 99.5:
        return f"{seconds:.2g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
