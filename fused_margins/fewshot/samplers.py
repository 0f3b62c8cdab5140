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
        self.order, self.position = state["order"], state["position"]


class BalancedBatches:
    """Batches of `classes_per_batch` classes, `samples_per_class` samples each, repeated where a class is smaller.

    Example:
        >>> labels = torch.tensor([0, 0, 0, 1, 1, 1, 2])
        >>> sampler = BalancedBatches(labels, 2, 2, generator=torch.Generator().manual_seed(0))
        >>> torch.unique(labels[sampler.next_batch()], return_counts=True)[1]
        tensor([2, 2])
    """

    def __init__(
        self, labels: Tensor, classes_per_batch: int, samples_per_class: int, generator: torch.Generator
    ) -> None:
        self.members = [(labels == c).nonzero()[:, 0] for c in torch.unique(labels)]
        self.classes_per_batch = min(classes_per_batch, len(self.members))
        self.samples_per_class = samples_per_class
        self.num_batches = max(1, len(labels) // (self.classes_per_batch * samples_per_class))
        self.generator = generator

    def __len__(self) -> int:
        """Batches in an epoch: as many as show about as many images as there are."""
        return self.num_batches

    def next_batch(self) -> Tensor:
        """Indices of the next batch, class by class."""
        classes = torch.randperm(len(self.members), generator=self.generator)[: self.classes_per_batch]
        return torch.cat([self._draw(self.members[c]) for c in classes.tolist()])

    def _draw(self, members: Tensor) -> Tensor:
        if len(members) < self.samples_per_class:
            chosen = torch.randint(len(members), (self.samples_per_class,), generator=self.generator)
        else:
            chosen = torch.randperm(len(members), generator=self.generator)[: self.samples_per_class]
        return members[chosen]

    def state_dict(self) -> dict[str, Any]:
        return {}  # every batch is drawn anew

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


Sampler = ShuffledBatches | BalancedBatches
