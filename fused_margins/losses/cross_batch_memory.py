"""A memory of the last batches: more positives and negatives for a loss than one batch holds."""

from typing import Any

import torch
from torch import Tensor, nn

from ..core import checks
from .easy_positive import EasyPositiveLoss


class CrossBatchMemory(nn.Module):
    """Searches positives and negatives among the batch and the last `size` embeddings that came before it.

        loss(x, labels, references = batch + memory, self_index),   then the batch replaces the oldest of the memory

    An anchor is never its own positive: its entry in the batch is known by its place. With `sample_ids`, an earlier
    embedding of a sample is known by its id, too: of each sample only the newest embedding is searched, so that no
    anchor finds itself as it was some steps ago. Without ids such an entry counts as another sample.

    Args:
        loss: an `EasyPositiveTripletLoss`, `EasyPositiveMarginLoss` or `EasyPositiveInfoNCELoss`.
        embedding_size: D.
        size: embeddings to remember, at least 1. Until so many have come, there are fewer.

    Attributes:
        embeddings: (size, D), in the dtype that the module has (float32, unless moved). labels, sample_ids: (size,)
            int64; -1 stands for no id. Buffers, so that a state dict restores the memory bit by bit.
        seen: embeddings that ever came, and so the place of the next; part of the state dict.

    Call: memory(embeddings (B, D), labels (B,) integers, sample_ids (B,) integers or None) gives what the loss gives; a
    negative id is none. Only in training mode the batch is remembered. A call copies the references that it searches,
    (B + size) x D numbers; with ids a GPU synchronises to count them. torch.compile takes the loss (`loss.compile()`),
    not the memory, which is another one at every step.

    Raises:
        ValueError, TypeError: a loss of another kind, sizes below 1; shapes, dtypes, devices as the loss.

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

    def __init__(self, loss: EasyPositiveLoss, embedding_size: int, size: int = 1024) -> None:
        super().__init__()
        if not isinstance(loss, EasyPositiveLoss):
            raise TypeError(f"loss: expected one of the easy-positive losses, got {type(loss).__name__}")
        checks.integer("embedding_size", embedding_size, 1)
        checks.integer("size", size, 1)
        self.loss, self.seen = loss, 0
        self.register_buffer("embeddings", torch.zeros(size, embedding_size))
        self.register_buffer("labels", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("sample_ids", torch.full((size,), -1))

    def forward(self, embeddings: Tensor, labels: Tensor, sample_ids: Tensor | None = None) -> Tensor:
        memory = self.embeddings[:0]
        if isinstance(embeddings, Tensor) and embeddings.is_floating_point():
            memory = memory.to(embeddings.dtype)
        checks.matrices(memory, embeddings, ("the memory", "embeddings"))
        checks.labels("labels", labels, embeddings.shape[0], embeddings)
        checks.labels("sample_ids", sample_ids, embeddings.shape[0], embeddings, optional=True)
        references, reference_labels, self_index = self._references(embeddings, labels.long(), sample_ids)
        loss = self.loss(embeddings, labels.long(), references, reference_labels, self_index)
        if self.training:
            self._remember(embeddings.detach(), labels, sample_ids)
        return loss

    def _references(
        self, embeddings: Tensor, labels: Tensor, sample_ids: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(N, D) the batch and, newest first, the memory; their labels (N,); and which of them the anchors are (B,)."""
        rows, size = len(embeddings), len(self.labels)
        newest_first = (self.seen - 1 - torch.arange(min(self.seen, size), device=labels.device)) % size
        references = torch.cat([embeddings, self.embeddings[newest_first].to(embeddings.dtype)])
        reference_labels = torch.cat([labels, self.labels[newest_first]])
        place = torch.arange(len(references), device=labels.device)
        if sample_ids is None:
            return references, reference_labels, place[:rows]
        ids = torch.cat([sample_ids.long(), self.sample_ids[newest_first]])
        ids = torch.where(ids < 0, -1 - place, ids)  # no id: like no other
        _, sample = torch.unique(ids, return_inverse=True)
        newest = torch.full_like(place, len(place)).scatter_reduce(0, sample, place, "amin")  # of each sample
        kept = newest[sample] == place
        self_index = (kept.cumsum(0) - 1)[newest[sample[:rows]]]
        return references[kept], reference_labels[kept], self_index

    @torch.no_grad()
    def _remember(self, embeddings: Tensor, labels: Tensor, sample_ids: Tensor | None) -> None:
        size = len(self.labels)
        last = slice(max(0, len(labels) - size), None)  # of a batch larger than the memory
        place = torch.arange(self.seen, self.seen + len(labels), device=labels.device)[last] % size
        self.embeddings[place] = embeddings[last].to(self.embeddings.dtype)
        self.labels[place] = labels[last].long()
        self.sample_ids[place] = -1 if sample_ids is None else sample_ids[last].long().clamp(min=-1)
        self.seen += len(labels)

    def get_extra_state(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]

    def extra_repr(self) -> str:
        size, embedding_size = self.embeddings.shape
        return f"embedding_size={embedding_size}, size={size}, seen={self.seen}"
