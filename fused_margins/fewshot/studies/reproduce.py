"""What `demo` and `reproduce` train: the demonstration, a subset of the papers' protocols, and frozen features.

On real data, with trainings so short that two slow cores take about 45 minutes: Omniglot by both protocols with the
papers' Conv4, coarse to fine and magnet on digits and on Omniglot's alphabets; and apart from these the parity of
backends, also on CIFAR-FS. Where 64 channels would take too long there are 32 (as in Finn et al., Model-agnostic
meta-learning, 2017). What takes evenings is a study of its own: margins on CIFAR-FS with all 64, trained until they
converge, since of others no claim is judged. On frozen features of photographs, Caltech-101 and German traffic signs,
ten seeds each.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import Backbone, Judging, Loss, Magnet, MarginSoftmax, TrainConfig, Triplet
from ..datasets import load
from ..objectives import of_all
from ..presets import preset
from ..reports import Picture
from ..runs import Run
from ..terminal import UserError
from ..trainer import Trainer
from ..trials import task_of
from . import Claim, Results, Study
from .coarse_to_fine import all_methods, coarse_to_fine_study, few_methods, positive_methods
from .heads import heads_study
from .magnet import RECOVERS, magnet_study
from .magnet import SOURCE as OF_MAGNET
from .margins import draw_base_classes, margin_sweep_study
from .omniglot import official_study, vinyals_study
from .parity import LOSSES, parity_study

DEMO_MARGINS = (-0.3, 0.0, 0.3)
DEMO_STEPS = 60  # of parity
MARGINS = (0.0, -0.05, 0.3)  # -0.05 is the papers' own on CIFAR-FS
# In steps: a hundred epochs of a cosine gained 0.0 to 0.7 points in their last fifth, as the rate went from 12% to 0.
LONG = {"epochs": 80, "warmup_epochs": 10, "schedule": "warmup-steps"}
NARROW = Backbone(name="conv4", channels=32)
OMNIGLOT_LOSS: dict[str, Loss] = {"cosine softmax": MarginSoftmax(scale=10.0)}
CALTECH, SIGNS = "caltech101.safetensors", "gtsrb.safetensors"
BASE_CLASSES = 64  # of 101
ALL_MARGINS = (-0.5, -0.3, -0.1, -0.05, 0.0, 0.1, 0.3, 0.5)
TEN_SEEDS = range(10)


def demo_studies(
    seeds: Sequence[int], epochs: int = 30, episodes: int = 600, backends: Sequence[str] = ("reference", "cpu")
) -> list[Study]:
    """Coarse to fine with magnet, margins, and where there is a second backend the parity of steps."""
    config = TrainConfig(dataset="digits", epochs=epochs, threads=1)
    judging = Judging(episodes=episodes)
    methods: dict[str, Loss] = {
        "triplet, random positives": Triplet(positives="random"),
        "triplet, easy positives": Triplet(),
        "magnet": Magnet(samples_per_cluster=16),  # half of the steps that 8 take
    }
    coarse = config.but(labels="coarse")
    other = "triplet, random positives"
    hierarchy = Claim(OF_MAGNET, RECOVERS.format("triplet"), "magnet", other, "recall@1")
    to_fine = coarse_to_fine_study(coarse, methods, seeds, judging)
    longer = epochs * 6 // 5  # on half of the classes
    of_margins = TrainConfig(
        dataset="digits",
        loss=MarginSoftmax(),
        epochs=longer,
        schedule="warmup-steps",  # with one cycle of the rate 4 of 6 trainings at m = -0.3 did not converge
        warmup_epochs=longer // 8,
        learning_rate=1e-2,
        threads=1,
    )
    studies = [
        replace(to_fine, claims=[*to_fine.claims, hierarchy], pictures=_of_easy_positives),
        margin_sweep_study(of_margins, DEMO_MARGINS, seeds, judging),
    ]
    if len(backends) > 1:
        losses: dict[str, Loss] = {
            "margin softmax, m = -0.3": MarginSoftmax(margin=-0.3),
            "triplet, easy positives": Triplet(),
            "magnet": Magnet(warm_epochs=0),
        }
        parity = parity_study(coarse, losses, backends, judging, DEMO_STEPS, to_the_end=False)
        studies.append(replace(parity, pictures=lambda results: []))  # its table is enough
    return studies


def _of_easy_positives(results: Results) -> list[Picture]:
    """Maps and neighbours of the held-out images, by the first seed of easy positives."""
    from ..report import unseen_pictures

    (trial, _), *_ = results.of("triplet, easy positives")
    task = task_of(trial.config)
    trainer = Trainer(trial.config, task.training)
    Run(results.folder / trial.name).load_checkpoint(trainer.load_state_dict)
    found = unseen_pictures(results.folder, trainer, task).values()
    return [replace(picture, caption=f"{trial.group}: {picture.caption}") for picture in found]


def _settings(name: str, **changes: Any) -> TrainConfig:
    """A preset with changes, on one thread: as many trainings as cores run side by side."""
    return preset(name).but(threads=1, **changes)


def reproduce_studies() -> list[Study]:
    """The studies, the longest trainings first."""
    strokes = _settings("cosine-omniglot", epochs=4)
    alphabets = _settings("easy-positive-omniglot-alphabets", backbone=NARROW, epochs=5)
    digits = _settings("easy-positive-digits", epochs=20)
    judging = Judging()
    return [
        vinyals_study(strokes, OMNIGLOT_LOSS, seeds=(0, 1)),
        official_study(strokes, OMNIGLOT_LOSS, seeds=(0, 1)),
        coarse_to_fine_study(alphabets, few_methods(), range(3), judging, "coarse-to-fine-alphabets"),
        magnet_study(alphabets, range(3), judging, Magnet(clusters_per_class=20, warm_epochs=2), "magnet-alphabets"),
        coarse_to_fine_study(digits, few_methods(), range(6), judging, "coarse-to-fine-digits"),
        coarse_to_fine_study(digits, all_methods(), (0,), judging, "grid-digits"),
        magnet_study(digits, range(4), judging, name="magnet-digits"),
    ]


def long_studies() -> list[Study]:
    """Margins on CIFAR-FS with Conv4 of 64 channels; every margin has its first seed before one has its second."""
    photographs = _settings("cosine-cifar-fs", **LONG)
    return [margin_sweep_study(photographs, MARGINS, (0, 1, 2), Judging(), "margins-cifar-fs")]


def parity_studies() -> list[Study]:
    """Every loss on every backend, on both data sets: a quarter of an hour on two cores."""
    backends = ("reference", *of_all("cpu", LOSSES.values()))
    if len(backends) == 1:
        raise UserError("backends: only the reference is available, there is nothing to compare")
    photographs = _settings("cosine-cifar-fs", backbone=NARROW, epochs=3)
    strokes = _settings("cosine-omniglot", dataset="omniglot-alphabets", backbone=NARROW, epochs=2, labels="coarse")
    return [
        parity_study(photographs, LOSSES, backends, Judging(shots=(1,)), name="parity-cifar-fs"),
        parity_study(strokes, LOSSES, backends, Judging(), name="parity-omniglot"),
    ]


def feature_studies(folder: Path) -> list[Study]:
    """Those whose file of features is in the folder; both were split by image, or by track, when they were embedded."""
    studies = []
    if (folder / CALTECH).exists():
        studies += _of_photographs(f"features:{folder / CALTECH}")
    if (folder / SIGNS).exists():
        studies += _of_signs(folder / SIGNS)
    if not studies:
        raise UserError(f"features: expected {CALTECH} or {SIGNS} in {folder}, made by fused-margins embed")
    return studies


def _on_features(dataset: str, **settings: object) -> TrainConfig:
    return TrainConfig.model_validate(
        {"dataset": dataset, "backbone": Backbone(name="linear"), "threads": 1, "learning_rate": 1e-3, **settings}
    )


def _of_photographs(dataset: str) -> list[Study]:
    judging = Judging(all_ways=True)
    num_classes = len(load(dataset)["train"].class_names)
    base = [draw_base_classes(num_classes, seed, BASE_CLASSES) for seed in TEN_SEEDS]
    softmax = _on_features(dataset, loss=MarginSoftmax(scale=30.0), epochs=50)
    by_class = _on_features(dataset, samples_per_class=8, epochs=20)
    return [
        heads_study(_on_features(dataset), base, judging, "heads-caltech"),
        margin_sweep_study(softmax, ALL_MARGINS, TEN_SEEDS, judging, "margins-caltech", BASE_CLASSES),
        magnet_study(by_class, TEN_SEEDS, Judging(), Magnet(clusters_per_class=3, warm_epochs=2), "magnet-caltech"),
    ]


def _of_signs(file: Path) -> list[Study]:
    studies, judging = [], Judging()
    for kind, clusters in (("parents", 10), ("tracks", 3)):
        config = _on_features(f"gtsrb-{kind}:{file}", labels="coarse", samples_per_class=16, epochs=20)
        magnet = Magnet(clusters_per_class=clusters, warm_epochs=2)
        studies += [
            coarse_to_fine_study(config, positive_methods(), TEN_SEEDS, judging, f"positives-gtsrb-{kind}"),
            magnet_study(config, TEN_SEEDS, judging, magnet, f"magnet-gtsrb-{kind}"),
        ]
    return studies
