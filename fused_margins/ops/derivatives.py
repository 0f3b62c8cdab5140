"""Derivatives that no kernel computes: second ones, and forward mode. They are the reference's, for every op."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad


def has_tangent(tensors: Sequence[Tensor]) -> bool:
    """Whether forward-mode differentiation is going on, with respect to one of these."""
    if forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def double_backward(
    reference: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    grad_outputs: Sequence[Tensor],
    grad_grad_inputs: Sequence[Tensor | None],
) -> tuple[Tensor, ...]:
    """Gradients of <grad_inputs, grad_grad_inputs> with respect to grad_outputs and then inputs.

    Args:
        reference: maps `inputs` to the outputs.
        inputs: the floating tensors that the op differentiates.
        grad_outputs: cotangents of the outputs.
        grad_grad_inputs: cotangents of the input gradients; None is zero.
    """
    count = len(grad_outputs)

    def first_order(*primals: Tensor) -> tuple[Tensor, ...]:
        pullback = torch.func.vjp(reference, *primals[count:])[1]
        return pullback(tuple(primals[:count]))

    cotangents = tuple(torch.zeros_like(t) if g is None else g for g, t in zip(grad_grad_inputs, inputs))
    # No torch.enable_grad: vjp has its own, and a graph of the outcome is wanted only where one is being made.
    with torch.autocast(inputs[0].device.type, enabled=False):
        pullback = torch.func.vjp(first_order, *grad_outputs, *inputs)[1]
        return pullback(cotangents)
