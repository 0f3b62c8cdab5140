"""Anchors and the references that they search; the references of a class as one run of a sorted order."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ..core import checks
from ..core.enums import Relation, Similarity
from ..core.indices import IGNORED, UNADMITTED, check_index
from ..core.similarity import accumulation_dtype, pair_similarity, take_rows, unit_rows
from ..ops.contrast.op import Contrast, contrast
from ..ops.nearest.op import Nearest, nearest


class Sides(NamedTuple):
    """Both sides of a search, and which reference is the anchor itself; within a batch y is x.

    The methods are all that a loss on pairs asks of the references. Whoever answers them likewise need not have all
    references in one place.
    """

    x: Tensor  # (B, D) anchors
    y: Tensor  # (N, D) references
    labels: Tensor  # (B,)
    reference_labels: Tensor  # (N,)
    self_index: Tensor | None  # (B,) the reference that is the anchor itself, -1 for none

    def nearest(
        self,
        similarity: Similarity,
        relation: Relation,
        backend: str,
        *,
        below: Tensor | None = None,
        largest: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Similarity (B,) and index (B,) of the most similar reference of the relation, or the least similar one.

        -inf and -1 where there is none, or none below (B,). No gradient.
        """
        search = Nearest(*self, below, similarity, relation, 1, largest)
        value, index = nearest.run(search, backend, CALLED, valid=False)
        return value.squeeze(1), index.squeeze(1)

    def pairs(self, anchor: Tensor | None, reference: Tensor, similarity: Similarity) -> Tensor:
        """Similarity (P,) of anchors, None for each in its place, with references; of index -1, with any."""
        x = self.x if anchor is None or not self.x.shape[0] else take_rows(self.x, anchor)
        return pair_similarity(x, take_rows(self.y, reference), similarity)

    def log_sum_exp(self, relation: Relation, scale: float, backend: str, *, sign: int = 1) -> Tensor:
        """(B,) of scale sign u_ij over the references of that relation, u the cosine; -inf for none."""
        if not self.y.shape[0]:
            return self.x.to(accumulation_dtype(self.x.dtype)).sum(1) * 0 - torch.inf  # with a gradient, of 0
        target = torch.zeros_like(self.labels, dtype=torch.int64)  # any will do
        labels = self.labels, self.reference_labels, self.self_index
        call = Contrast(self.x if sign > 0 else -self.x, self.y, target, *labels, scale, relation=relation)
        return contrast.run(call, backend, valid=False)[1]

    def sum_of_positives(self) -> Tensor:
        """Sum (B,) of each anchor's cosines with its positives: a product with their sum, so that no matrix is made."""
        dtype, (columns, width) = accumulation_dtype(self.x.dtype), self.y.shape
        if not columns:
            return self.x.to(dtype).sum(1) * 0
        x = unit_rows(self.x.to(dtype))
        y = x if self.y is self.x else unit_rows(self.y.to(dtype))
        runs = runs_of(self.labels, self.reference_labels, self.self_index)
        # A class is a run of the references sorted by label, and the place where it begins is its number.
        number = runs_of(self.reference_labels, self.reference_labels, None).first
        total = take_rows(y.new_zeros(columns, width).index_add(0, number, y), runs.first)
        total = torch.where((runs.size > 0)[:, None], total, 0.0)
        if self.self_index is not None:
            total = total - torch.where(runs.own_inside[:, None], take_rows(y, self.self_index), 0.0)
        with torch.autocast(x.device.type, enabled=False):
            return (x * total).sum(1)

    def not_finite(self, similarity: Similarity) -> Tensor:
        """0, or NaN where an anchor is not finite; all NaN (or 0-d, within a batch) where a reference is not."""
        found = zero_or_nan(self.x, self.labels, similarity)
        if self.y is self.x:
            return found.sum()
        return found + zero_or_nan(self.y, self.reference_labels, similarity).sum()


def zero_or_nan(t: Tensor, labels: Tensor, similarity: Similarity) -> Tensor:
    """(B,) NaN for a row that is not finite or has similarities that are not, else 0; in the accumulation dtype.

    Labels (B,) that no relation admits make it 0.
    """
    t, dtype = t.detach(), accumulation_dtype(t.dtype)
    if similarity == Similarity.COSINE:
        found = (t * 0).sum(1, dtype=dtype)
    else:  # no distance is above the sum of two lengths
        found = (2 * torch.linalg.vector_norm(t, dim=1, dtype=dtype)).square() * 0
    return torch.where(labels.long() == UNADMITTED, 0.0, found)


CALLED = {
    "x": "embeddings",
    "y": "reference_embeddings",
    "row_labels": "labels",
    "column_labels": "reference_labels",
}  # by who searches: the fields of `nearest`


def sides_of(
    embeddings: Tensor,
    labels: Tensor,
    reference_embeddings: Tensor | None,
    reference_labels: Tensor | None,
    self_index: Tensor | None,
) -> Sides:
    """Both sides of a search; within the batch every anchor is its own reference. What searches them checks them."""
    if (reference_embeddings is None) != (reference_labels is None):
        raise ValueError("reference_embeddings and reference_labels: expected both or neither")
    if reference_embeddings is not None and reference_labels is not None:
        return Sides(embeddings, reference_embeddings, labels, reference_labels, self_index)
    if self_index is None:
        if not isinstance(embeddings, Tensor) or embeddings.dim() != 2:
            checks.matrices(embeddings, embeddings, ("embeddings", "embeddings"))
        rows, device = embeddings.shape[0], embeddings.device
        itself = torch.arange if torch.compiler.is_compiling() else _arange
        self_index = itself(rows, device=device)
    return Sides(embeddings, embeddings, labels, labels, self_index)


@functools.lru_cache(maxsize=8)
def _arange(size: int, device: torch.device) -> Tensor:
    """0 ... size - 1, which nobody writes to."""
    with torch.inference_mode(False):
        return torch.arange(size, device=device)


def check_sides(
    embeddings: Tensor,
    labels: Tensor,
    reference_embeddings: Tensor | None,
    reference_labels: Tensor | None,
    self_index: Tensor | None,
) -> Sides:
    """`sides_of`, checked here, for who looks at them before a search does."""
    sides = sides_of(embeddings, labels, reference_embeddings, reference_labels, self_index)
    checks.matrices(sides.x, sides.y, ("embeddings", "reference_embeddings"))
    checks.labels("labels", labels, sides.x.shape[0], sides.x)
    checks.labels("reference_labels", reference_labels, sides.y.shape[0], sides.x, optional=True)
    checks.labels("self_index", self_index, sides.x.shape[0], sides.x, optional=True)
    return sides


class Runs(NamedTuple):
    """The references sorted by label: a class is one run. Of each anchor: the run of its class, and its own place."""

    order: Tensor  # (N,) references in that order
    first: Tensor  # (B,) where the run begins
    size: Tensor  # (B,) its length, with the anchor itself where it is among the references
    own: Tensor  # (B,) place of the anchor itself, -1 where there is none
    own_inside: Tensor  # (B,) bool: that place is in the run
    unadmitted: Tensor  # 0-d: references that no anchor may have; the order begins with them

    def positives(self) -> Tensor:
        """(B,) how many references of the anchor's class there are beside itself."""
        return self.size - self.own_inside.long()

    def negatives(self) -> Tensor:
        """(B,) how many references of other classes there are; the anchor is none, whatever its reference's label."""
        return self.order.shape[0] - self.unadmitted - self.size - self.own_outside().long()

    def own_outside(self) -> Tensor:
        """(B,) bool: of another label than the anchor, and still not its negative."""
        return (self.own >= self.unadmitted) & ~self.own_inside

    def mate(self, i: Tensor, anchor: Tensor | None = None) -> Tensor:
        """Reference number i of the anchor's class, itself not counted; `anchor` says whose."""
        first, own, inside = (t if anchor is None else t[anchor] for t in (self.first, self.own, self.own_inside))
        place = first + i
        place = place + (inside & (place >= own)).long()  # the run without the anchor closes up by one
        return self.order[place.clamp(max=self.order.shape[0] - 1)]


def check_labels(labels: Tensor, reference_labels: Tensor, self_index: Tensor | None) -> None:
    """For who looks at no embeddings."""
    for name, t in (("labels", labels), ("reference_labels", reference_labels)):
        is_vector = isinstance(t, Tensor) and not t.is_nested and t.dim() > 0
        checks.labels(name, t, t.shape[0] if is_vector else 0, labels)
    checks.labels("self_index", self_index, labels.shape[0], labels, optional=True)
    if labels.is_meta:
        raise TypeError("labels: expected a tensor with data, got one on the meta device")


def runs_of(labels: Tensor, reference_labels: Tensor, self_index: Tensor | None) -> Runs:
    """O((B + N) log N)."""
    by_label, order = torch.sort(reference_labels.long(), stable=True)
    wanted = labels.long().contiguous()
    first = torch.searchsorted(by_label, wanted)
    last = torch.where(wanted == UNADMITTED, first, torch.searchsorted(by_label, wanted, right=True))
    size = reference_labels.shape[0]
    if self_index is None or not size:
        own = torch.full_like(first, -1)
    else:
        place = torch.empty_like(order).scatter_(0, order, torch.arange(size, device=order.device))
        self_index = check_index(self_index, size, IGNORED, "self_index")
        own = torch.where(self_index >= 0, place[self_index.clamp(min=0)], -1)
    unadmitted = (by_label == UNADMITTED).sum()
    return Runs(order, first, last - first, own, (own >= first) & (own < last), unadmitted)


def below(count: Tensor, generator: torch.Generator | None) -> Tensor:
    """One integer in [0, count) for each count; 0 where it is 0."""
    drawn = (_uniform(count.shape, count.device, generator) * count).long()
    return torch.minimum(drawn, count - 1).clamp(min=0)  # the product may round up to the count


def _uniform(shape: torch.Size, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """float32 in [0, 1); a generator draws on its own device, so that a CPU generator serves any."""
    source = device if generator is None else generator.device
    # torch.rand(generator=) takes no sizes that are symbols: each batch would compile anew.
    return torch.empty(shape, device=source).uniform_(generator=generator).to(device)
