"""The demonstration: the three papers' losses on scikit-learn's handwritten digits, and backends compared."""

from collections.abc import Sequence
from dataclasses import replace

from ..config import Judging, Loss, Magnet, MarginSoftmax, Softmax, TrainConfig, Triplet
from ..study import Claim, Study
from . import magnet
from .coarse_to_fine import coarse_to_fine_study
from .margins import margin_sweep_study
from .parity import parity_study

MARGINS = (-0.3, 0.0, 0.3)


def demo_studies(
    seeds: Sequence[int], epochs: int = 40, episodes: int = 600, backends: Sequence[str] = ("reference", "cpu")
) -> list[Study]:
    """Coarse to fine with magnet, margins, and where there is a second backend the parity of steps."""
    config = TrainConfig(dataset="digits", epochs=epochs, threads=1)
    judging = Judging(episodes=episodes)
    methods: dict[str, Loss] = {
        "softmax": Softmax(),
        "triplet, random positives": Triplet(positives="random"),
        "triplet, easy positives": Triplet(),
        "magnet": Magnet(),
    }
    coarse = config.model_copy(update={"labels": "coarse"})
    hierarchy = Claim(
        magnet.SOURCE, "magnet recovers the hierarchy below its labels (Recall@1)", "magnet", "softmax", "recall@1"
    )
    to_fine = coarse_to_fine_study(coarse, methods, seeds, judging)
    studies = [
        replace(to_fine, claims=[*to_fine.claims, hierarchy]),
        margin_sweep_study(config.model_copy(update={"loss": MarginSoftmax()}), MARGINS, seeds, judging),
    ]
    if len(backends) > 1:
        losses: dict[str, Loss] = {
            "margin softmax, m = -0.3": MarginSoftmax(margin=-0.3),
            "triplet, easy positives": Triplet(),
            "magnet": Magnet(warm_epochs=0),
        }
        studies.append(parity_study(coarse, losses, backends, judging, to_the_end=False))
    return studies
