"""Many ranks of torch.distributed: what one process computes of a batch, computed by all of them together.

Stands on torch.distributed, DTensor and torch.distributed.checkpoint, and is imported on demand.
"""

from .global_batch import GlobalBatchLoss, mine_negatives, mine_positives
from .magnet_index import ShardedMagnetIndex
from .margin_softmax import ShardedMarginSoftmaxLoss

__all__ = [
    "GlobalBatchLoss",
    "ShardedMagnetIndex",
    "ShardedMarginSoftmaxLoss",
    "mine_negatives",
    "mine_positives",
]
