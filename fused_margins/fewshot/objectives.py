"""What a training run optimises: which images make a batch, the loss of their embeddings, and who can run it.

A sampler's state, down to its place within the epoch, is part of a checkpoint; its generator belongs to who gave it.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import (
    ArcFaceLoss,
    CrossBatchMemory,
    EasyPositiveInfoNCELoss,
    EasyPositiveMarginLoss,
    EasyPositiveTripletLoss,
    MagnetBatch,
    MagnetIndex,
    MagnetLoss,
    MarginSoftmaxLoss,
)
from ..backends import registry
from ..mining.batches import Deck
from . import config
from .terminal import UserError

Call = tuple[str, tuple[tuple[str, str], ...]]  # an op, by a name that `fused_margins.explain` knows, and its options

SOFTMAX: Call = ("margin_softmax", ())
POSITIVES: Call = ("nearest", (("relation", "same"),))
NEGATIVES: Call = ("nearest", (("relation", "different"),))
ALL_NEGATIVES: Call = ("contrast", (("epilogue", "info_nce"),))
SAMPLE: Call = ("sample", ())
MAGNET: Call = ("magnet", ())
SIZES = (128, 256, 64)  # rows, columns and width of a usual problem


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


class Batch(NamedTuple):
    """Which images, and for the magnet loss which clusters they stand for."""

    indices: Tensor  # (B,), int64, on the CPU: into the training set
    clusters: MagnetBatch | None = None


class Objective(nn.Module):
    """A loss of embeddings and labels, on batches from a sampler.

    Its state dict holds the sampler as well, so that a restored objective goes on with the same batches.

    Args:
        loss: called with (embeddings, labels).
        labels: (N,), int64, of the whole training set.
        sampler: draws the indices of batches.
    """

    labels: Tensor

    def __init__(self, loss: nn.Module, labels: Tensor, sampler: Sampler) -> None:
        super().__init__()
        self.loss = loss
        self.sampler = sampler
        self.register_buffer("labels", labels, persistent=False)

    def num_batches(self, epoch: int) -> int:
        """Batches in this epoch."""
        return len(self.sampler)

    def steps_before(self, epoch: int) -> int:
        """Batches in all epochs before this one."""
        return epoch * self.num_batches(0)

    def start_epoch(self, epoch: int, embed: Callable[[], Tensor]) -> None:
        """Prepare an epoch; `embed()` gives the embeddings (N, D) of the whole training set."""

    def next_batch(self) -> Batch:
        return Batch(self.sampler.next_batch())

    def forward(self, embeddings: Tensor, batch: Batch) -> Tensor:
        """The loss (0-d) of a batch's embeddings (B, D)."""
        indices = batch.indices.to(self.labels.device)
        if isinstance(self.loss, CrossBatchMemory):
            return self.loss(embeddings, self.labels[indices], sample_ids=indices)
        return self.loss(embeddings, self.labels[indices])

    def classifier(self) -> MarginSoftmaxLoss | None:
        """The class weights that were trained along, if there are any."""
        return self.loss if isinstance(self.loss, MarginSoftmaxLoss) else None

    def get_extra_state(self) -> dict[str, Any]:
        return {"sampler": self.sampler.state_dict()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.sampler.load_state_dict(state["sampler"])


class MagnetObjective(Objective):
    """Magnet loss on batches of clusters; the first epochs train a softmax, which gives clusters a meaning."""

    def __init__(
        self,
        settings: config.Magnet,
        warm_loss: nn.Module,
        labels: Tensor,
        sampler: Sampler,
        generator: torch.Generator,
        backend: str,
    ) -> None:
        super().__init__(warm_loss, labels, sampler)
        self.settings = settings
        self.magnet = MagnetLoss(settings.alpha, settings.variance_floor, reduction="none", backend=backend)
        self.index = MagnetIndex(
            settings.clusters_per_class,
            variance_floor=settings.variance_floor,
            generator=generator,
            backend=backend,
        )
        self.warm = settings.warm_epochs > 0
        # One, and its neighbours of other classes, of which there may be fewer than asked for.
        of_others = (len(labels.unique()) - 1) * settings.clusters_per_class
        self.clusters_per_batch = min(settings.num_clusters, 1 + of_others)

    def num_batches(self, epoch: int) -> int:
        if epoch < self.settings.warm_epochs:
            return len(self.sampler)
        return max(1, len(self.labels) // (self.clusters_per_batch * self.settings.samples_per_cluster))

    def steps_before(self, epoch: int) -> int:
        warm_epochs = min(epoch, self.settings.warm_epochs)
        return warm_epochs * self.num_batches(0) + (epoch - warm_epochs) * self.num_batches(warm_epochs)

    def start_epoch(self, epoch: int, embed: Callable[[], Tensor]) -> None:
        since_warm = epoch - self.settings.warm_epochs
        self.warm = since_warm < 0
        if since_warm >= 0 and since_warm % self.settings.refresh_epochs == 0:
            self.index.fit(embed(), self.labels)

    def next_batch(self) -> Batch:
        if self.warm:
            return super().next_batch()
        clusters = self.index.sample_batch(self.settings.num_clusters, self.settings.samples_per_cluster)
        return Batch(clusters.indices.cpu(), clusters)

    def forward(self, embeddings: Tensor, batch: Batch) -> Tensor:
        if batch.clusters is None:
            return super().forward(embeddings, batch)
        losses = self.magnet(embeddings, batch.clusters.clusters, batch.clusters.cluster_labels)
        self.index.update_losses(batch.clusters, losses.detach())
        return losses.mean()

    def classifier(self) -> None:
        return None

    def get_extra_state(self) -> dict[str, Any]:
        return super().get_extra_state() | {"warm": self.warm}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        super().set_extra_state(state)
        self.warm = state["warm"]


def build_objective(
    settings: config.TrainConfig, size: int, labels: Tensor, num_classes: int, generator: torch.Generator
) -> Objective:
    """The objective that `settings` describe, of embeddings of this size and a training set with these labels."""
    loss, backend = settings.loss, settings.backend
    sampler: Sampler
    if settings.samples_per_class is None:
        sampler = ShuffledBatches(len(labels), settings.batch_size, generator)
    else:
        classes = settings.batch_size // settings.samples_per_class
        if classes < 2:
            raise UserError(
                f"samples_per_class: expected at most half of the {settings.batch_size} images of a batch, which is of "
                f"two classes at least, got {settings.samples_per_class}"
            )
        sampler = BalancedBatches(labels, classes, settings.samples_per_class, generator)
        _check_batch("samples_per_class", sampler.classes_per_batch, "classes", settings.samples_per_class, labels)
    if isinstance(loss, config.Magnet):
        if loss.warm_epochs >= settings.epochs:
            raise UserError(f"warm_epochs: expected fewer than the {settings.epochs} epochs, got {loss.warm_epochs}")
        warm_loss = MarginSoftmaxLoss(num_classes, size, scale=loss.scale, backend=backend)
        objective = MagnetObjective(loss, warm_loss, labels, sampler, generator, backend)
        _check_batch("samples_per_cluster", objective.clusters_per_batch, "clusters", loss.samples_per_cluster, labels)
        return objective
    return Objective(_build_loss(loss, num_classes, size, backend, generator), labels, sampler)


def _check_batch(name: str, parts: int, kind: str, samples: int, labels: Tensor) -> None:
    """Refuse a batch that must hold images twice because it has more of them than there are."""
    if parts * samples > len(labels):
        raise UserError(
            f"{name}: expected at most {len(labels) // parts}, of which {parts} {kind} fill a batch "
            f"from {len(labels)} images, got {samples}"
        )


def _build_loss(loss: config.Loss, num_classes: int, size: int, backend: str, generator: torch.Generator) -> nn.Module:
    """The module of a loss; the settings have the names of what it takes."""
    settings = loss.model_dump(exclude={"name", "memory"})
    pairs: EasyPositiveTripletLoss | EasyPositiveMarginLoss | EasyPositiveInfoNCELoss
    match loss:
        case config.Softmax() | config.MarginSoftmax() | config.CosFace() | config.ArcFace():
            head = ArcFaceLoss if isinstance(loss, config.ArcFace) else MarginSoftmaxLoss
            return head(num_classes, size, backend=backend, **settings)
        case config.Triplet():
            pairs = EasyPositiveTripletLoss(**settings, backend=backend, generator=generator)
        case config.MarginLoss():
            pairs = EasyPositiveMarginLoss(num_classes, **settings, backend=backend, generator=generator)
        case config.InfoNCE():
            pairs = EasyPositiveInfoNCELoss(**settings, backend=backend, generator=generator)
        case _:
            raise TypeError(f"loss: no module for {type(loss).__name__}")
    return CrossBatchMemory(pairs, size, loss.memory) if loss.memory else pairs


def calls_of(loss: config.Loss) -> tuple[Call, ...]:
    """What a training with this loss calls.

    >>> calls_of(config.Triplet(positives="easy", negatives="random"))
    (('nearest', (('relation', 'same'),)),)
    """
    match loss:
        case config.Softmax() | config.MarginSoftmax() | config.CosFace() | config.ArcFace():
            return (SOFTMAX,)
        case config.Magnet():  # its index: k-means within classes, nearest clusters of other classes
            return (*([SOFTMAX] if loss.warm_epochs else []), MAGNET, POSITIVES, NEGATIVES)
    calls = [POSITIVES] if loss.positives in ("easy", "hard") else []
    if loss.negatives in ("hard", "semihard"):
        calls.append(NEGATIVES)
    elif loss.negatives in ("all", "distance-weighted"):
        calls.append(ALL_NEGATIVES if loss.negatives == "all" else SAMPLE)
    return tuple(calls)


def problems(
    calls: Iterable[Call], device: str, rows: int = SIZES[0], columns: int = SIZES[1], width: int = SIZES[2]
) -> list[registry.Problem]:
    def problem(op: str, options: dict[str, Any]) -> registry.Problem:
        return registry.problem(op, rows=rows, columns=columns, width=width, device=device, **options)

    return [problem(op, dict(options)) for op, options in calls]


def available(device: str, calls: Iterable[Call]) -> list[str]:
    """Backends other than the reference that can run all these calls on this device."""
    wanted = problems(calls, device)
    return [
        backend.name
        for backend in registry.BACKENDS
        if backend.name != "reference" and all(registry.refusal(backend, p) is None for p in wanted)
    ]


def of_all(device: str, losses: Iterable[config.Loss]) -> list[str]:
    """Those that can be trained on with every one of the losses."""
    return available(device, {call for loss in losses for call in calls_of(loss)})
