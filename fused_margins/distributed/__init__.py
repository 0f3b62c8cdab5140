"""Many ranks of torch.distributed: what one process computes of a batch, computed by all of them together.

Stands on torch.distributed, DTensor and torch.distributed.checkpoint, and is imported on demand.
"""

from .margin_softmax import ShardedMarginSoftmaxLoss

__all__ = ["ShardedMarginSoftmaxLoss"]
