"""Frozen features as they are: what the usual heads make of novel classes when nothing else is trained."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import Judging, TrainConfig
from ..datasets import ImageSet, Task
from ..episodes import (
    Episodes,
    centroid_accuracy,
    episodes_of,
    head_accuracy,
    logistic_accuracy,
    neighbours_accuracy,
    simple_shot_accuracy,
)
from ..evaluation import check_shots
from ..process import set_threads
from ..reports import Table
from ..runs import plain, read_json, write_json
from ..terminal import UserError
from ..trials import Job, task_of
from . import Grouped, Results, Study

SOURCE = "Wang et al. 2019"
Solve = Callable[[Tensor, Episodes, Tensor, torch.Generator], Tensor]
HEADS: dict[str, Solve] = {
    "nearest centroid": lambda x, episodes, mean, generator: centroid_accuracy(x, episodes),
    "SimpleShot": lambda x, episodes, mean, generator: simple_shot_accuracy(x, episodes, mean),
    "logistic regression": lambda x, episodes, mean, generator: logistic_accuracy(x, episodes),
    "k-NN": lambda x, episodes, mean, generator: neighbours_accuracy(x, episodes),
    "cosine head": lambda x, episodes, mean, generator: head_accuracy(x, episodes, generator),
}
SLOW = ("cosine head",)  # with all classes at once


@dataclass(frozen=True)
class FrozenHeads(Job):
    """All heads on the same episodes of one choice of novel classes."""

    config: TrainConfig
    judging: Judging

    @property
    def name(self) -> str:
        return f"heads-seed{self.config.seed}"

    def finished(self, folder: Path) -> bool:
        stored = read_json(folder / "heads.json")
        return (stored.get("config"), stored.get("judging")) == (plain(self.config), plain(self.judging))

    def check(self, folder: Path, task: Task) -> None:
        if task.novel is None:
            raise UserError(f"dataset: {self.config.dataset} has no novel classes")
        check_shots(task.novel, self.judging, self.config.dataset)

    def carry_out(self, folder: Path) -> None:
        set_threads(self.config.threads)
        task = task_of(self.config)
        assert task.novel is not None
        write_json(
            folder / "heads.json",
            {
                "config": plain(self.config),
                "judging": plain(self.judging),
                "accuracy": heads_accuracy(task.training, task.novel, self.judging),
            },
        )

    def accuracy(self, study_folder: Path) -> dict[str, dict[str, float]]:
        """Of each head, by the kind of episode."""
        stored: dict[str, Any] = read_json(study_folder / self.name / "heads.json")
        return stored["accuracy"]


def heads_accuracy(base: ImageSet, novel: ImageSet, judging: Judging) -> dict[str, dict[str, float]]:
    """Accuracy of each head by the kind of episode: 5-way with each number of shots, and 1-shot of all classes."""
    embeddings, mean = novel.pixels().flatten(1), base.pixels().flatten(1).mean(0)
    classes = len(novel.class_names)
    kinds = {f"{min(5, classes)}-way {shots}-shot": (min(5, classes), shots) for shots in judging.shots}
    kinds |= {f"all {classes} ways, 1-shot": (classes, 1)} if judging.all_ways else {}
    found: dict[str, dict[str, float]] = {head: {} for head in HEADS}
    generator = torch.Generator().manual_seed(judging.judging_seed)
    for kind, (ways, shots) in kinds.items():
        episodes = episodes_of(novel.labels, ways, shots, judging, generator)
        for head, solve in HEADS.items():
            if ways <= 5 or head not in SLOW:
                found[head][kind] = float(solve(embeddings, episodes, mean, generator).mean())
    return found


def heads_study(
    config: TrainConfig,
    classes: Sequence[tuple[int, ...] | None],
    judging: Judging,
    name: str = "heads",
) -> Study:
    """The heads on the novel classes that each choice of base `classes` leaves, a choice a seed."""
    jobs = [FrozenHeads(config.but(classes=chosen, seed=seed), judging) for seed, chosen in enumerate(classes)]

    def tables(results: Results) -> list[Table]:
        stored = [job.accuracy(results.folder) for job in jobs]
        kinds = list(next(iter(stored[0].values())))
        by_choice = Grouped((head, seed, one[head]) for seed, one in enumerate(stored) for head in HEADS)
        rows = [[head, *by_choice.texts(head, kinds)] for head in HEADS]
        title = f"Accuracy on novel classes, percent; mean of {len(jobs)} choices of classes ± 95% (Student's t)"
        return [Table(title, ["", *kinds], rows)]

    return Study(
        name,
        f"Heads on the features of {config.data} as they are",
        f"Nothing is trained but a head in each of {judging.episodes} episodes. SimpleShot: features minus the mean of "
        "the base classes, of unit length, and the nearest centroid (Wang et al. 2019); logistic regression "
        "(scikit-learn, C = 1) and the k nearest neighbours, as many as shots, on features of unit length; the cosine "
        "head of Liu et al.",
        [],
        {},
        more_jobs=jobs,
        more_tables=tables,
    )
