"""`margin_softmax` in C++ on a CPU (csrc/margin_softmax/cpu.cpp): the tensors' memory, handed over."""

import functools

import torch
from torch import Tensor

from ..kept import describe, empty, saved_size
from ..native import call, int64, matrix, module, pointer
from .angle import pieces

__all__ = ["backward", "describe", "forward"]


@functools.lru_cache(maxsize=256)
def _angle(angle_rad: float, beyond_pi: str, straight_through: bool) -> object:
    assert module is not None
    return module.Angle(*pieces(angle_rad, beyond_pi), straight_through)


def forward(
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
    with_mean: bool,
    kept_blocks: int,
) -> tuple[Tensor, Tensor]:
    """loss, a scalar or (B,), and what the backward needs; the accumulation dtype."""
    assert module is not None
    rows, width = x.shape
    loss = torch.empty((rows,) if reduction == "none" else (), dtype=scale.dtype)
    saved = empty(saved_size(rows, y.shape[0], width, with_mean, kept_blocks), scale.dtype)
    scale, margin, target = scale.contiguous(), margin.contiguous(), int64(target)
    call(
        module.margin_softmax_forward,
        matrix(x),
        matrix(y),
        scale.data_ptr(),
        scale.dim(),
        margin.data_ptr(),
        margin.dim(),
        target.data_ptr(),
        similarity,
        _angle(angle_rad, beyond_pi, straight_through),
        ignore_index,
        reduction,
        with_mean,
        kept_blocks,
        loss.data_ptr(),
        saved.data_ptr(),
    )
    return loss, saved


def backward(
    grad_loss: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    margin: Tensor,
    target: Tensor,
    saved: Tensor,
    similarity: str,
    angle_rad: float,
    beyond_pi: str,
    straight_through: bool,
    ignore_index: int,
    reduction: str,
    with_mean: bool,
    kept_blocks: int,
    needs: list[bool],
) -> list[Tensor | None]:
    """Gradients of x, y, scale and margin, of those that are needed."""
    assert module is not None
    grads = [torch.empty(t.shape, dtype=t.dtype) if need else None for t, need in zip((x, y, scale, margin), needs)]
    scale, margin, target = scale.contiguous(), margin.contiguous(), int64(target)
    grad_loss, saved = grad_loss.contiguous(), saved.contiguous()
    call(
        module.margin_softmax_backward,
        grad_loss.data_ptr(),
        matrix(x),
        matrix(y),
        scale.data_ptr(),
        scale.dim(),
        margin.data_ptr(),
        margin.dim(),
        target.data_ptr(),
        similarity,
        _angle(angle_rad, beyond_pi, straight_through),
        ignore_index,
        reduction,
        with_mean,
        kept_blocks,
        saved.data_ptr(),
        *map(pointer, grads),
    )
    return grads
