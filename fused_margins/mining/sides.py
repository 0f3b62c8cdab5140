"""Anchors and the references that they search; the references of a class as one run of a sorted order."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ..core import checks
from ..core.indices import IGNORED, UNADMITTED, check_index


class Sides(NamedTuple):
    """Both sides of a search, and which reference is the anchor itself; within a batch y is x."""

    x: Tensor  # (B, D) anchors
    y: Tensor  # (N, D) references
    labels: Tensor  # (B,)
    reference_labels: Tensor  # (N,)
    self_index: Tensor | None  # (B,) the reference that is the anchor itself, -1 for none


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
    """O((B + N) log N); there is at least one reference."""
    by_label, order = torch.sort(reference_labels.long(), stable=True)
    wanted = labels.long().contiguous()
    first = torch.searchsorted(by_label, wanted)
    last = torch.where(wanted == UNADMITTED, first, torch.searchsorted(by_label, wanted, right=True))
    if self_index is None:
        own = torch.full_like(first, -1)
    else:
        size = reference_labels.shape[0]
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
