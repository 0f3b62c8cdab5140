"""The readable definition of `margin_softmax`; every backend must agree with it."""

from torch import Tensor

from ...margins import apply_margin
from ...reductions import reduce_loss, softplus
from ..contrast import reference as contrast_reference


def margin_softmax(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    margin: Tensor,
    target: Tensor,
    similarity: str,
    angle_rad: float,
    beyond_pi: str,
    straight_through: bool,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """A scalar or (B,): plain PyTorch, any device, differentiable to any order."""
    options = (target, None, None, None, similarity, "different", ignore_index)
    u, negative_lse = contrast_reference.contrast(x, y, scale, None, *options)
    gradient = "straight_through" if straight_through else "exact"
    u = apply_margin(u, angle_rad, "angular", beyond_pi=beyond_pi, gradient=gradient)
    counted = (target != ignore_index).to(u.dtype)
    return reduce_loss(softplus(negative_lse - scale * (u - margin)), counted, reduction)
