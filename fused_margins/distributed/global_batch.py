"""Losses and miners on the pairs of the global batch: each rank takes its own rows as anchors, the rows of all ranks as
positives and negatives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.func import functional_call

from .. import functional
from ..core import checks
from ..core.enums import Reduction
from ..core.ranks import Own, together
from ..losses.cross_batch_memory import CrossBatchMemory
from ..losses.easy_positive import EasyPositiveLoss, RowLosses
from ..mining.sides import Sides, check_sides
from .collectives import gather_rows, num_ranks, own_rank, scale_gradient, share, sum_over_ranks
from .ring import Ring

__all__ = ["GlobalBatchLoss", "mine_negatives", "mine_positives"]

_MAY_DIFFER = ("training", "backend", "generator")


class GlobalBatchLoss(nn.Module):
    """A loss on pairs over the batches of all ranks: loss and gradients are those of one process that has them all.

        loss = sum_r sum_i loss_ri / sum_r sum_i weight_ri,   anchors i of rank r, references of all ranks

    Each rank compares its own B_r rows with the B rows of all ranks, B_r x B pairs: a positive on another rank is
    found, and no anchor finds itself. Ranks may have different numbers of rows, or none.

    Args:
        loss: `EasyPositiveTripletLoss`, `EasyPositiveMarginLoss`, `EasyPositiveInfoNCELoss`, `NTXentLoss`, `SupConLoss`
            or `MultiSimilarityLoss`; or a `CrossBatchMemory` of one of them, which then remembers the rows of all ranks
            in their order and is the same on every rank. Its options are the same on all ranks.
        gather: True collects all rows on every rank, O(B D) memory. False lets them travel from rank to rank, one
            rank's rows at a time: O(B_r D) and the B labels; gradients have no second derivative then. Not for a
            memory, for "distance-weighted" negatives, whose draw takes all distances at once, and for "all" positives
            whose pairs have a negative each ("semihard", "random").
        group: the process group, None for all ranks.
        embedding_gradient_scale: a factor of the gradient of the embeddings. DDP and FSDP divide the gradients of a
            backbone by the number of ranks whose data it sees: given here, that number undoes it.
        equal_batches: True is a promise that every rank calls with as many rows, of one dtype: nothing is compared in
            a step, and the host of a GPU waits for no count.

    Call: loss(embeddings (B_r, D), labels (B_r,) integers, sample_ids (B_r,) of a memory or None) gives the mean over
    the anchors or pairs of all ranks that count, the same on every rank; "sum" likewise, and "none" the losses of the
    own rows.

    What is drawn at random is drawn by each rank for its own anchors, by the generator it has: the choices have the
    distribution of one process, not its numbers. Without a process group, and in one of a single rank, the call is that
    of the loss.

    Raises:
        ValueError, TypeError, IndexError: on all ranks, with the number of the first rank that has the error: as the
            loss; options that differ, when it is made; dtypes, widths and arguments that differ, in a call.

    Gradients: embeddings, as anchors here and as references on all ranks; a learnt beta, summed over ranks, so that it
    stays the same on all. The gradient that comes in must be the same on all ranks. A loss that learns stays outside of
    DDP.

    Source: that each rank compares its own rows with gathered ones is the "local loss" of Ilharco et al., OpenCLIP,
    2021; see the losses for theirs.

    >>> import torch
    >>> from fused_margins import SupConLoss
    >>> from fused_margins.distributed import GlobalBatchLoss
    >>> loss = GlobalBatchLoss(SupConLoss(temperature=0.5))
    >>> loss(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]), torch.tensor([0, 0, 1]))  # no process group
    tensor(0.5881)
    """

    def __init__(
        self,
        loss: EasyPositiveLoss | CrossBatchMemory,
        *,
        gather: bool = True,
        group: dist.ProcessGroup | None = None,
        embedding_gradient_scale: float = 1.0,
        equal_batches: bool = False,
    ) -> None:
        super().__init__()
        self.loss, self.group = loss, group
        self.gather, self.equal_batches = gather, equal_batches
        self.embedding_gradient_scale = embedding_gradient_scale
        with together("GlobalBatchLoss", group) as own:
            kinds = [type(part).__name__ for part in (loss, getattr(loss, "loss", None)) if part is not None]
            if not isinstance(loss, EasyPositiveLoss | CrossBatchMemory):
                raise TypeError(f"loss: expected one of the losses on pairs of a batch, got {type(loss).__name__}")
            checks.finite_number("embedding_gradient_scale", embedding_gradient_scale)
            checks.flag("equal_batches", equal_batches)
            if not checks.flag("gather", gather):
                _check_travels(loss)
            own.same = {"loss": " of ".join(kinds), "gather": gather, "equal_batches": equal_batches}
            own.same |= _options(self._pairs)
            if isinstance(loss, CrossBatchMemory):
                own.same["size"] = tuple(loss.embeddings.shape)

    @property
    def _pairs(self) -> EasyPositiveLoss:
        """The loss on pairs, of which a memory has one inside."""
        return self.loss.loss if isinstance(self.loss, CrossBatchMemory) else self.loss

    def forward(self, embeddings: Tensor, labels: Tensor, sample_ids: Tensor | None = None) -> Tensor:
        memory = self.loss if isinstance(self.loss, CrossBatchMemory) else None
        ranks = num_ranks(self.group)
        if ranks == 1:
            scaled = scale_gradient(embeddings, self.embedding_gradient_scale)
            if memory is not None:
                return memory(scaled, labels, sample_ids)
            _check_no_ids(sample_ids)
            return self.loss(scaled, labels)
        counts = self._counts(memory, embeddings, labels, sample_ids)
        x = scale_gradient(embeddings, self.embedding_gradient_scale)
        labels, first = labels.long(), sum(counts[: own_rank(self.group)])
        every_label = gather_rows(labels, counts, self.group)
        if not self.gather:
            own = self._pairs._sides(x, labels, None, None, None)
            ring = Ring(own.x, labels, every_label, counts, self.group)
            return self._reduced(cast(Sides, ring), own.x)
        every = gather_rows(x, counts, self.group)
        itself = torch.arange(len(every), device=x.device)
        references = every, every_label, itself
        if memory is not None:
            every_id = None if sample_ids is None else gather_rows(sample_ids.long(), counts, self.group)
            references = memory._references(every, every_label, every_id)
        all_rows, all_labels, itself = references
        own = self._pairs._sides(x, labels, all_rows, all_labels, itself[first : first + len(x)])
        value = self._reduced(own, every)
        if memory is not None and self.training:
            memory._remember(every.detach(), every_label, every_id)
        return value

    def _counts(
        self, memory: CrossBatchMemory | None, embeddings: Tensor, labels: Tensor, sample_ids: Tensor | None
    ) -> tuple[int, ...]:
        """Rows of each rank; an error of one rank is raised on all."""
        with together("forward", self.group, not self.equal_batches) as own:
            _say(own, embeddings, labels)
            self._pairs._check_labels(labels)
            if memory is None:
                _check_no_ids(sample_ids)
            else:
                memory._check(embeddings, labels, sample_ids)
                own.same |= {"sample_ids": "given" if sample_ids is not None else None, "training": self.training}
            own.same["a gradient of embeddings"] = torch.is_grad_enabled() and embeddings.requires_grad
        return own.counts

    def _reduced(self, sides: Sides, rows: Tensor) -> Tensor:
        """The loss of the own anchors, or of all; rows: what every rank takes back a gradient of."""
        pairs = self._pairs
        loss, weight, positives = self._row_losses(sides)
        each = pairs._reduction == Reduction.NONE
        loss = pairs._or_nan(loss if each else loss.sum(), sides, positives)
        # The backward of a rank without anchors, too, must take part in the exchange.
        loss = loss + rows[:0].sum().to(loss.dtype)
        if each:
            return loss
        total, count = sum_over_ranks(torch.stack([loss, weight.sum()]), self.group).unbind(0)
        return total if pairs._reduction == Reduction.SUM else total / torch.where(count > 0, count, 1.0)

    def _row_losses(self, sides: Sides) -> RowLosses:
        """Of the own anchors; parameters, the same on all ranks, get the gradients of all ranks' anchors."""
        shared = {f"loss.{name}": share(p, self.group) for name, p in self._pairs.named_parameters()}
        return functional_call(_RowLosses(self._pairs), shared, (sides,))

    def extra_repr(self) -> str:
        return f"gather={self.gather}, equal_batches={self.equal_batches}"


class _RowLosses(nn.Module):
    """A loss as a call that is not reduced."""

    def __init__(self, loss: EasyPositiveLoss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, sides: Sides) -> RowLosses:
        return self.loss._row_losses(sides)


def mine_positives(
    embeddings: Tensor,
    labels: Tensor,
    *,
    strategy: str = "easy",
    similarity: str = "cosine",
    backend: str = "auto",
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """`fused_margins.functional.mine_positives` of the own rows among the rows of all ranks.

    Args:
        embeddings: (B_r, D) of this rank. labels: (B_r,) integers. Every rank calls, with any number of rows.
        strategy, similarity, backend: as there.
        group: the process group, None for all ranks.

    Returns:
        similarity (B_r,) and index (B_r,) int64 into the rows of all ranks in their order, -inf and -1 where there is
        none; `fused_margins.distributed.collectives.gather_rows` brings those rows, with a gradient.

    Raises:
        As there, on all ranks.

    Gradients: none.

    Source: see there.

    >>> import torch
    >>> from fused_margins.distributed import mine_positives
    >>> embeddings = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    >>> mine_positives(embeddings, torch.tensor([0, 0, 0]))[1]  # no process group
    tensor([1, 0, 1])
    """
    options = {"strategy": strategy, "similarity": similarity, "backend": backend}
    return _mined(functional.mine_positives, embeddings, labels, group, options)


def mine_negatives(
    embeddings: Tensor,
    labels: Tensor,
    *,
    strategy: str = "hard",
    positive_similarity: Tensor | None = None,
    similarity: str = "cosine",
    backend: str = "auto",
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """`fused_margins.functional.mine_negatives` of the own rows among the rows of all ranks.

    Args:
        embeddings, labels, group: as for `mine_positives`. positive_similarity: (B_r,) or None.
        strategy, similarity, backend: as there.

    Returns:
        As `mine_positives`.

    Raises:
        As there, on all ranks.

    Gradients: none.

    Source: see there.

    >>> import torch
    >>> from fused_margins.distributed import mine_negatives
    >>> embeddings = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    >>> mine_negatives(embeddings, torch.tensor([0, 1, 1]))[1]  # no process group
    tensor([1, 0, 0])
    """
    options = {"strategy": strategy, "similarity": similarity, "backend": backend}
    return _mined(
        functional.mine_negatives, embeddings, labels, group, options, positive_similarity=positive_similarity
    )


def _mined(
    search: Callable[..., tuple[Tensor, Tensor]],
    embeddings: Tensor,
    labels: Tensor,
    group: dist.ProcessGroup | None,
    options: dict[str, str],
    **of_rows: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """A search of the own rows among those of all ranks; what it has to say of its options it says on all of them."""
    with together(search.__name__, group) as own:
        _say(own, embeddings, labels)
        for name, values in of_rows.items():
            checks.vector(name, values, own.rows, embeddings)
        search(embeddings[:0], labels[:0], **options)
    first = sum(own.counts[: own_rank(group)])
    every, every_label = (gather_rows(t, own.counts, group) for t in (embeddings.detach(), labels.long()))
    itself = torch.arange(first, first + own.rows, device=embeddings.device)
    references = {"reference_embeddings": every, "reference_labels": every_label, "self_index": itself}
    return search(embeddings, labels, **references, **of_rows, **options)


def _say(own: Own, embeddings: Tensor, labels: Tensor) -> None:
    """Rows and labels, checked; how many there are, and what they have in common with those of other ranks."""
    check_sides(embeddings, labels, None, None, None)
    own.rows, own.same = embeddings.shape[0], {"dtype": embeddings.dtype, "width": embeddings.shape[1]}


def _options(loss: EasyPositiveLoss) -> dict[str, object]:
    return {k: v for k, v in vars(loss).items() if not k.startswith("_") and k not in _MAY_DIFFER}


def _check_no_ids(sample_ids: Tensor | None) -> None:
    if sample_ids is not None:
        raise ValueError("sample_ids: expected None with a loss that remembers nothing, got a value")


def _check_travels(loss: EasyPositiveLoss | CrossBatchMemory) -> None:
    """An error for what takes the references of all ranks at once."""
    reason = None
    if isinstance(loss, CrossBatchMemory):
        reason = "a memory, which every rank holds"
    elif loss.negatives == "distance-weighted":
        reason = "negatives 'distance-weighted', whose draw takes all distances at once"
    elif loss.positives == "all" and loss.negatives not in ("all", "hard"):
        reason = f"positives 'all' and negatives {loss.negatives!r}, one of each pair"
    if reason is not None:
        raise ValueError(f"gather: expected True with {reason}, got False")
