"""The documented subset of the papers' protocols, three quarters of an hour on two cores.

Real data, short trainings: Omniglot by both protocols with the papers' Conv4, a sweep over margins on CIFAR-FS, coarse
to fine and magnet on digits and on Omniglot's alphabets; and apart from these the parity of backends on both data sets.
Where 64 channels would take too long there are 32 (as in Finn et al., Model-agnostic meta-learning, 2017). What takes
evenings is a study of its own: the sweep over margins with all 64, trained until it converges.
"""

from typing import Any

from ..backends import of_all
from ..config import Backbone, Judging, Loss, Magnet, MarginSoftmax, TrainConfig
from ..errors import UserError
from ..presets import preset
from ..study import Study
from .coarse_to_fine import all_methods, coarse_to_fine_study, few_methods
from .magnet import magnet_study
from .margins import margin_sweep_study
from .omniglot import official_study, vinyals_study
from .parity import LOSSES, parity_study

MARGINS = (-0.3, -0.1, -0.05, 0.0, 0.3)  # -0.05 is the papers' own on this data set
FEW_MARGINS = (0.0, -0.05, -0.3, 0.3)
# Forty leave the accuracy rising while the rate comes down; of a hundred the last fifth has less than a seventh of it.
LONG = {"epochs": 100, "warmup_epochs": 10}
NARROW = Backbone(name="conv4", channels=32)
OMNIGLOT_LOSS: dict[str, Loss] = {"cosine softmax": MarginSoftmax(scale=10.0)}


def _settings(name: str, **changes: Any) -> TrainConfig:
    """A preset with changes, on one thread: as many trainings as cores run side by side."""
    return preset(name).model_copy(update={"threads": 1, **changes})


def _photographs() -> TrainConfig:
    return _settings("cosine-cifar-fs", backbone=NARROW, epochs=12)


def reproduce_studies() -> list[Study]:
    """The studies, the longest trainings first."""
    strokes = _settings("cosine-omniglot")
    photographs = _photographs()
    alphabets = _settings("easy-positive-omniglot-alphabets", backbone=NARROW, epochs=8)
    digits = _settings("easy-positive-digits")
    judging = Judging()
    return [
        vinyals_study(strokes.model_copy(update={"epochs": 6}), OMNIGLOT_LOSS, seeds=(0, 1)),
        official_study(strokes.model_copy(update={"epochs": 6}), OMNIGLOT_LOSS, seeds=(0, 1)),
        margin_sweep_study(photographs, MARGINS, (0, 1, 2), judging, "margins-cifar-fs"),
        coarse_to_fine_study(alphabets, few_methods(), range(3), judging, "coarse-to-fine-alphabets"),
        magnet_study(alphabets, range(3), judging, Magnet(clusters_per_class=20, warm_epochs=2), "magnet-alphabets"),
        coarse_to_fine_study(digits, few_methods(), range(6), judging, "coarse-to-fine-digits"),
        coarse_to_fine_study(digits, all_methods(), (0,), judging, "grid-digits"),
        magnet_study(digits, range(4), judging, name="magnet-digits"),
    ]


def long_studies() -> list[Study]:
    """Margins on CIFAR-FS with Conv4 of 64 channels; every margin has its first seed before one has its second."""
    photographs = _settings("cosine-cifar-fs", **LONG)
    return [margin_sweep_study(photographs, FEW_MARGINS, (0, 1, 2), Judging(), "margins-cifar-fs")]


def parity_studies() -> list[Study]:
    """Every loss on every backend, on both data sets: a quarter of an hour on two cores."""
    backends = ("reference", *of_all("cpu", LOSSES.values()))
    if len(backends) == 1:
        raise UserError("backends: only the reference is available, there is nothing to compare")
    photographs = _photographs().model_copy(update={"epochs": 3})
    strokes = _settings("cosine-omniglot", dataset="omniglot-alphabets", backbone=NARROW, epochs=2, labels="coarse")
    return [
        parity_study(photographs, LOSSES, backends, Judging(shots=(1,)), name="parity-cifar-fs"),
        parity_study(strokes, LOSSES, backends, Judging(), name="parity-omniglot"),
    ]
