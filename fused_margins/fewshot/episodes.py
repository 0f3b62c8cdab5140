"""Few-shot episodes over frozen features: drawn, and solved, all at once.

An episode shows `k_shot` labelled samples of `n_way` classes and asks for the class of some others. Its classifier is
the nearest cosine centroid, one of those that people compare with (SimpleShot, nearest neighbours, logistic
regression), or a fresh cosine head, trained by the recipe of Liu et al. 2020 (scale 5, no margin;
SGD with learning rate 0.01, momentum 0.9, dampening 0.9, weight decay 1e-3; 100 passes in batches of 4). The heads of
all episodes are one batched problem: no episode's gradient touches another's weights. They start as the official code's
do, uniform within 1 / sqrt(D).
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from .config import Judging
from .terminal import UserError

MEMORY_BYTES = 1 << 27  # for the embeddings of the episodes in hand
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


def episodes_of(labels: Tensor, ways: int, shots: int, judging: Judging, generator: torch.Generator) -> Episodes:
    """As many as are asked for, with as many queries as the smallest class allows."""
    smallest = int(labels.unique(return_counts=True)[1].min())
    return sample_episodes(
        labels,
        n_way=ways,
        k_shot=shots,
        num_queries=max(1, min(judging.queries, smallest - shots)),
        num_episodes=judging.episodes,
        generator=generator,
    )


def centroid_accuracy(embeddings: Tensor, episodes: Episodes) -> Tensor:
    """(E,) accuracy of the nearest cosine centroid of unit-length support embeddings."""
    unit = F.normalize(embeddings)

    def judge(part: Episodes, _: slice) -> Tensor:
        support = unit[part.support].unflatten(1, (part.n_way, -1))
        return _accuracy(unit, part, support.mean(dim=2))

    return _by_parts(judge, episodes, embeddings.shape[1])


def simple_shot_accuracy(embeddings: Tensor, episodes: Episodes, base_mean: Tensor) -> Tensor:
    """(E,) accuracy of the centroid at the least distance, of embeddings minus the base classes' mean, normalised.

    Source: Wang et al., SimpleShot: revisiting nearest-neighbor classification for few-shot learning, 2019, CL2N.
    """
    unit = F.normalize(embeddings - base_mean)

    def judge(part: Episodes, _: slice) -> Tensor:
        centroids = unit[part.support].unflatten(1, (part.n_way, -1)).mean(dim=2)
        scores = unit[part.query] @ centroids.mT - centroids.square().sum(2)[:, None] / 2
        return _share_right(scores, part)

    return _by_parts(judge, episodes, embeddings.shape[1])


def neighbours_accuracy(embeddings: Tensor, episodes: Episodes) -> Tensor:
    """(E,) accuracy of the k nearest support samples by cosine, as many as there are shots; a vote is 1 / (1 - cosine).

    As scikit-learn's `KNeighborsClassifier(k, metric="cosine", weights="distance")` has it.
    """
    unit = F.normalize(embeddings)

    def judge(part: Episodes, _: slice) -> Tensor:
        cosine = unit[part.query] @ unit[part.support].mT  # (E, queries, n_way * k_shot)
        nearest = cosine.topk(cosine.shape[2] // part.n_way, dim=2)
        votes = 1 / (1 - nearest.values).clamp(min=1e-6)
        labels = part.support_labels().to(unit.device)[nearest.indices]
        return _share_right(torch.zeros(*votes.shape[:2], part.n_way).scatter_add_(2, labels, votes), part)

    return _by_parts(judge, episodes, embeddings.shape[1])


def logistic_accuracy(embeddings: Tensor, episodes: Episodes) -> Tensor:
    """(E,) accuracy of scikit-learn's logistic regression (L2 penalty, C = 1) on embeddings of unit length."""
    unit = F.normalize(embeddings).cpu().numpy()
    support, query = episodes.support_labels().numpy(), episodes.query_labels().numpy()
    accuracies = []
    with warnings.catch_warnings():
        # One sample of each of many classes looks like a regression to it.
        warnings.filterwarnings("ignore", "The number of unique classes is greater than 50%", UserWarning)
        for shown, asked in zip(episodes.support.numpy(), episodes.query.numpy()):
            accuracies.append(LogisticRegression(max_iter=1000).fit(unit[shown], support).score(unit[asked], query))
    return torch.tensor(accuracies)


def head_accuracy(embeddings: Tensor, episodes: Episodes, generator: torch.Generator) -> Tensor:
    """(E,) accuracy of a fresh cosine head for each episode.

    Takes one number from `generator`, whatever the width: what it draws next is the same for every network.
    """
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    generator = torch.Generator().manual_seed(seed)
    num_episodes, num_support = episodes.support.shape
    width, device = embeddings.shape[1], embeddings.device
    bound = 1 / math.sqrt(width)  # uniform, as torch.nn.Linear starts
    weight = (torch.rand(num_episodes, episodes.n_way, width, generator=generator) * 2 - 1) * bound
    order = torch.rand(PASSES, num_episodes, num_support, generator=generator).argsort(dim=2)
    unit, labels = F.normalize(embeddings), episodes.support_labels().to(device)

    def judge(part: Episodes, chosen: slice) -> Tensor:
        start = weight[chosen].to(device)
        heads = train_heads(unit[part.support], labels, start, order[:, chosen].to(device))
        return _accuracy(unit, part, heads)

    return _by_parts(judge, episodes, width)


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
    unit = F.normalize(support, dim=2)
    (num_support, width), n_way = unit.shape[1:], weight.shape[1]
    if num_support + n_way >= width:
        return _descend(unit, labels, weight, order)
    # Gradients of cosines are combinations of a head and its support set: no head ever leaves the span of the support
    # set and the starts. In an orthonormal basis of it, the same descent has S + n_way coordinates instead of D.
    basis, coordinates = torch.linalg.qr(torch.cat([unit, weight], dim=1).mT)  # (E, D, S + n_way), (E, S + n_way, ...)
    coordinates = coordinates.mT.contiguous()
    return _descend(coordinates[:, :num_support], labels, coordinates[:, num_support:], order) @ basis.mT


def _descend(unit: Tensor, labels: Tensor, weight: Tensor, order: Tensor) -> Tensor:
    """`train_heads` for unit-length support (E, S, D).

    With cosines c_bk of sample b and head k, and e = softmax(scale c) - one_hot, the gradient of a batch's mean cross
    entropy is (scale / B) sum_b e_bk (x_b - c_bk w_k / |w_k|) / |w_k|. Autograd would take several times as long.
    """
    weight, velocity = weight.clone(), torch.zeros_like(weight)
    one_hot = F.one_hot(labels, weight.shape[1]).to(weight.dtype)  # (S, n_way)
    share = 1.0  # of a gradient that enters the velocity: as in torch.optim.SGD, the first step is not dampened
    episode = torch.arange(len(unit), device=unit.device)[:, None]
    for permutation in order:
        samples = unit[episode, permutation]
        targets = one_hot[permutation]  # (E, S, n_way)
        for batch, target in zip(samples.split(HEAD_BATCH, dim=1), targets.split(HEAD_BATCH, dim=1)):
            length = torch.linalg.vector_norm(weight, dim=2)[:, None]  # (E, 1, n_way)
            cosine = batch @ weight.mT / length  # (E, up to 4, n_way)
            exponential = torch.exp(HEAD_SCALE * cosine)  # at most exp(5): no maximum need be taken away
            error = exponential / exponential.sum(dim=2, keepdim=True) - target
            error *= share * HEAD_SCALE / batch.shape[1] / length
            shrink = share * WEIGHT_DECAY - (error * cosine).sum(dim=1, keepdim=True) / length  # (E, 1, n_way)
            velocity.baddbmm_(error.mT, batch, beta=MOMENTUM)
            velocity.addcmul_(weight, shrink.mT)
            weight.add_(velocity, alpha=-LEARNING_RATE)
            share = 1 - DAMPENING
    return weight


def _by_parts(judge: Callable[[Episodes, slice], Tensor], episodes: Episodes, width: int) -> Tensor:
    """`judge` of so many episodes at a time that their embeddings stay within MEMORY_BYTES."""
    num_episodes = len(episodes.support)
    samples = episodes.support.shape[1] + episodes.query.shape[1]
    at_once = max(1, MEMORY_BYTES // (4 * samples * width))
    parts = [slice(start, start + at_once) for start in range(0, num_episodes, at_once)]
    return torch.cat([judge(Episodes(episodes.support[p], episodes.query[p], episodes.n_way), p) for p in parts])


def _accuracy(unit: Tensor, episodes: Episodes, prototypes: Tensor) -> Tensor:
    """(E,) accuracy of the most similar of the prototypes (E, n_way, D) by cosine."""
    return _share_right(unit[episodes.query] @ F.normalize(prototypes, dim=2).mT, episodes)


def _share_right(scores: Tensor, episodes: Episodes) -> Tensor:
    """(E,) accuracy of the highest of the scores (E, queries, n_way)."""
    return (scores.argmax(dim=2) == episodes.query_labels().to(scores.device)).float().mean(dim=1)
