"""The demonstration: every loss trained on real digits, judged, and compared between backends, in about a minute.

Three parts, each a list of jobs: (a) coarse to fine, (b) margins, (c) parity; `demo_report` turns outcomes into tables.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .config import EasyPositiveTriplet, Loss, Magnet, MarginSoftmax, Softmax, TrainConfig, Triplet
from .datasets import Task, load, make_task
from .evaluation import evaluate
from .jobs import run_all
from .parity import Parity, StepDifference
from .plots import plane
from .trainer import Trainer

DATASET = "digits"
COARSE_TO_FINE: dict[str, Loss] = {
    "softmax": Softmax(scale=10.0),
    "triplet, random positives": Triplet(margin=0.2, negatives="semihard"),
    "triplet, easy positives": EasyPositiveTriplet(margin=0.2, negatives="semihard"),
    "magnet": Magnet(alpha=0.3, clusters_per_class=5, num_clusters=6, samples_per_cluster=8, warm_epochs=5),
}
MARGINS = (-0.3, 0.0, 0.3, 0.5)
MARGIN_SCALE = 10.0
NUM_BASE_CLASSES = 5
PARITY_LOSSES: dict[str, Loss] = {
    "margin softmax, m = -0.3": MarginSoftmax(scale=10.0, margin=-0.3),
    "triplet, easy positives": COARSE_TO_FINE["triplet, easy positives"],
    "magnet": COARSE_TO_FINE["magnet"],
}


@dataclass(frozen=True)
class Job:
    """One training and its evaluation; with `backends`, two of them side by side, and a control."""

    part: str
    name: str
    config: TrainConfig
    num_episodes: int
    backends: tuple[str, str] | None = None
    with_map: bool = False


@dataclass
class Outcome:
    """What a job found; plain enough to travel between processes."""

    job: Job
    # For each model; for parity these are the first backend, the second backend, and the control.
    losses: list[list[float]]  # mean of each epoch
    figures: list[dict[str, Any]]
    seconds: float
    points: np.ndarray | None = None  # (N, 2), held-out images
    differences: list[StepDifference] = field(default_factory=list)


def run_job(job: Job) -> Outcome:
    """Train and judge."""
    start = time.perf_counter()
    task = make_task(load(job.config.dataset), job.config.classes)
    differences: list[StepDifference] = []
    if job.backends is not None:
        parity = Parity(job.config, task.training, job.backends)
        differences = list(parity.steps())
        trainers = [parity.first, parity.second, _control(parity.first.config, task)]
    else:
        trainers = [Trainer(job.config, task.training)]
        trainers[0].train()
    losses = [[row["loss"] for row in trainer.history] for trainer in trainers]
    figures = [evaluate(trainer, task, num_episodes=job.num_episodes) for trainer in trainers]
    points = None
    if job.with_map and task.held_out is not None:
        points = plane(trainers[0].embed(task.held_out).cpu())
    return Outcome(job, losses, figures, time.perf_counter() - start, points, differences)


def _control(config: TrainConfig, task: Task) -> Trainer:
    """The first backend's run from weights changed in the last bit: what rounding alone does to a training."""
    trainer = Trainer(config, task.training)
    with torch.no_grad():
        trainer.model.get_parameter("head.weight").mul_(1 + torch.finfo(torch.float32).eps)
    trainer.train()
    return trainer


def base_classes(seed: int, num_classes: int = 10) -> tuple[int, ...]:
    """The digits that a margin run trains on: a different half for each seed, so that no lucky split decides."""
    order = torch.randperm(num_classes, generator=torch.Generator().manual_seed(seed))
    return tuple(sorted(order[:NUM_BASE_CLASSES].tolist()))


def demo_jobs(seeds: Sequence[int], epochs: int, num_episodes: int, backends: tuple[str, str] | None) -> list[Job]:
    """All jobs, the longest first."""
    jobs = []
    if backends is not None:
        for name, loss in PARITY_LOSSES.items():
            config = TrainConfig(dataset=DATASET, labels="coarse", loss=loss, epochs=epochs, seed=seeds[0])
            jobs.append(Job("parity", name, config, num_episodes, backends))
    for seed in seeds:
        for name, loss in COARSE_TO_FINE.items():
            config = TrainConfig(dataset=DATASET, labels="coarse", loss=loss, epochs=epochs, seed=seed)
            jobs.append(Job("coarse_to_fine", name, config, num_episodes, with_map=seed == seeds[0]))
        for margin in MARGINS:
            config = TrainConfig(
                dataset=DATASET,
                classes=base_classes(seed),
                loss=MarginSoftmax(scale=MARGIN_SCALE, margin=margin),
                epochs=epochs,
                seed=seed,
            )
            jobs.append(Job("margins", f"{margin:g}", config, num_episodes))
    return jobs


def run_demo(
    seeds: Sequence[int],
    *,
    epochs: int = 40,
    num_episodes: int = 600,
    backends: tuple[str, str] | None = ("reference", "cpu"),
    workers: int | None = None,
) -> list[Outcome]:
    """The outcomes of all jobs; `backends=None` leaves the parity part out."""
    return run_all(run_job, demo_jobs(seeds, epochs, num_episodes, backends), "training on digits", workers)
