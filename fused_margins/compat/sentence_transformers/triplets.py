"""Triplets of a batch as sentence-transformers chooses them, and sums of their hinges max(0, d_ap - d_an + margin)."""

import numpy as np
import torch
from torch import Tensor

from ...backends.budget import memory_budget
from ...core.enums import Relation, Similarity
from ...core.similarity import accumulation_dtype, pair_similarity, take_rows, unit_rows
from ...mining.positives import all_positives
from ...ops.nearest.op import Nearest, nearest
from ...ops.scores.op import Scores, scores


class Batch:
    """Rows x (B, D) and their labels (B,); distances are Euclidean, or 1 - cosine, of which x are the directions."""

    def __init__(self, embeddings: Tensor, labels: Tensor, cosine: bool) -> None:
        x = embeddings.to(accumulation_dtype(embeddings.dtype))
        self.x, self.similarity = (
            (unit_rows(x), Similarity.DOT) if cosine else (x, Similarity.NEGATIVE_SQUARED_EUCLIDEAN)
        )
        self.labels = labels
        self.rows = torch.arange(labels.shape[0], device=labels.device)

    def zero(self) -> Tensor:
        """0, or NaN where an embedding is not finite: no search finds such a row."""
        return (self.x.detach() * 0).sum()

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Every anchor (P,), ascending, with every other row (P,) of its class."""
        return all_positives(self.labels, self.labels, self.rows)

    def distance(self, u: Tensor) -> Tensor:
        """Of rows whose similarity is u; the gradient of a Euclidean one at 0 is 0."""
        return 1 - u if self.similarity == Similarity.DOT else (-u).clamp(min=torch.finfo(u.dtype).tiny).sqrt()

    def similarities(self, i: Tensor, j: Tensor) -> Tensor:
        """Of rows i with rows j; of any where an index is -1."""
        return pair_similarity(take_rows(self.x, i), take_rows(self.x, j), self.similarity)

    def distances(self) -> Tensor:
        """(B, B)"""
        return self.distance(scores.run(Scores(self.x, self.x, similarity=self.similarity), "auto", valid=False))

    def nearest(self, relation: Relation, largest: bool) -> Tensor:
        """For each row the most or least similar other one, -1 for none."""
        call = Nearest(self.x, self.x, self.labels, self.labels, self.rows, None, self.similarity, relation, 1, largest)
        return nearest.run(call, "auto", valid=False)[1][:, 0]

    def nearest_below(self, anchor: Tensor, u: Tensor) -> Tensor:
        """For each pair's anchor the most similar negative that is less similar than u, -1 for none."""
        rows, labels = self.x.detach()[anchor], self.labels[anchor]
        call = Nearest(rows, self.x, labels, self.labels, None, u, self.similarity, Relation.DIFFERENT)
        return nearest.run(call, "auto", valid=False)[1][:, 0]


def hardest(batch: Batch) -> tuple[Tensor, Tensor]:
    """Distances (B,) of each row's farthest positive, 0 for none, and nearest negative, the same for none."""
    with torch.autocast(batch.x.device.type, enabled=False):
        positive, negative = batch.nearest(Relation.SAME, False), batch.nearest(Relation.DIFFERENT, True)
        of_positive = batch.distance(batch.similarities(batch.rows, positive))
        of_positive = torch.where(positive >= 0, of_positive, 0.0)
        of_negative = batch.distance(batch.similarities(batch.rows, negative))
        return of_positive, torch.where(negative >= 0, of_negative, of_positive)


def semi_hard(batch: Batch, margin: float) -> tuple[Tensor, int]:
    """Sum of the hinges of all pairs of a class, each with one negative, and how many pairs there are.

    It is the nearest one that is farther than the positive, without one the farthest; its distance is 0 for none.
    """
    with torch.autocast(batch.x.device.type, enabled=False):
        anchor, positive = batch.pairs()
        rows, width = batch.x.shape
        d_bytes = rows * rows * batch.x.element_size()
        # The distances of all, or, where they are beyond the budget and more, both rows of every pair.
        if d_bytes <= memory_budget() or d_bytes <= anchor.shape[0] * width * batch.x.element_size():
            return _semi_hard_of_matrix(batch, anchor, positive, margin), anchor.shape[0]
        u = batch.similarities(anchor, positive)
        negative = batch.nearest_below(anchor, u.detach())
        negative = torch.where(negative < 0, batch.nearest(Relation.DIFFERENT, False)[anchor], negative)
        of_negative = torch.where(negative >= 0, batch.distance(batch.similarities(anchor, negative)), 0.0)
        return (batch.distance(u) - of_negative + margin).relu().sum(), anchor.shape[0]


def _semi_hard_of_matrix(batch: Batch, anchor: Tensor, positive: Tensor, margin: float) -> Tensor:
    d = batch.distances()
    near, order = _sorted_negatives(d, batch.labels)
    rows = d.shape[0]
    pair = anchor * rows + positive
    of_positive = take_rows(d.detach().view(-1), pair)
    size = torch.bincount(anchor, minlength=rows)
    last = (rows - 2 - size)[anchor]  # of the anchor's negatives, -1 for none
    k = torch.minimum(_how_many_below(near, anchor, size, of_positive, inclusive=True), last)
    place = anchor * rows + k.clamp(min=0)
    of_negative = torch.where(k >= 0, take_rows(near.view(-1), place), 0.0)
    active = (of_positive - of_negative + margin > 0).to(d.dtype)
    weight = torch.zeros_like(d).view(-1).index_add_(0, pair, active)
    weight.index_add_(0, anchor * rows + take_rows(order.view(-1), place), -active * (k >= 0))
    return _linear(d, weight, margin, active.sum())


def all_triplets(batch: Batch, margin: float) -> tuple[Tensor, Tensor]:
    """Sum of the hinges of all triplets, and the number of those above 0.

    A pair reaches the k negatives of its anchor that are nearer than d_ap + margin, the first k of them when sorted.
    """
    with torch.autocast(batch.x.device.type, enabled=False):
        anchor, positive = batch.pairs()
        d = batch.distances()
        near, order = _sorted_negatives(d, batch.labels)
        rows = d.shape[0]
        pair = anchor * rows + positive
        reach = take_rows(d.detach().view(-1), pair) + margin
        size = torch.bincount(anchor, minlength=rows)
        k = _how_many_below(near, anchor, size, reach, inclusive=False)
        # How many pairs of an anchor reach its negative of each rank: all but those whose k is not larger.
        ends = d.new_zeros(rows, rows + 1)
        ends.view(-1).index_add_(0, anchor * (rows + 1) + k, torch.ones_like(k, dtype=d.dtype))
        reached = size[:, None] - ends[:, :-1].cumsum(1)
        weight = torch.zeros_like(d).scatter_(1, order, -reached)
        weight.view(-1).index_add_(0, pair, k.to(d.dtype))
        return _linear(d, weight, margin, k.sum()), k.sum()


def _linear(d: Tensor, weight: Tensor, margin: float, count: Tensor) -> Tensor:
    """Sum of `count` hinges above 0, which is linear in the distances; it cancels, hence float64."""
    return ((weight.view_as(d) * d).sum(dtype=torch.float64) + margin * count.double()).to(d.dtype)


def _sorted_negatives(d: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's distances to rows of other classes, ascending and then infinite, and which rows they are: (B, B)."""
    d = d.detach().masked_fill(labels[:, None] == labels, torch.inf)
    if d.device.type != "cpu" or torch.compiler.is_compiling():
        return d.sort(1)
    order = torch.from_numpy(np.argsort(d.numpy(), axis=1))  # with vector instructions, several times as fast
    return d.gather(1, order), order


def _how_many_below(near: Tensor, anchor: Tensor, size: Tensor, bound: Tensor, inclusive: bool) -> Tensor:
    """For each pair how many of its anchor's sorted distances are less than a bound (P,), or equal.

    size: (B,) the pairs of each anchor.
    """
    place = torch.arange(anchor.shape[0], device=anchor.device) - (size.cumsum(0) - size)[anchor]
    bounds = near.new_full((near.shape[0], int(size.max())), torch.inf)
    bounds[anchor, place] = bound
    return torch.searchsorted(near, bounds, right=inclusive)[anchor, place]
