"""A memory of the last batches: more positives and negatives for a loss than one batch holds."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core import checks
from ..core.indices import UNADMITTED
from .easy_positive import EasyPositiveLoss


class CrossBatchMemory(nn.Module):
    """Searches positives and negatives among the batch and the last `size` embeddings that came before it.

        loss(x, labels, references = batch + memory, self_index),   then the batch replaces the oldest of the memory

    An anchor is never its own positive: its entry in the batch is known by its place. With `sample_ids`, an earlier
    embedding of a sample is known by its id, too: of each sample only the newest embedding is searched, so that no
    anchor finds itself as it was some steps ago. Without ids such an entry counts as another sample.

    Args:
        loss: an `EasyPositiveTripletLoss`, `EasyPositiveMarginLoss` or `EasyPositiveInfoNCELoss`, or a `NTXentLoss`,
            `SupConLoss` or `MultiSimilarityLoss`.
        embedding_size: D.
        size: embeddings to remember, at least 1. Until so many have come, there are fewer.

    Attributes:
        embeddings: (size, D), in the dtype that the module has (float32, unless moved). labels, sample_ids: (size,)
            int64; a row that holds nothing has the label `fused_margins.core.indices.UNADMITTED`; -1 is no id.
        seen: 0-d int64, embeddings that ever came, and so the place of the next.

    All are buffers of fixed shape: whatever saves, copies or broadcasts tensors takes the memory along. An average of
    models has to copy them, as `torch.optim.swa_utils.AveragedModel` does unless `use_buffers=True`: the mean of two
    memories' labels is none. Under DistributedDataParallel, which broadcasts buffers before each step (its default),
    every process searches the memory of process 0, and what the others remembered is gone; with
    `broadcast_buffers=False` each has its own.

    Call: memory(embeddings (B, D), labels (B,) integers, sample_ids (B,) integers or None) gives what the loss gives; a
    negative id is none. Only in training mode the batch is remembered, but for embeddings that are not finite. A call
    copies the references that it searches, (B + size) x D numbers, and makes no GPU wait. torch.compile takes the loss
    (`loss.compile()`), not the memory, which is another one at every step; activation checkpointing takes neither
    (called again in the backward, the memory would hold the batch).

    Raises:
        ValueError, TypeError: a loss of another kind, sizes below 1; shapes, dtypes, devices as the loss.
        RuntimeError: within a backward, in training mode.

    Gradients: embeddings, as anchors and as references of each other; the memory has none.

    Source: Wang et al., Cross-batch memory for embedding learning, 2020, section 3.

    >>> import torch
    >>> from fused_margins import CrossBatchMemory, EasyPositiveTripletLoss
    >>> memory = CrossBatchMemory(EasyPositiveTripletLoss(negatives="hard"), embedding_size=2, size=4)
    >>> memory(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]))  # nobody has a positive yet
    tensor(0.)
    >>> memory(torch.tensor([[0.6, 0.8]]), torch.tensor([0]))  # squared distances: 0.8 to the positive, 0.4
    tensor(0.6000)
    """

    embeddings: Tensor
    labels: Tensor
    sample_ids: Tensor
    seen: Tensor

    def __init__(self, loss: EasyPositiveLoss, embedding_size: int, size: int = 1024) -> None:
        super().__init__()
        if not isinstance(loss, EasyPositiveLoss):
            raise TypeError(f"loss: expected one of the losses on pairs of a batch, got {type(loss).__name__}")
        embedding_size, size = checks.integer("embedding_size", embedding_size, 1), checks.integer("size", size, 1)
        self.loss = loss
        self.register_buffer("embeddings", torch.empty(size, embedding_size))
        for name in ("labels", "sample_ids"):
            self.register_buffer(name, torch.empty(size, dtype=torch.int64))
        self.register_buffer("seen", torch.empty((), dtype=torch.int64))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Forget everything."""
        self.embeddings.zero_()
        self.labels.fill_(UNADMITTED)
        self.sample_ids.fill_(-1)
        self.seen.zero_()

    def forward(self, embeddings: Tensor, labels: Tensor, sample_ids: Tensor | None = None) -> Tensor:
        self._check(embeddings, labels, sample_ids)
        references, reference_labels, self_index = self._references(embeddings, labels.long(), sample_ids)
        loss = self.loss(embeddings, labels.long(), references, reference_labels, self_index)
        if self.training:
            self._remember(embeddings.detach(), labels, sample_ids)
        return loss

    def _check(self, embeddings: Tensor, labels: Tensor, sample_ids: Tensor | None) -> None:
        memory = self.embeddings[:0]
        if isinstance(embeddings, Tensor) and embeddings.is_floating_point():
            memory = memory.to(embeddings.dtype)
        checks.matrices(memory, embeddings, ("the memory", "embeddings"))
        checks.labels("labels", labels, embeddings.shape[0], embeddings)
        checks.labels("sample_ids", sample_ids, embeddings.shape[0], embeddings, optional=True)
        if self.training:
            checks.not_in_a_backward("CrossBatchMemory")

    def _references(
        self, embeddings: Tensor, labels: Tensor, sample_ids: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(N, D) the batch and, newest first, the memory; their labels (N,); and which of them the anchors are (B,)."""
        rows, size = len(embeddings), len(self.labels)
        newest_first = (self.seen - 1 - torch.arange(size, device=labels.device)) % size
        references = torch.cat([embeddings, self.embeddings[newest_first].to(embeddings.dtype)])
        reference_labels = torch.cat([labels, self.labels[newest_first]])
        place = torch.arange(len(references), device=labels.device)
        if sample_ids is None:
            return references, reference_labels, place[:rows]
        ids = torch.cat([sample_ids.long(), self.sample_ids[newest_first]])
        by_id, order = torch.where(ids < 0, -1 - place, ids).sort(stable=True)  # no id: like no other
        begins = F.pad(by_id[1:] != by_id[:-1], (1, 0), value=True)[: len(place)]
        newest = torch.empty_like(place).scatter_(0, order, order[torch.where(begins, place, 0).cummax(0)[0]])
        # Of each sample its newest embedding is searched.
        return references, torch.where(newest == place, reference_labels, UNADMITTED), newest[:rows]

    @torch.no_grad()
    def _remember(self, embeddings: Tensor, labels: Tensor, sample_ids: Tensor | None) -> None:
        size = len(self.labels)
        last = slice(max(0, len(labels) - size), None)  # of a batch larger than the memory
        place = (self.seen + torch.arange(len(labels), device=labels.device)[last]) % size
        stored = embeddings[last].to(self.embeddings.dtype)
        finite = stored.isfinite().all(1)
        self.embeddings[place] = torch.where(finite[:, None], stored, 0)
        self.labels[place] = torch.where(finite, labels[last].long(), UNADMITTED)
        self.sample_ids[place] = -1 if sample_ids is None else sample_ids[last].long().clamp(min=-1)
        self.seen += len(labels)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "seen" not in self._buffers:  # of a version that kept the number beside the buffers
            self._take_number(self.__dict__.pop("seen"))

    def _take_number(self, seen: int) -> None:
        """Of embeddings that ever came; rows that none has reached yet hold nothing."""
        self.register_buffer("seen", torch.tensor(seen, device=self.labels.device))
        self.labels[seen:] = UNADMITTED

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        earlier = state_dict.pop(f"{prefix}_extra_state", None)
        if earlier is not None:
            state_dict[f"{prefix}seen"] = torch.tensor(earlier["seen"])
            state_dict[f"{prefix}labels"] = state_dict[f"{prefix}labels"].clone()
            state_dict[f"{prefix}labels"][earlier["seen"] :] = UNADMITTED
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        size, embedding_size = self.embeddings.shape
        return f"embedding_size={embedding_size}, size={size}"
