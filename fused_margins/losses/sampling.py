"""Positives and negatives drawn at random, and all positives; the nearest ones are in `fused_margins.functional`."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.draw import draw
from ..ops.labels import IGNORED, check_index


class _Runs(NamedTuple):
    """The references sorted by label: a class is one run. Of each anchor: the run of its class, and its own place."""

    order: Tensor  # (N,) references in that order
    first: Tensor  # (B,) where the run begins
    size: Tensor  # (B,) its length, with the anchor itself where it is among the references
    own: Tensor  # (B,) place of the anchor itself, -1 where there is none
    own_inside: Tensor  # (B,) bool: that place is in the run

    def mate(self, i: Tensor, anchor: Tensor | None = None) -> Tensor:
        """Reference number i of the anchor's class, itself not counted; `anchor` says whose."""
        first, own, inside = (t if anchor is None else t[anchor] for t in (self.first, self.own, self.own_inside))
        place = first + i
        place = place + (inside & (place >= own)).long()  # the run without the anchor closes up by one
        return self.order[place.clamp(max=self.order.shape[0] - 1)]


def _runs(labels: Tensor, reference_labels: Tensor, self_index: Tensor | None) -> _Runs:
    """O((B + N) log N); there is at least one reference."""
    by_label, order = torch.sort(reference_labels.long(), stable=True)
    wanted = labels.long().contiguous()
    first = torch.searchsorted(by_label, wanted)
    last = torch.searchsorted(by_label, wanted, right=True)
    if self_index is None:
        own = torch.full_like(first, -1)
    else:
        size = reference_labels.shape[0]
        place = torch.empty_like(order).scatter_(0, order, torch.arange(size, device=order.device))
        self_index = check_index(self_index, size, IGNORED, "self_index")
        own = torch.where(self_index >= 0, place[self_index.clamp(min=0)], -1)
    return _Runs(order, first, last - first, own, (own >= first) & (own < last))


def random_positives(
    labels: Tensor, reference_labels: Tensor, self_index: Tensor | None, generator: torch.Generator | None = None
) -> Tensor:
    """For each anchor a reference of its class, drawn uniformly; O((B + N) log N), no B x N matrix.

    Args:
        labels: (B,) integers. reference_labels: (N,) integers.
        self_index: (B,) the reference that is the anchor and is never drawn, -1 for none; None for none anywhere.
        generator: draws the numbers; None for torch's global one.

    Returns:
        index (B,) int64, -1 for an anchor alone in its class.

    >>> import torch
    >>> labels = torch.tensor([3, 5, 3])
    >>> random_positives(labels, labels, self_index=torch.arange(3))
    tensor([ 2, -1,  0])
    """
    if reference_labels.shape[0] == 0:
        return torch.full_like(labels, -1, dtype=torch.int64)
    runs = _runs(labels, reference_labels, self_index)
    count = runs.size - runs.own_inside.long()
    return torch.where(count > 0, runs.mate(_below(count, generator)), -1)


def all_positives(labels: Tensor, reference_labels: Tensor, self_index: Tensor | None) -> tuple[Tensor, Tensor]:
    """Every pair of an anchor and another reference of its class: P pairs, the sum over anchors of their mates.

    Within a batch P = sum_c n_c (n_c - 1). Its number depends on the labels' values, so that a GPU synchronises once.

    Args:
        labels, reference_labels, self_index: as for `random_positives`.

    Returns:
        anchor (P,), ascending, and positive (P,), ascending for each anchor, int64.

    >>> import torch
    >>> labels = torch.tensor([3, 5, 3, 3])
    >>> all_positives(labels, labels, self_index=torch.arange(4))
    (tensor([0, 0, 2, 2, 3, 3]), tensor([2, 3, 0, 3, 0, 2]))
    """
    if reference_labels.shape[0] == 0:
        return labels.new_empty(0, dtype=torch.int64), labels.new_empty(0, dtype=torch.int64)
    runs = _runs(labels, reference_labels, self_index)
    count = runs.size - runs.own_inside.long()
    anchor = torch.arange(labels.shape[0], device=labels.device).repeat_interleave(count)
    i = torch.arange(anchor.shape[0], device=labels.device) - (count.cumsum(0) - count)[anchor]
    return anchor, runs.mate(i, anchor)


def random_negatives(
    labels: Tensor, reference_labels: Tensor, self_index: Tensor | None, generator: torch.Generator | None = None
) -> Tensor:
    """For each anchor a reference of another class, drawn uniformly; O((B + N) log N), no B x N matrix.

    Args:
        labels, reference_labels, self_index, generator: as for `random_positives`.

    Returns:
        index (B,) int64, -1 where every reference is of the anchor's class.

    >>> import torch
    >>> labels = torch.tensor([3, 5, 3])
    >>> random_negatives(labels[:2], labels[:2], None)
    tensor([1, 0])
    """
    size = reference_labels.shape[0]
    if size == 0:
        return torch.full_like(labels, -1, dtype=torch.int64)
    runs = _runs(labels, reference_labels, self_index)
    own_outside = (runs.own >= 0) & ~runs.own_inside  # of another label than the anchor, and still not its negative
    count = size - runs.size - own_outside.long()
    place = _below(count, generator)
    # The order without the run and without the anchor closes up: open it again where each of them was.
    own = torch.where(runs.own >= runs.first, runs.own - runs.size, runs.own)
    place = place + (own_outside & (place >= own)).long()
    place = place + torch.where(place >= runs.first, runs.size, 0)
    return torch.where(count > 0, runs.order[place.clamp(max=size - 1)], -1)


def distance_weighted_negatives(
    embeddings: Tensor,
    labels: Tensor,
    reference_embeddings: Tensor,
    reference_labels: Tensor,
    generator: torch.Generator | None = None,
    backend: str = "auto",
    self_index: Tensor | None = None,
) -> Tensor:
    """For each anchor a reference of another class, drawn so that its distance d is spread evenly over its range.

        P(j) proportional to 1 / q(max(d_ij, 0.5)) where d_ij < 1.4
        log q(d) = (D - 2) log d + (D - 3)/2 log(1 - d^2 / 4)

    d is the distance of directions, q its density between random points of the unit sphere in D dimensions. A row whose
    negatives all lie beyond 1.4 draws uniformly among them. See `fused_margins.ops.draw` for how it draws.

    Args:
        embeddings: (B, D) of any length: their directions count. labels: (B,) integers.
        reference_embeddings, reference_labels: (N, D) and (N,).
        generator: draws a seed, of which all numbers follow; None for torch's global one.
        backend: "auto", or the name of one; see `fused_margins.explain`.
        self_index: (B,) the reference that is the anchor and is never drawn, -1 for none; None for none anywhere.

    Returns:
        index (B,) int64, -1 for an anchor without a negative. Not differentiable.

    Source: Wu et al., Sampling matters in deep embedding learning, 2017, distance weighted sampling.

    >>> import torch
    >>> x = torch.eye(3)
    >>> distance_weighted_negatives(x[:1], torch.tensor([0]), x, torch.tensor([0, 1, 0]))
    tensor([1])
    """
    source = labels.device if generator is None else generator.device
    seed = torch.randint(1 << 32, (), generator=generator, device=source).to(labels.device)
    sides = (embeddings, reference_embeddings, labels, reference_labels)
    return draw(*sides, seed, self_index=self_index, backend=backend)


def _below(count: Tensor, generator: torch.Generator | None) -> Tensor:
    """One whole number in [0, count) for each count; 0 where it is 0."""
    drawn = (_uniform(count.shape, count.device, generator) * count).long()
    return torch.minimum(drawn, count - 1).clamp(min=0)  # the product may round up to the count


def _uniform(shape: torch.Size, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """float32 in [0, 1); a generator draws on its own device, so that a CPU generator serves any."""
    source = device if generator is None else generator.device
    return torch.rand(shape, generator=generator, device=source).to(device)
