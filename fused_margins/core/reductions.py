"""Log-sum-exps, the soft hinge of a row's loss, the reductions of B losses, and sums in a fixed order."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .enums import Reduction


def log_odds(negative_lse: Tensor, z: Tensor) -> Tensor:
    """Of the negatives against a positive of logit z; NaN where z is infinite, as their log-sum-exp less z is there."""
    return negative_lse - z + 0 * z.relu()


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x) to the precision of x; torch's own default switches to x at 20, which float64 would notice."""
    return F.softplus(x, threshold=20 if x.dtype == torch.float32 else 40)


def masked_logsumexp(z: Tensor, mask: Tensor) -> Tensor:
    """Log-sum-exp (B,) of z (B, N) over what the mask (B, N) admits; -inf without a gradient where that is nothing."""
    if not z.shape[1]:
        return z.new_full((z.shape[0],), -torch.inf)
    empty = ~mask.any(dim=1)
    # A row that admits nothing is summed over zeros and then replaced, so that no gradient of it is ever inf - inf.
    z = torch.where(mask, z, torch.where(empty[:, None], 0.0, -torch.inf))
    return torch.where(empty, -torch.inf, torch.logsumexp(z, dim=1))


def reduce_loss(loss: Tensor, weight: Tensor, reduction: Reduction) -> Tensor:
    """The (B,) losses as they are, their sum, or their sum over that of `weight` (B,); 0 where nothing has weight."""
    if reduction == Reduction.NONE:
        return loss
    if reduction == Reduction.SUM:
        return loss.sum()
    total = weight.sum()
    return loss.sum() / torch.where(total > 0, total, 1.0)


def sum_by(group: Tensor, values: Tensor, num_groups: int) -> Tensor:
    """Sums (G, D) of the rows of values (n, D), each group's in order: no atomics, so the same bits for any threads."""
    sizes = torch.bincount(group, minlength=num_groups)
    return F.embedding_bag(group.argsort(stable=True), values, sizes.cumsum(0) - sizes, mode="sum")
