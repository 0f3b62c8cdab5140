"""The positives and negatives of each row, given by labels or listed by a miner: what pair losses are made of.

Both classes answer the same questions about products u_ij of rows x_i with references y_j. By labels the kernels
answer, without a B x N matrix; a list of T pairs is gathered, in O(T) numbers, or T D where that is less than B N.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...backends.budget import memory_budget
from ...core.enums import Relation, Similarity
from ...core.reductions import masked_logsumexp
from ...core.similarity import accumulation_dtype, admitted, pair_similarity, similarity_matrix, take_rows
from ...mining.positives import all_positives
from ...mining.sides import Sides, runs_of
from ...ops.contrast.op import Contrast, contrast
from .calls import is_by_label, sides_of, why_not_known
from .rows import both_rows

SMALL_MATRIX = 1 << 16  # entries, up to which counting and sorting the positives takes longer than a matrix of them


class ByLabel:
    """Positives of a row are the references of its label but itself, negatives those of another.

    bias: (N,) what is added to scale u_ij in a log-sum-exp.
    """

    def __init__(self, sides: Sides, measure: Similarity = Similarity.DOT, bias: Tensor | None = None) -> None:
        self.sides, self.measure, self.bias = sides, measure, bias
        self._no_target = torch.zeros(sides.x.shape[0], dtype=torch.int64, device=sides.x.device)
        self._mirrored: Tensor | None = None

    def log_sum_exp(self, relation: Relation, scale: float) -> Tensor:
        """(B,) log sum_j exp(scale u_ij) over positives, negatives or both; -inf for none. Below 0: products."""
        x, y, labels, reference_labels, self_index = self.sides
        if relation == Relation.SAME and self._has_few_positives():
            anchor, positive = self.positives
            z = scale * pair_similarity(take_rows(x, anchor), take_rows(y, positive), self.measure)
            z = z if self.bias is None else z + take_rows(self.bias, positive)
            return segment_log_sum_exp(z, anchor, x.shape[0])
        x = x if scale > 0 else -x
        call = Contrast(x, y, self._no_target, labels, reference_labels, self_index, abs(scale), self.bias)
        call = call._replace(similarity=self.measure, relation=relation)
        return contrast.run(call, "auto", valid=False)[1]

    def _has_few_positives(self) -> bool:
        """Whether the rows of all positive pairs are fewer numbers than half the matrix; a small one is not asked."""
        rows, columns = self.sides.x.shape[0], self.sides.y.shape[0]
        if rows * columns <= SMALL_MATRIX:
            return False
        runs = runs_of(*self.sides[2:])
        number = int((runs.size - runs.own_inside.long()).sum())
        return 2 * number * self.sides.x.shape[1] <= rows * columns

    @functools.cached_property
    def positives(self) -> tuple[Tensor, Tensor]:
        """All positive pairs: anchors (P,) and positives (P,)."""
        return all_positives(*self.sides[2:])

    def of_positives(self) -> Tensor:
        """(P,) u of each positive pair."""
        return products_at(self.sides.x, self.sides.y, *self.positives)

    @functools.cached_property
    def _total(self) -> tuple[Tensor, Tensor]:
        return _sum_of_positives(self.sides)

    @functools.cached_property
    def _same(self) -> Tensor | None:
        """(B, N) bool, the positives of each row; None where that is no small matrix."""
        x, y, labels, reference_labels, self_index = self.sides
        if x.shape[0] * y.shape[0] > SMALL_MATRIX:
            return None
        same = labels[:, None] == reference_labels
        return same if self_index is None else same.scatter_(1, self_index[:, None], False)

    @functools.cached_property
    def count(self) -> Tensor:
        """(B,) how many positives each row has."""
        return self._total[1] if self._same is None else self._same.sum(1)

    def mean_of_positives(self, scale: float) -> Tensor:
        """(B,) the mean of scale u over each row's positives; 0 for none."""
        x, y = (t.to(accumulation_dtype(t.dtype)) for t in self.sides[:2])
        factor = scale / self.count.clamp(min=1).to(x.dtype)
        if self._same is None:
            return (x * self._total[0]).sum(1) * factor
        return (x * ((self._same * factor[:, None]) @ y)).sum(1)

    def numbers(self, positives: int | None = None) -> tuple[int, int]:
        """How many pairs there are of either kind."""
        positives = int(self.count.sum()) if positives is None else positives
        return positives, self._size() - positives

    def _size(self) -> int:
        rows, columns = self.sides.x.shape[0], self.sides.y.shape[0]
        return rows * columns - (0 if self.sides.self_index is None else rows)

    def is_one_of_each(self) -> bool:
        """Whether there is at most one pair of either kind, which theirs takes for none."""
        return self._size() <= 2 and max(self.numbers()) <= 1

    def once(self) -> "ByLabel":
        """Every pair once, as they are."""
        return self


class ByDistance(ByLabel):
    """As ByLabel, of u_ij = -d_ij, the entries of a distance's matrix: of some rows at a time, and again backward."""

    def __init__(self, distance: Any, sides: Sides) -> None:
        super().__init__(sides)
        self.distance = distance

    def log_sum_exp(self, relation: Relation, scale: float) -> Tensor:
        x, y, labels, reference_labels, self_index = self.sides

        def of_rows(x: Tensor, y: Tensor, rows: slice) -> Tensor:
            d = self.distance.compute_mat(x, y)
            itself = None if self_index is None else self_index[rows]
            return masked_logsumexp(
                -scale * d.to(accumulation_dtype(d.dtype)), admitted(labels[rows], reference_labels, relation, itself)
            )

        step = max(1, memory_budget() // (4 * y.shape[0] * y.element_size()))
        if step >= x.shape[0]:
            return of_rows(x, y, slice(None))
        pieces = [slice(start, start + step) for start in range(0, x.shape[0], step)]
        return torch.cat(
            [checkpoint(of_rows, x[rows], y, rows, use_reentrant=False, preserve_rng_state=False) for rows in pieces]
        )


class ByIndex:
    """Pairs that are listed: anchor and positive (P,), anchor and negative (Q,)."""

    def __init__(self, x: Tensor, y: Tensor, pairs: tuple[Tensor, ...]) -> None:
        self.x, self.y = x, y
        anchor, positive, other_anchor, negative = pairs
        self.positives, self.negatives = (anchor, positive), (other_anchor, negative)

    @functools.cached_property
    def _products(self) -> tuple[Tensor, Tensor]:
        """u of the positives (P,) and of the negatives (Q,)."""
        sizes = [self.positives[0].shape[0], self.negatives[0].shape[0]]
        anchor, other = (torch.cat(both) for both in zip(self.positives, self.negatives))
        return products_at(self.x, self.y, anchor, other).split(sizes)

    def log_sum_exp(self, relation: Relation, scale: float) -> Tensor:
        """(B,) log sum_j exp(scale u_ij) over positives, negatives or both; -inf for none."""
        kinds = {Relation.SAME: [0], Relation.DIFFERENT: [1], Relation.ANY: [0, 1]}[relation]
        u = [self._products[kind] for kind in kinds]
        anchor = [(self.positives, self.negatives)[kind][0] for kind in kinds]
        return segment_log_sum_exp(scale * torch.cat(u), torch.cat(anchor), self.x.shape[0])

    def of_positives(self) -> Tensor:
        """(P,) u of each positive pair."""
        return self._products[0]

    @functools.cached_property
    def count(self) -> Tensor:
        """(B,) how many positives each row has."""
        return torch.bincount(self.positives[0], minlength=self.x.shape[0])

    def mean_of_positives(self, scale: float) -> Tensor:
        """(B,) the mean of scale u over each row's positives; 0 for none."""
        u = self._products[0]
        total = u.new_zeros(self.x.shape[0]).index_add(0, self.positives[0], u)
        return total * (scale / self.count.clamp(min=1).to(u.dtype))

    def numbers(self, positives: int | None = None) -> tuple[int, int]:
        """How many pairs there are of either kind."""
        return self.positives[0].shape[0], self.negatives[0].shape[0]

    def is_one_of_each(self) -> bool:
        """Whether there is at most one pair of either kind, which theirs takes for none."""
        return max(self.numbers()) <= 1

    def once(self) -> "ByIndex | None":
        """Every pair once, as in a mask; None where a pair is positive and negative at once."""
        rows, columns = self.x.shape[0], self.y.shape[0]
        kinds = self.positives, self.negatives
        if rows * columns <= 16 * sum(self.numbers()):  # bytes of two masks, or of sorted int64
            masks = [torch.zeros(rows, columns, dtype=torch.bool, device=self.x.device) for _ in kinds]
            for mask, pairs in zip(masks, kinds):
                mask[pairs] = True
            if bool((masks[0] & masks[1]).any()):
                return None
            found = [mask.nonzero(as_tuple=True) for mask in masks]
        else:
            keys = [torch.unique(anchor * columns + other) for anchor, other in kinds]
            if bool(torch.isin(*keys, assume_unique=True).any()):
                return None
            found = [(key // columns, key % columns) for key in keys]
        return ByIndex(self.x, self.y, (*found[0], *found[1]))


def terms_of(
    distance: Any, embeddings: Tensor, labels: Any, pairs: Any, ref_emb: Tensor, ref_labels: Any
) -> ByLabel | ByIndex:
    """The pairs of a call, by its labels, or as its miner listed them."""
    if is_by_label(pairs):
        return ByLabel(sides_of(distance, embeddings, labels, pairs, ref_emb, ref_labels))
    return ByIndex(*both_rows(distance, embeddings, ref_emb), as_pairs(pairs))


def as_pairs(indices: Any) -> tuple[Tensor, ...]:
    """Triplets (a, p, n) as pairs (a, p, a, n)."""
    return tuple(indices) if len(indices) == 4 else (*indices[:2], indices[0], indices[2])


def as_triplets(indices: Any) -> tuple[Tensor, ...]:
    """Pairs (a1, p, a2, n) as triplets: each positive pair with every negative of its anchor, in their order; O(T)."""
    if len(indices) == 3:
        return tuple(indices)
    a1, p, a2, n = indices
    by_anchor, order = torch.sort(a2, stable=True)
    first = torch.searchsorted(by_anchor, a1)
    count = torch.searchsorted(by_anchor, a1, right=True) - first
    pair = torch.arange(a1.shape[0], device=a1.device).repeat_interleave(count)
    place = torch.arange(pair.shape[0], device=a1.device) - (count.cumsum(0) - count)[pair]
    return a1[pair], p[pair], n[order[first[pair] + place]]


def matrix_of(distance: Any, embeddings: Tensor, ref_emb: Tensor) -> Tensor:
    """(B, N) a distance's matrix; theirs normalises a batch twice to compare it with itself."""
    if why_not_known(distance):
        return distance(embeddings, ref_emb)
    mat = distance.compute_mat(*both_rows(distance, embeddings, ref_emb))
    return mat if distance.power == 1 else mat**distance.power


def distances_at(distance: Any, embeddings: Tensor, ref_emb: Tensor, *pairs: tuple[Tensor, Tensor]) -> list[Tensor]:
    """(T,) entries of a distance's matrix, products or Euclidean distances, at lists of pairs that have one length."""
    x, y = both_rows(distance, embeddings, ref_emb)
    i, j = (torch.cat(both) for both in zip(*pairs))
    if distance.is_inverted:
        found = products_at(x, y, i, j)
    elif i.shape[0] * x.shape[1] > x.shape[0] * y.shape[0]:
        found = matrix_of(distance, embeddings, ref_emb)[i, j]
    else:
        found = -pair_similarity(take_rows(x, i), take_rows(y, j), Similarity.NEGATIVE_SQUARED_EUCLIDEAN)
        if distance.power == 1:  # whose gradient is 0 at 0
            found = torch.where(found > 0, found, 1.0).sqrt().where(found > 0, 0.0)
    return list(found.chunk(len(pairs)))


def products_at(x: Tensor, y: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """(T,) <x_i, y_j> of listed pairs, from whichever is smaller: both rows of every pair, or the products of all."""
    if i.shape[0] * x.shape[1] <= x.shape[0] * y.shape[0]:
        return pair_similarity(take_rows(x, i), take_rows(y, j), Similarity.DOT)
    return similarity_matrix(x, y, Similarity.DOT)[i, j]


def segment_log_sum_exp(values: Tensor, segment: Tensor, num_segments: int) -> Tensor:
    """log sum exp (S,) of the values (T,) of each segment; -inf for one without values, which gets no gradient."""
    largest = values.new_full((num_segments,), torch.finfo(values.dtype).min)
    largest.scatter_reduce_(0, segment, values.detach(), "amax")
    total = values.new_zeros(num_segments).index_add(0, segment, (values - largest[segment]).exp())
    return total.log() + largest


def _sum_of_positives(sides: Sides) -> tuple[Tensor, Tensor]:
    """For each row the sum (B, D) of its positives, and their number (B,)."""
    classes, group, sizes = torch.unique(sides.reference_labels.long(), return_inverse=True, return_counts=True)
    y = sides.y.to(accumulation_dtype(sides.y.dtype))
    sums = y.new_zeros(classes.shape[0], y.shape[1]).index_add(0, group, y)
    if sides.labels is sides.reference_labels and sides.self_index is not None:  # each row is its own reference
        return take_rows(sums, group) - y, sizes[group] - 1
    labels = sides.labels.long().contiguous()
    own = torch.searchsorted(classes, labels).clamp(max=classes.shape[0] - 1)
    total, count = take_rows(sums, own), torch.where(classes[own] == labels, sizes[own], 0)
    if sides.self_index is not None:
        total, count = total - take_rows(y, sides.self_index), count - 1
    return total, count
