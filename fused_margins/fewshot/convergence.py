"""Whether a training converged, by a rule that is stated before it: claims about its result ask for that."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .config import Judging
from .datasets import ImageSet
from .episodes import centroid_accuracy, episodes_of

WAYS = 5
AVERAGED = 5  # epochs
LEAST_SPAN = 10  # epochs, where a fifth of them is fewer
RISE = 0.005
DECAY = 0.1  # of the highest learning rate


class Validation:
    """The same episodes every time: 5-way 1-shot by the nearest centroid, of images that the training does not see."""

    def __init__(self, images: ImageSet, num_episodes: int) -> None:
        self.images = images
        ways = min(WAYS, len(images.labels.unique()))
        generator = torch.Generator().manual_seed(0)
        self.episodes = episodes_of(images.labels, ways, 1, Judging(episodes=num_episodes), generator)

    def __call__(self, embed: Callable[[ImageSet], Tensor]) -> float:
        return float(centroid_accuracy(embed(self.images), self.episodes).mean())


def stopped_early(history: Sequence[Mapping[str, Any]]) -> str | None:
    """Why a training may have stopped before it converged; None where it has converged.

    It has where the mean validation accuracy of the last five epochs is less than half a point above that of five
    epochs a fifth of the training before, ten epochs at least, and the learning rate has come down to a tenth.

    >>> epochs = [{"learning_rate": 1 - e / 40, "validation": min(e, 20) / 40} for e in range(40)]
    >>> stopped_early(epochs[:25]), stopped_early(epochs)
    ('validation accuracy rose by 20.0 points over the last 10 epochs', None)
    """
    span = max(LEAST_SPAN, math.ceil(len(history) / 5))
    if len(history) < span + AVERAGED:
        return f"{len(history)} epochs are too few to tell"
    accuracies = [row["validation"] for row in history]
    before, after = (sum(part) / AVERAGED for part in (accuracies[-AVERAGED - span : -span], accuracies[-AVERAGED:]))
    if after - before >= RISE:
        return f"validation accuracy rose by {100 * (after - before):.1f} points over the last {span} epochs"
    rates = [row["learning_rate"] for row in history]
    if rates[-1] > DECAY * max(rates):
        return f"the learning rate is still {rates[-1]:.1e}, of {max(rates):.1e} at its highest"
    return None
