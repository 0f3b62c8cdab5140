"""From the losses of B rows to what a user asked for, and the soft hinge that they end in."""

import torch
from torch import Tensor
from torch.nn import functional as F

REDUCTIONS = ("mean", "sum", "none")


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x) to the precision of x; torch's own default switches to x at 20, which float64 would notice."""
    return F.softplus(x, threshold=20 if x.dtype == torch.float32 else 40)


def reduce_loss(loss: Tensor, weight: Tensor, reduction: str) -> Tensor:
    """The (B,) losses as they are, their sum, or their sum over that of `weight` (B,); 0 where nothing has weight."""
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    total = weight.sum()
    return loss.sum() / torch.where(total > 0, total, 1.0)
