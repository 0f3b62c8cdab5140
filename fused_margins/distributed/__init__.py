"""Many ranks of torch.distributed: what one process computes of a batch, computed by all of them together.

Stands on torch.distributed, DTensor and torch.distributed.checkpoint, and is imported on demand.
"""

from .checkpoints import load_checkpoint, save_checkpoint
from .gradients import clip_grad_norm_
from .margin_softmax import ShardedMarginSoftmaxLoss
from .partial_fc import load_partial_fc

__all__ = ["ShardedMarginSoftmaxLoss", "clip_grad_norm_", "load_checkpoint", "load_partial_fc", "save_checkpoint"]
