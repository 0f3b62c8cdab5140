"""Many ranks of torch.distributed: what one process computes of a batch, computed by all of them together.

Stands on torch.distributed, DTensor and torch.distributed.checkpoint, and is imported on demand.
"""

from .checkpoints import load_checkpoint, save_checkpoint
from .global_batch import GlobalBatchLoss, mine_negatives, mine_positives
from .gradients import clip_grad_norm_
from .magnet_index import ShardedMagnetIndex
from .margin_softmax import ShardedMarginSoftmaxLoss
from .partial_fc import load_partial_fc

__all__ = [
    "GlobalBatchLoss",
    "ShardedMagnetIndex",
    "ShardedMarginSoftmaxLoss",
    "clip_grad_norm_",
    "load_checkpoint",
    "load_partial_fc",
    "mine_negatives",
    "mine_positives",
    "save_checkpoint",
]
