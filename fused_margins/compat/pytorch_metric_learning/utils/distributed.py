"""Their wrappers for distributed training; the one of losses runs on the kernels where it is efficient."""

from typing import Any

import torch
from pytorch_metric_learning.utils import distributed as _theirs
from pytorch_metric_learning.utils.distributed import *  # noqa: F403
from torch import Tensor

from ..calls import AllPairs
from ..losses.memory import BY_LABEL, CrossBatchMemory

__all__ = [name for name in dir(_theirs) if not name.startswith("_")]


class DistributedLossWrapper(_theirs.DistributedLossWrapper):
    """Theirs; efficient, it hands the losses of all pairs a self index instead of a list of all pairs.

    Outside a process group it calls a `CrossBatchMemory` as that is called; theirs gives it an argument too many.
    """

    def forward(
        self,
        embeddings: Tensor,
        labels: Any = None,
        indices_tuple: Any = None,
        ref_emb: Any = None,
        ref_labels: Any = None,
        enqueue_mask: Any = None,
    ) -> Tensor:
        alone = isinstance(self.loss, _MEMORIES) and ref_emb is None and ref_labels is None
        if alone and not _theirs.is_distributed():
            return self.loss(embeddings, labels, indices_tuple, enqueue_mask)
        return super().forward(embeddings, labels, indices_tuple, ref_emb, ref_labels, enqueue_mask)

    def forward_regular_loss(
        self, emb: Tensor, labels: Any, indices_tuple: Any, ref_emb: Any, ref_labels: Any, world_size: int
    ) -> Tensor:
        by_label = self.efficient and world_size > 1 and indices_tuple is None and type(self.loss) in BY_LABEL
        # Of one row, theirs takes the row among all for another one; of given references, the one in its place.
        if not by_label or labels is None or len(labels) == 1 or ref_emb is not None or ref_labels is not None:
            return super().forward_regular_loss(emb, labels, indices_tuple, ref_emb, ref_labels, world_size)
        all_emb, all_labels, labels = _theirs.gather(emb, labels)
        itself = torch.arange(len(labels), device=labels.device)  # the own rows come first
        return self.loss(emb, labels, AllPairs(labels, all_labels, itself), all_emb, all_labels) * world_size


class DistributedMinerWrapper(_theirs.DistributedMinerWrapper):
    """Theirs, which outside a process group mines as its miner does, where theirs fails."""

    def forward(self, emb: Tensor, labels: Any, ref_emb: Any = None, ref_labels: Any = None) -> Any:
        if not _theirs.is_distributed():
            return self.miner(emb, labels, ref_emb, ref_labels)
        return super().forward(emb, labels, ref_emb, ref_labels)


_MEMORIES = (CrossBatchMemory, _theirs.CrossBatchMemory)
