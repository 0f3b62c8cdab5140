"""Which images make the next batch. A sampler's state, down to its place within the epoch, is part of a checkpoint; its
generator belongs to whoever gave it."""

from typing import Any

import torch
from torch import Tensor


class ShuffledBatches:
    """Every image once an epoch, in random order, in batches of nearly equal size.

    Example:
        >>> sampler = ShuffledBatches(10, batch_size=4, generator=torch.Generator().manual_seed(0))
        >>> [len(sampler.next_batch()) for _ in range(len(sampler))]
        [4, 3, 3]
    """

    def __init__(self, num_samples: int, batch_size: int, generator: torch.Generator) -> None:
        self.num_samples = num_samples
        # Equal sizes, because a last batch of one or two would spoil batch norm and mining.
        self.num_batches = -(-num_samples // batch_size)
        self.generator = generator
        self.order = torch.empty(0, dtype=torch.int64)
        self.position = self.num_batches

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self.num_batches

    def next_batch(self) -> Tensor:
        """Indices of the next batch; a new epoch begins by itself."""
        if self.position == self.num_batches:
            self.order, self.position = torch.randperm(self.num_samples, generator=self.generator), 0
        self.position += 1
        return self.order.tensor_split(self.num_batches)[self.position - 1]

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        order, position = state["order"], state["position"]
        _check_different(order, self.num_samples)
        if not isinstance(position, int) or not 0 <= position <= self.num_batches:
            raise ValueError(f"expected a position from 0 to {self.num_batches}, got {position!r}")
        if position < self.num_batches and len(order) < self.num_samples:
            raise ValueError(f"expected an order of {self.num_samples} samples, got {len(order)}")
        self.order, self.position = order, position


class Deck:
    """Numbers 0 .. size - 1 dealt in random order: each of them once before any comes again.

    Example:
        >>> deck, generator = Deck(3), torch.Generator().manual_seed(0)
        >>> sorted(deck.deal(2, generator).tolist() + deck.deal(1, generator).tolist())
        [0, 1, 2]
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.left = torch.empty(0, dtype=torch.int64)

    def deal(self, count: int, generator: torch.Generator) -> Tensor:
        """(count,) numbers; no repetition among them where there are enough."""
        hand, self.left = self.left[:count], self.left[count:]
        while len(hand) < count:
            fresh = torch.randperm(self.size, generator=generator)
            held = torch.isin(fresh, hand)
            fresh = torch.cat([fresh[~held], fresh[held]])  # what the hand holds already comes last
            missing = count - len(hand)
            hand, self.left = torch.cat([hand, fresh[:missing]]), fresh[missing:]
        return hand


class BalancedBatches:
    """Batches of `classes_per_batch` classes, `samples_per_class` samples each.

    Classes take turns, and so do the samples of a class: none comes again before all the others were there. A batch
    repeats a sample only where its class is smaller than `samples_per_class`.

    Example:
        >>> labels = torch.tensor([0, 0, 0, 1, 1, 1, 2])
        >>> sampler = BalancedBatches(labels, 2, 2, generator=torch.Generator().manual_seed(0))
        >>> torch.unique(labels[sampler.next_batch()], return_counts=True)[1]
        tensor([2, 2])
    """

    def __init__(
        self, labels: Tensor, classes_per_batch: int, samples_per_class: int, generator: torch.Generator
    ) -> None:
        by_class = labels.argsort(stable=True)
        self.members = by_class.split(torch.unique(labels, return_counts=True)[1].tolist())
        self.classes_per_batch = min(classes_per_batch, len(self.members))
        self.samples_per_class = samples_per_class
        self.num_batches = max(1, len(labels) // (self.classes_per_batch * samples_per_class))
        self.generator = generator
        self.classes = Deck(len(self.members))
        self.samples = [Deck(len(members)) for members in self.members]

    def __len__(self) -> int:
        """Batches in an epoch: as many as show about as many images as there are."""
        return self.num_batches

    def next_batch(self) -> Tensor:
        """Indices of the next batch, class by class."""
        chosen = self.classes.deal(self.classes_per_batch, self.generator).tolist()
        return torch.cat(
            [self.members[c][self.samples[c].deal(self.samples_per_class, self.generator)] for c in chosen]
        )

    def state_dict(self) -> dict[str, Any]:
        left = [deck.left for deck in (self.classes, *self.samples)]
        return {"left": torch.cat(left), "sizes": [len(numbers) for numbers in left]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        decks = (self.classes, *self.samples)
        for deck, left in zip(decks, state["left"].split(state["sizes"]), strict=True):
            _check_different(left, deck.size)
            deck.left = left


def _check_different(numbers: Tensor, size: int) -> None:
    """ValueError for what is left of a shuffled 0 .. size - 1 and cannot be."""
    if numbers.dtype != torch.int64 or len(numbers.unique()) != numbers.numel():
        raise ValueError("expected different integers in the order of samples")
    if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < size:
        raise ValueError(f"expected an order of {size} samples, got {int(numbers.min())} to {int(numbers.max())}")


Sampler = ShuffledBatches | BalancedBatches
