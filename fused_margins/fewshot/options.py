"""Settings as flat command line options, `--loss magnet --alpha 0.3`."""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from .config import Judging, LossName, Negatives, Positives, TrainConfig, make_loss
from .datasets import is_of_features


@dataclass(frozen=True)
class LossOptions:
    """The loss and what is particular to it; an option that the chosen loss does not have is an error."""

    loss: LossName | None = None
    """Loss to train with (margin-softmax if not given)."""
    margin: float | None = None
    """Margin of margin-softmax (of either sign), triplet or margin."""
    scale: float | None = None
    """Scale of cosine logits."""
    similarity: Literal["cosine", "dot"] | None = None
    """Similarity of margin-softmax."""
    positives: Positives | None = None
    """Positives of triplet, margin or infonce: the nearest of the class (easy), the farthest, one at random, or all."""
    negatives: Literal[Negatives, "all"] | None = None
    """Negatives of triplet, margin or infonce (which alone takes all)."""
    memory: int | None = None
    """Former embeddings that triplet, margin and infonce search as well (cross-batch memory)."""
    beta: float | None = None
    """First boundary of margin."""
    temperature: float | None = None
    """Temperature of infonce."""
    alpha: float | None = None
    """Gap that magnet asks for, in units of twice the variance."""
    variance_floor: float | None = None
    """Smallest variance that magnet divides by."""
    clusters_per_class: int | None = None
    """Clusters of each class, for magnet."""
    num_clusters: int | None = None
    """Clusters in a magnet batch."""
    samples_per_cluster: int | None = None
    """Samples of each cluster in a magnet batch."""
    warm_epochs: int | None = None
    """Epochs of softmax before magnet."""
    refresh_epochs: int | None = None
    """Epochs between two clusterings of magnet's index."""

    def apply(self, config: TrainConfig) -> TrainConfig:
        """`config` with these options over its loss."""
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        name = given.pop("loss", config.loss.name)
        kept = config.loss.model_dump(exclude={"name"}) if name == config.loss.name else {}
        return config.model_copy(update={"loss": make_loss(name, **{**kept, **given})})


LossFlags = tyro.conf.OmitArgPrefixes[LossOptions]
ConfigFlags = tyro.conf.OmitArgPrefixes[TrainConfig]
JudgingFlags = tyro.conf.OmitArgPrefixes[Judging]


def on_features(config: TrainConfig, file: Path | None) -> TrainConfig:
    """`config` for a file of features, where there is one: a linear map takes the place of the default network."""
    if file is not None:
        config = config.model_copy(update={"dataset": f"features:{file}"})
    if is_of_features(config.dataset) and config.backbone.name == "convnet":
        config = config.model_copy(update={"backbone": config.backbone.model_copy(update={"name": "linear"})})
    return config


def as_file_name(dataset: str) -> str:
    """A data set's name without what separates folders.

    >>> as_file_name("folder:/data/birds")
    'folder-data-birds'
    """
    return re.sub("[/:]+", "-", dataset)
