"""The three papers' claims on frozen features of photographs, ten seeds each: Caltech-101 and German traffic signs."""

from collections.abc import Sequence
from pathlib import Path

from ..config import Backbone, Judging, Magnet, MarginSoftmax, TrainConfig
from ..datasets import load
from ..errors import UserError
from ..study import Study
from .coarse_to_fine import coarse_to_fine_study, positive_methods
from .heads import heads_study
from .magnet import magnet_study
from .margins import draw_base_classes, margin_sweep_study

CALTECH, SIGNS = "caltech101.safetensors", "gtsrb.safetensors"
BASE_CLASSES = 64  # of 101
MARGINS = (-0.5, -0.3, -0.1, -0.05, 0.0, 0.1, 0.3, 0.5)
SEEDS = range(10)


def feature_studies(folder: Path, seeds: Sequence[int] = SEEDS) -> list[Study]:
    """Those whose file of features is in the folder; both were split by image, or by track, when they were embedded."""
    studies = []
    if (folder / CALTECH).exists():
        studies += _photographs(f"features:{folder / CALTECH}", seeds)
    if (folder / SIGNS).exists():
        studies += _signs(folder / SIGNS, seeds)
    if not studies:
        raise UserError(f"features: expected {CALTECH} or {SIGNS} in {folder}, made by fused-margins embed")
    return studies


def _settings(dataset: str, **settings: object) -> TrainConfig:
    return TrainConfig.model_validate(
        {"dataset": dataset, "backbone": Backbone(name="linear"), "threads": 1, "learning_rate": 1e-3, **settings}
    )


def _photographs(dataset: str, seeds: Sequence[int]) -> list[Study]:
    judging = Judging(all_ways=True)
    num_classes = len(load(dataset)["train"].class_names)
    base = [draw_base_classes(num_classes, seed, BASE_CLASSES) for seed in seeds]
    softmax = _settings(dataset, loss=MarginSoftmax(scale=30.0), epochs=50)
    by_class = _settings(dataset, samples_per_class=8, epochs=20)
    return [
        heads_study(_settings(dataset), base, judging, "heads-caltech"),
        margin_sweep_study(softmax, MARGINS, seeds, judging, "margins-caltech", BASE_CLASSES),
        magnet_study(by_class, seeds, Judging(), Magnet(clusters_per_class=3, warm_epochs=2), "magnet-caltech"),
    ]


def _signs(file: Path, seeds: Sequence[int]) -> list[Study]:
    judging, magnet = Judging(), Magnet(clusters_per_class=10, warm_epochs=2)
    parents, tracks = (
        _settings(f"gtsrb-{kind}:{file}", labels="coarse", samples_per_class=16, epochs=20)
        for kind in ("parents", "tracks")
    )
    return [
        coarse_to_fine_study(parents, positive_methods(), seeds, judging, "positives-gtsrb-parents"),
        coarse_to_fine_study(tracks, positive_methods(), seeds, judging, "positives-gtsrb-tracks"),
        magnet_study(parents, seeds, judging, magnet, "magnet-gtsrb-parents"),
        magnet_study(tracks, seeds, judging, Magnet(clusters_per_class=3, warm_epochs=2), "magnet-gtsrb-tracks"),
    ]
