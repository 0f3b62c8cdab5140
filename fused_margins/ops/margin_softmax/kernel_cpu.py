"""`margin_softmax` in C++ on a CPU (csrc/margin_softmax/cpu.cpp): the tensors' memory, handed over."""

import torch
from torch import Tensor

from ..kept import describe, empty, saved_size
from ..native import call, matrix, module

__all__ = ["backward", "describe", "forward"]


def forward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    margin: Tensor,
    target: Tensor,
    similarity: str,
    ignore_index: int,
    reduction: str,
    with_mean: bool,
    kept_blocks: int,
) -> tuple[Tensor, Tensor]:
    """loss, a scalar or (B,), and what the backward needs; the accumulation dtype."""
    assert module is not None
    rows, width = x.shape
    loss = scale.new_empty((rows,) if reduction == "none" else ())
    saved = empty(saved_size(rows, y.shape[0], width, with_mean, kept_blocks), scale.dtype)
    scale, margin, target = scale.contiguous(), margin.contiguous(), target.to(torch.int64).contiguous()
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
    ignore_index: int,
    reduction: str,
    with_mean: bool,
    kept_blocks: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, y, scale and margin; empty where not needed."""
    assert module is not None
    grads = tuple(torch.empty(t.shape if need else 0, dtype=t.dtype) for t, need in zip((x, y, scale, margin), needs))
    scale, margin, target = scale.contiguous(), margin.contiguous(), target.to(torch.int64).contiguous()
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
        ignore_index,
        reduction,
        with_mean,
        kept_blocks,
        saved.data_ptr(),
        *(g.data_ptr() if need else 0 for g, need in zip(grads, needs)),
    )
    return grads  # type: ignore[return-value]
