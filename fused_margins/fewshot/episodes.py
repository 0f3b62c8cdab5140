"""Few-shot episodes over frozen features: drawn, and solved, all at once.

An episode shows `k_shot` labelled samples of `n_way` classes and asks for the class of some others. Its classifier is
either the nearest cosine centroid or a fresh cosine head, trained by the recipe of Liu et al. 2020 (scale 5, no margin;
SGD with learning rate 0.01, momentum 0.9, dampening 0.9, weight decay 1e-3; 100 passes in batches of 4). The heads of
all episodes are one batched problem: no episode's gradient touches another's weights.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import UserError

HEAD_SCALE, PASSES, HEAD_BATCH = 5.0, 100, 4
LEARNING_RATE, MOMENTUM, DAMPENING, WEIGHT_DECAY = 0.01, 0.9, 0.9, 1e-3


@dataclass(frozen=True)
class Episodes:
    """Indices into the labelled samples; an episode has its classes one after the other, renamed 0 to n_way - 1."""

    support: Tensor  # (E, n_way * k_shot)
    query: Tensor  # (E, n_way * num_queries)
    n_way: int

    def support_labels(self) -> Tensor:
        """(n_way * k_shot,)"""
        return torch.arange(self.n_way).repeat_interleave(self.support.shape[1] // self.n_way)

    def query_labels(self) -> Tensor:
        """(n_way * num_queries,)"""
        return torch.arange(self.n_way).repeat_interleave(self.query.shape[1] // self.n_way)


def sample_episodes(
    labels: Tensor,
    *,
    n_way: int = 5,
    k_shot: int = 1,
    num_queries: int = 16,
    num_episodes: int = 600,
    generator: torch.Generator,
) -> Episodes:
    """Episodes with classes and samples drawn without replacement from labels (N,).

    >>> labels = torch.arange(6).repeat(20)
    >>> episodes = sample_episodes(labels, num_episodes=3, generator=torch.Generator().manual_seed(0))
    >>> episodes.support.shape, episodes.query.shape
    (torch.Size([3, 5]), torch.Size([3, 80]))
    """
    labels = labels.cpu()
    classes, counts = torch.unique(labels, return_counts=True)
    needed = k_shot + num_queries
    if len(classes) < n_way:
        raise UserError(f"n_way: {n_way} classes wanted, the data have {len(classes)}")
    if int(counts.min()) < needed:
        raise UserError(
            f"k_shot + num_queries: {needed} samples a class wanted, "
            f"class {int(classes[counts.argmin()])} has {int(counts.min())}"
        )
    chosen = torch.rand(num_episodes, len(classes), generator=generator).argsort(dim=1)[:, :n_way]
    by_class = labels.argsort(stable=True)  # the samples of a class stand together, from its start on
    start = counts.cumsum(0) - counts
    # A random key for each sample that a class could have; those that it does not have sort last.
    keys = torch.rand(num_episodes, n_way, int(counts.max()), generator=generator)
    keys = keys.masked_fill(torch.arange(keys.shape[2]) >= counts[chosen][:, :, None], torch.inf)
    rank = keys.topk(needed, dim=2, largest=False).indices
    samples = by_class[start[chosen][:, :, None] + rank]  # (E, n_way, needed)
    return Episodes(samples[:, :, :k_shot].flatten(1), samples[:, :, k_shot:].flatten(1), n_way)


def centroid_accuracy(embeddings: Tensor, episodes: Episodes) -> Tensor:
    """(E,) accuracy of the nearest cosine centroid of unit-length support embeddings."""
    unit = F.normalize(embeddings)
    support = unit[episodes.support].unflatten(1, (episodes.n_way, -1))
    return _accuracy(unit, episodes, support.mean(dim=2))


def head_accuracy(embeddings: Tensor, episodes: Episodes, generator: torch.Generator) -> Tensor:
    """(E,) accuracy of a fresh cosine head for each episode."""
    num_episodes, num_support = episodes.support.shape
    width = embeddings.shape[1]
    bound = 1 / math.sqrt(width)  # as torch.nn.Linear starts
    weight = (torch.rand(num_episodes, episodes.n_way, width, generator=generator) * 2 - 1) * bound
    order = torch.rand(PASSES, num_episodes, num_support, generator=generator).argsort(dim=2)
    device = embeddings.device
    heads = train_heads(
        embeddings[episodes.support],
        episodes.support_labels().to(device),
        weight.to(device),
        order.to(device),
    )
    return _accuracy(F.normalize(embeddings), episodes, heads)


def train_heads(support: Tensor, labels: Tensor, weight: Tensor, order: Tensor) -> Tensor:
    """Cosine heads after SGD on their episodes' support sets.

    Args:
        support: (E, S, D) embeddings.
        labels: (S,), the same for every episode.
        weight: (E, n_way, D), initial heads.
        order: (passes, E, S), a permutation of the support set for each pass and episode.

    Returns:
        (E, n_way, D).
    """
    unit, weight, velocity = F.normalize(support, dim=2), weight.clone(), None
    one_hot = F.one_hot(labels, weight.shape[1]).to(weight.dtype)  # (S, n_way)
    for permutation in order:
        for chosen in permutation.split(HEAD_BATCH, dim=1):  # (E, up to 4)
            batch = unit.gather(1, chosen[:, :, None].expand(-1, -1, unit.shape[2]))
            length = weight.norm(dim=2, keepdim=True)
            direction = weight / length
            # Gradient of the batch's mean cross entropy, first of the directions (E, n_way, D), then of the weights,
            # which only turns them. Written out, because autograd takes twice the time for it.
            error = torch.softmax(HEAD_SCALE * batch @ direction.mT, dim=2) - one_hot[chosen]  # (E, 4, n_way)
            gradient = HEAD_SCALE / chosen.shape[1] * error.mT @ batch
            gradient -= direction * (gradient * direction).sum(dim=2, keepdim=True)
            gradient = gradient / length + WEIGHT_DECAY * weight
            # As torch.optim.SGD does it: the first step is not dampened.
            velocity = gradient if velocity is None else MOMENTUM * velocity + (1 - DAMPENING) * gradient
            weight -= LEARNING_RATE * velocity
    return weight


def _accuracy(unit: Tensor, episodes: Episodes, prototypes: Tensor) -> Tensor:
    """(E,) accuracy of the most similar of the prototypes (E, n_way, D) by cosine."""
    similarity = unit[episodes.query] @ F.normalize(prototypes, dim=2).mT  # (E, queries, n_way)
    truth = episodes.query_labels().to(unit.device)
    return (similarity.argmax(dim=2) == truth).float().mean(dim=1)
