"""The readable definition of `margin_softmax`; every backend must agree with it."""

from torch import Tensor

from ...reductions import reduce_loss, softplus
from ..contrast import reference as contrast_reference


def margin_softmax(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    margin: Tensor,
    target: Tensor,
    similarity: str,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """A scalar or (B,): plain PyTorch, any device, differentiable to any order."""
    options = (target, None, None, None, similarity, "different", ignore_index)
    u, negative_lse = contrast_reference.contrast(x, y, scale, None, *options)
    counted = (target != ignore_index).to(u.dtype)
    return reduce_loss(softplus(negative_lse - scale * (u - margin)), counted, reduction)
