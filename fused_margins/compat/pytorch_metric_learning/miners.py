"""The miners of pytorch-metric-learning; those below run on the kernels, in the calls that `calls` admits."""

import math
from typing import Any

import torch
from pytorch_metric_learning import miners as _theirs
from pytorch_metric_learning.miners import *  # noqa: F403
from torch import Tensor

from ...core.enums import Relation, Similarity
from ...core.similarity import accumulation_dtype, similarity_matrix, take_rows
from ...mining.negatives import distance_weighted_negatives
from ...mining.positives import all_positives, random_positives
from ...mining.sides import Sides, runs_of
from ...ops.nearest.op import nearest
from . import calls
from .calls import Hooks

__all__ = [name for name in dir(_theirs) if not name.startswith("_")]

Range = tuple[float, float]


class OnKernels(_theirs.BaseMiner):
    """A miner that is ours where there is no reason against it, and theirs elsewhere. It stands before their class."""

    def mine(self, embeddings: Any, labels: Any, ref_emb: Any, ref_labels: Any) -> tuple[Tensor, ...]:
        if self._why_not(embeddings, labels, ref_emb, ref_labels) is not None:
            return super().mine(embeddings, labels, ref_emb, ref_labels)
        return self._fused(calls.sides_of(self.distance, embeddings, labels, None, ref_emb, ref_labels))

    def _why_not(self, *call: Any) -> str | None:
        raise NotImplementedError

    def _fused(self, sides: Sides) -> tuple[Tensor, ...]:
        raise NotImplementedError


class BatchEasyHardMiner(OnKernels, _theirs.BatchEasyHardMiner):
    """Theirs, without a matrix of distances. Ties go to the first sample.

    A search has one bound, of the nearest sample. For the farthest one x is mirrored, for which distances are made
    products, with two columns more.

    Source: Xuan et al., Improved embeddings with easy positive triplet mining, 2020; Hermans et al., In defense of the
    triplet loss for person re-identification, 2017, "batch hard".
    """

    _hooks = Hooks(
        _theirs.BatchEasyHardMiner,
        *("get_positives", "get_negatives", "get_mine_function", "get_max_per_row", "get_min_per_row"),
        *("get_x_per_row", "set_stats"),
    )

    def _why_not(self, *call: Any) -> str | None:
        if self.collect_stats:
            return "the miner collects statistics"
        if reason := self._hooks.why_not(self):
            return reason
        if type(self.distance) is calls.distances.LpDistance:
            reason = calls.why_not_euclidean(self.distance)
        else:
            reason = calls.why_not_dot_product(self.distance)
        for name in ("allowed_pos_range", "allowed_neg_range"):
            reason = reason or _why_not_range(name, getattr(self, name))
        return reason or calls.why_not_by_label(*call)

    def _bounds_the_farthest(self) -> bool:
        of_positives = self.pos_strategy == self.HARD and self.allowed_pos_range is not None
        of_negatives = self.neg_strategy == self.EASY and self.allowed_neg_range is not None
        return of_positives or of_negatives or self.pos_strategy == self.SEMIHARD

    def _fused(self, sides: Sides) -> tuple[Tensor, ...]:
        if not self.distance.is_inverted and self._bounds_the_farthest():
            sides = _of_products(sides)
        easy, hard, semihard, everything = self.EASY, self.HARD, self.SEMIHARD, self.ALL
        anchors = torch.arange(sides.x.shape[0], device=sides.x.device)
        below: Tensor | None = None
        negative = positive = anchors
        if self.pos_strategy == semihard:
            below, negative = self._search(sides, Relation.DIFFERENT, self.neg_strategy == hard)
            # The least similar of those above the negative, as the most similar of the mirrored ones below it.
            mirrored = sides._replace(x=-sides.x)
            _, positive = self._search(mirrored, Relation.SAME, True, -below, mirrored=True)
        else:
            if self.pos_strategy != everything:
                similarity, positive = self._search(sides, Relation.SAME, self.pos_strategy == easy)
                below = similarity if self.neg_strategy == semihard else None
            if self.neg_strategy != everything:
                _, negative = self._search(sides, Relation.DIFFERENT, self.neg_strategy != easy, below)
        if everything not in (self.pos_strategy, self.neg_strategy):
            found = (positive >= 0) & (negative >= 0)
            return anchors[found], positive[found], anchors[found], negative[found]
        positives: tuple[Tensor, ...] = anchors[positive >= 0], positive[positive >= 0]
        negatives: tuple[Tensor, ...] = anchors[negative >= 0], negative[negative >= 0]
        if self.pos_strategy == everything:
            positives = all_positives(*sides[2:])
        if self.neg_strategy == everything:
            negatives = torch.where(sides.labels[:, None] != sides.reference_labels)
        return *positives, *negatives

    def _search(
        self, sides: Sides, relation: Relation, largest: bool, below: Tensor | None = None, mirrored: bool = False
    ) -> tuple[Tensor, Tensor]:
        """For each row its most or least similar sample: how similar (B,), and its index (B,), -1 for none."""
        products = self.distance.is_inverted or self._bounds_the_farthest()
        measure = Similarity.DOT if products else Similarity.NEGATIVE_SQUARED_EUCLIDEAN
        allowed = self.allowed_pos_range if relation == Relation.SAME else self.allowed_neg_range
        if allowed is None:
            return _nearest(sides, measure, relation, largest, below)
        least, most = _similarities(allowed, self.distance)
        # The most similar sample below the upper end is in the range, or none is; the least similar one, mirrored.
        turned = mirrored or not largest
        if turned:
            least, most = -most, -least
        sides = sides if largest else sides._replace(x=-sides.x)
        dtype = accumulation_dtype(sides.x.dtype)
        bound = torch.nextafter(torch.tensor(most, dtype=dtype), torch.tensor(torch.inf, dtype=dtype))
        bound = bound.to(sides.x.device).expand(sides.x.shape[0])
        similarity, index = _nearest(sides, measure, relation, True, bound if below is None else bound.minimum(below))
        found = similarity >= torch.tensor(least, dtype=dtype)
        similarity, index = torch.where(found, similarity, -torch.inf), torch.where(found, index, -1)
        return (similarity if largest else -similarity), index


def _of_products(sides: Sides) -> Sides:
    """Sides whose products are -|x - y|^2 = <(2 x, |x|^2, 1), (y, -1, -|y|^2)>, exact for small whole numbers."""
    x, y = (t.to(accumulation_dtype(t.dtype)) for t in sides[:2])
    of_x, of_y = (t.square().sum(1, keepdim=True) for t in (x, y))
    x = torch.cat([2 * x, of_x, torch.ones_like(of_x)], dim=1)
    return sides._replace(x=x, y=torch.cat([y, -torch.ones_like(of_y), -of_y], dim=1))


class BatchHardMiner(_theirs.BatchHardMiner, BatchEasyHardMiner):
    """Theirs, without a matrix of distances. Ties go to the first sample.

    Source: Hermans et al., In defense of the triplet loss for person re-identification, 2017, "batch hard".
    """


class MultiSimilarityMiner(OnKernels, _theirs.MultiSimilarityMiner):
    """Theirs, a block of rows at a time: the pairs it finds are all that is stored. Their order is theirs but for ties.

        positives u_ip < max_n u_in + epsilon,   negatives u_in > min_p u_ip - epsilon

    Source: Wang et al., Multi-similarity loss with general pair weighting for deep metric learning, 2019, eq. 11, 12.
    """

    _hooks = Hooks(_theirs.MultiSimilarityMiner, "output_assertion")

    def _why_not(self, embeddings: Any, labels: Any, ref_emb: Any, ref_labels: Any) -> str | None:
        if type(embeddings) is type(ref_emb) is Tensor and embeddings.shape[0] * ref_emb.shape[0] <= FEW_ENTRIES:
            return "the matrix of all pairs is small"
        reason = self._hooks.why_not(self) or calls.why_not_number("epsilon", self.epsilon, low=0)
        reason = reason or calls.why_not_dot_product(self.distance)
        reason = reason or calls.why_not_by_label(embeddings, labels, ref_emb, ref_labels)
        if reason is None and (ref_emb is embeddings) != (ref_labels is labels):
            return "of embeddings and labels, one is its own reference"
        return reason

    def _fused(self, sides: Sides) -> tuple[Tensor, ...]:
        x, y, labels, reference_labels, self_index = sides
        found: list[list[Tensor]] = [[], [], [], []]
        step = max(1, ENTRIES_AT_ONCE // y.shape[0])
        for start in range(0, x.shape[0], step):
            rows = slice(start, start + step)
            u = similarity_matrix(x[rows], y, Similarity.DOT).to(x.dtype)
            same = labels[rows, None] == reference_labels
            other = ~same
            if self_index is not None:
                same.scatter_(1, self_index[rows, None], False)
            most = u.masked_fill(~other, -torch.inf).amax(1, keepdim=True)
            least = u.masked_fill(~same, torch.inf).amin(1, keepdim=True)
            chosen = same & (u - self.epsilon < most), other & (u + self.epsilon > least)
            for i, mask in enumerate(chosen):
                row, column = _by_similarity(u, mask)
                found[2 * i].append(row + start)
                found[2 * i + 1].append(column)
        a1, p, a2, n = (torch.cat(part) for part in found)
        return a1, p, a2, n


def _by_similarity(u: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the masked entries, of each row the least similar first."""
    if 8 * int(mask.sum()) > mask.numel():  # whole rows are sorted faster than a list of that many entries
        order = u.masked_fill(~mask, torch.inf).sort(dim=1, stable=True).indices
        first = torch.arange(u.shape[1], device=u.device) < mask.sum(1, keepdim=True)
        row, place = first.nonzero(as_tuple=True)
        return row, order[row, place]
    row, column = mask.nonzero(as_tuple=True)
    order = torch.argsort(u[row, column], stable=True)
    order = order[torch.argsort(row[order], stable=True)]
    return row[order], column[order]


ENTRIES_AT_ONCE = 1 << 18  # of a block of rows, which stay in a CPU's cache
FEW_ENTRIES = 1 << 14  # up to which blocks save nothing


class DistanceWeightedMiner(OnKernels, _theirs.DistanceWeightedMiner):
    """Theirs in distribution: of each anchor as many triplets as its class has samples, drawn without a matrix.

    No weight underflows, so that anchors which theirs drops have their triplets. Left to them: other cut-offs.

    Source: Wu et al., Sampling matters in deep embedding learning, 2017, section 4.1.
    """

    _hooks = Hooks(_theirs.DistanceWeightedMiner, "output_assertion")

    def _why_not(self, embeddings: Any, *call: Any) -> str | None:
        reason = self._hooks.why_not(self) or calls.why_not_euclidean(self.distance, (1,))
        if reason is None and not self.distance.normalize_embeddings:
            reason = "the distance does not normalize"
        if reason is None and (self.cutoff, self.nonzero_loss_cutoff) != (0.5, _FARTHEST):
            reason = f"its cut-offs are {self.cutoff} and {self.nonzero_loss_cutoff}"
        return reason or calls.why_not_by_label(embeddings, *call)

    def _fused(self, sides: Sides) -> tuple[Tensor, ...]:
        x, y, labels, reference_labels, self_index = sides
        runs = runs_of(labels, reference_labels, self_index)
        positives = runs.size - runs.own_inside.long()
        similarity, _ = _nearest(sides, Similarity.DOT, Relation.DIFFERENT, True)
        # A row whose negatives are all beyond the cut-off has none.
        near = similarity > 1 - _FARTHEST**2 / 2
        anchor = torch.arange(x.shape[0], device=x.device)[(positives > 0) & near]
        anchor = anchor.repeat_interleave(runs.size[anchor])
        itself = None if self_index is None else self_index[anchor]
        positive = random_positives(labels[anchor], reference_labels, itself)
        drawn = take_rows(x, anchor), labels[anchor], y, reference_labels
        return anchor, positive, distance_weighted_negatives(*drawn, self_index=itself)


_FARTHEST = 1.4  # the distance from which on nothing is drawn


def _nearest(
    sides: Sides, measure: Similarity, relation: Relation, largest: bool, below: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """For each row its most or least similar sample: how similar (B,), and its index (B,), -1 for none."""
    x, y, labels, reference_labels, self_index = sides
    similarity, index = nearest(
        x, y, labels, reference_labels, self_index, below, similarity=measure, relation=relation, largest=largest
    )
    return similarity[:, 0], index[:, 0]


def _why_not_range(name: str, allowed: Any) -> str | None:
    if allowed is None:
        return None
    if not isinstance(allowed, tuple | list) or len(allowed) != 2:
        return f"{name} is no pair"
    return calls.why_not_number(name, allowed[0]) or calls.why_not_number(name, allowed[1])


def _similarities(allowed: Any, distance: Any) -> Range:
    """A range of entries of a distance's matrix as one of similarities."""
    least, most = map(float, allowed)
    if distance.is_inverted:
        return least, most
    if distance.power == 1:
        least, most = math.copysign(least**2, least), math.copysign(most**2, most)
    return -most, -least
