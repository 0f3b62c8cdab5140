"""The demonstration: the three papers' losses on scikit-learn's handwritten digits, and backends compared."""

from collections.abc import Sequence

from ..config import Judging, Loss, Magnet, MarginSoftmax, Softmax, TrainConfig, Triplet
from ..study import Study
from .coarse_to_fine import coarse_to_fine_study
from .margins import margin_sweep_study
from .parity import parity_study

MARGINS = (-0.3, 0.0, 0.3, 0.5)


def demo_studies(
    seeds: Sequence[int], epochs: int = 40, episodes: int = 600, backends: Sequence[str] = ("reference", "cpu")
) -> list[Study]:
    """Coarse to fine, margins, and parity where there is a second backend."""
    config = TrainConfig(dataset="digits", epochs=epochs, threads=1)
    judging = Judging(episodes=episodes)
    methods: dict[str, Loss] = {
        "softmax": Softmax(),
        "triplet, random positives": Triplet(positives="random"),
        "triplet, easy positives": Triplet(),
        "magnet": Magnet(),
    }
    coarse = config.model_copy(update={"labels": "coarse"})
    studies = [
        coarse_to_fine_study(coarse, methods, seeds, judging),
        margin_sweep_study(config.model_copy(update={"loss": MarginSoftmax()}), MARGINS, seeds, judging),
    ]
    if len(backends) > 1:
        losses: dict[str, Loss] = {
            "margin softmax, m = -0.3": MarginSoftmax(margin=-0.3),
            "triplet, easy positives": Triplet(),
            "magnet": Magnet(warm_epochs=0),
        }
        studies.append(parity_study(coarse, losses, backends, judging))
    return studies
