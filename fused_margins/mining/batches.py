"""Batches in which classes come more than once, and what a batch lacks."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Sampler

from ..core import checks
from .sides import check_labels, runs_of


class Lacking(NamedTuple):
    """Anchors without a positive, and those without a negative: (B,) bool each. As a text it counts them."""

    positive: Tensor
    negative: Tensor

    def __str__(self) -> str:
        of = f"of {self.positive.shape[0]} anchors"
        return f"{int(self.positive.sum())} {of} have no positive, {int(self.negative.sum())} no negative"


def batch_lacks(labels: Tensor, reference_labels: Tensor | None = None, self_index: Tensor | None = None) -> Lacking:
    """Which anchors have no positive, or no negative: they have no loss, and say nothing of it.

        positive_i = not exists j != i: label_j = label_i,   negative_i = not exists j: label_j != label_i

    Args:
        labels: (B,) integers, of the anchors.
        reference_labels: (N,) integers; by default the batch is its own reference.
        self_index: (B,) the reference that is the anchor itself, -1 for none; by default, within the batch, its place.

    Returns:
        `positive` and `negative`, (B,) bool; O((B + N) log N).

    Raises:
        ValueError, TypeError: shapes, dtypes, devices.

    >>> import torch
    >>> from fused_margins.mining import batch_lacks
    >>> lacking = batch_lacks(torch.tensor([4, 4, 7]))
    >>> print(lacking)
    1 of 3 anchors have no positive, 0 no negative
    >>> lacking.positive
    tensor([False, False,  True])
    """
    if reference_labels is None:
        reference_labels = labels
        if self_index is None and isinstance(labels, Tensor) and labels.dim() == 1:
            self_index = torch.arange(labels.shape[0], device=labels.device)
    check_labels(labels, reference_labels, self_index)
    if not reference_labels.shape[0]:
        return Lacking(*torch.ones(2, labels.shape[0], dtype=torch.bool, device=labels.device))
    runs = runs_of(labels, reference_labels, self_index)
    return Lacking(runs.positives() == 0, runs.negatives() == 0)


class Deck:
    """Numbers 0 .. size - 1 dealt in random order: each of them once before any comes again.

    >>> deck, generator = Deck(3), torch.Generator().manual_seed(0)
    >>> sorted(deck.deal(2, generator).tolist() + deck.deal(1, generator).tolist())
    [0, 1, 2]
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.left = torch.empty(0, dtype=torch.int64)

    def deal(self, count: int, generator: torch.Generator | None) -> Tensor:
        """(count,) numbers; no repetition among them where there are enough."""
        hand, self.left = self.left[:count], self.left[count:]
        while len(hand) < count:
            fresh = torch.randperm(self.size, generator=generator)
            held = torch.isin(fresh, hand)
            fresh = torch.cat([fresh[~held], fresh[held]])  # what the hand holds already comes last
            missing = count - len(hand)
            hand, self.left = torch.cat([hand, fresh[:missing]]), fresh[missing:]
        return hand


class ClassBalancedBatches(Sampler[list[int]]):
    """Batches of P classes with K samples each, so that a loss on pairs finds positives; for a DataLoader.

    Classes take turns, and so do the samples of a class: none comes again before all others were there. A class of
    fewer than K samples gives those that it has, once each: one twice in a batch would be its own nearest positive.

    Args:
        labels: (N,) integers, of the whole data set.
        classes_per_batch: P, at least 2 and at most the number of classes.
        samples_per_class: K, at least 2.
        num_batches: of an epoch; by default N / (P K), at least one.
        generator: draws the numbers; None for torch's global one.

    Iterated over it gives lists of at most P K indices, class by class; its length is the number of batches.

    Raises:
        ValueError, TypeError: labels that are no vector of integers, numbers out of range.

    Source: Hermans et al., In defense of the triplet loss for person re-identification, 2017, section 2, PK batches.

    >>> import torch
    >>> from fused_margins import ClassBalancedBatches
    >>> labels = torch.tensor([0, 0, 0, 1, 1, 1, 2])
    >>> batches = ClassBalancedBatches(labels, 2, 2, generator=torch.Generator().manual_seed(0))
    >>> [labels[batch].tolist() for batch in batches]
    [[2, 0, 0]]
    >>> loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(labels), batch_sampler=batches)
    """

    def __init__(
        self,
        labels: Tensor,
        classes_per_batch: int,
        samples_per_class: int,
        *,
        num_batches: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        check_labels(labels, labels, None)
        by_class = labels.long().cpu().argsort(stable=True)
        sizes = torch.unique(labels, return_counts=True)[1].tolist()
        self.members = by_class.split(sizes)
        if len(sizes) < 2:
            raise ValueError(f"labels: expected two classes or more, got {len(sizes)}")
        self.classes_per_batch = checks.integer("classes_per_batch", classes_per_batch, 2, len(sizes))
        self.samples_per_class = checks.integer("samples_per_class", samples_per_class, 2)
        usual = max(1, labels.shape[0] // (self.classes_per_batch * self.samples_per_class))
        self.num_batches = usual if num_batches is None else checks.integer("num_batches", num_batches, 1)
        self.generator = checks.generator(generator)

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        classes, samples = Deck(len(self.members)), [Deck(len(members)) for members in self.members]
        for _ in range(self.num_batches):
            batch: list[int] = []
            for c in classes.deal(self.classes_per_batch, self.generator).tolist():
                members = self.members[c]
                dealt = samples[c].deal(min(self.samples_per_class, len(members)), self.generator)
                batch += members[dealt].tolist()
            yield batch
