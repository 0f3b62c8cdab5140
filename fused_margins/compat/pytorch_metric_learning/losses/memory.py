"""A queue of embeddings of earlier batches as references of a pair loss."""

from typing import Any

import torch
from pytorch_metric_learning import losses as _theirs
from torch import Tensor

from ..calls import AllPairs
from .pairs import GeneralizedLiftedStructureLoss, MultiSimilarityLoss, NTXentLoss, SupConLoss
from .proxies import NCALoss
from .triplets import MarginLoss, TripletMarginLoss

BY_LABEL = (
    NTXentLoss, SupConLoss, MultiSimilarityLoss, GeneralizedLiftedStructureLoss, NCALoss, MarginLoss, TripletMarginLoss
)  # fmt: skip


class CrossBatchMemory(_theirs.CrossBatchMemory):
    """Theirs, which hands the losses of all pairs a self index unless pairs are to be mined.

    keep_position: whether the state dict says where the queue goes on, `queue_idx`, and whether it is full,
    `has_been_filled`; theirs has neither, so that a resumed run takes a full memory for an empty one.

    Source: Wang et al., Cross-batch memory for embedding learning, 2020.
    """

    keep_position = False

    def __init__(self, *args: Any, keep_position: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.keep_position = keep_position

    def create_indices_tuple(
        self, embeddings: Tensor, labels: Tensor, E_mem: Tensor, L_mem: Tensor, mined: Any, leave_out_self: bool
    ) -> Any:
        if why_not_self_index(self, labels, mined):
            return super().create_indices_tuple(embeddings, labels, E_mem, L_mem, mined, leave_out_self)
        return AllPairs(labels, L_mem, self.curr_batch_idx if leave_out_self else None)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.keep_position:
            for name in _POSITION:
                destination[prefix + name] = torch.tensor(getattr(self, name))

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: list[str], *rest: Any
    ) -> None:
        position = {}
        if self.keep_position:
            position = {name: state_dict.pop(prefix + name, None) for name in _POSITION}
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        for name, value in position.items():
            if value is None:
                missing.append(prefix + name)
            else:
                setattr(self, name, value.item())


def why_not_self_index(memory: CrossBatchMemory, labels: Tensor, mined: Any) -> str | None:
    """Whether a loss can tell its pairs by labels and the place of each row in the memory."""
    if type(memory.loss) not in BY_LABEL:
        return f"{type(memory.loss).__name__} needs them"
    if memory.miner or mined is not None:
        return "they are mined"
    return "of one row, theirs takes the row in the memory for another one" if len(labels) == 1 else None


_POSITION = ("queue_idx", "has_been_filled")
