"""`contrast` in C++ on a CPU (csrc/contrast/cpu.cpp): the tensors' memory, handed over."""

import torch
from torch import Tensor

from ..kept import describe, empty, kept_size, mean_size
from ..native import call, int64, matrix, module, pointer

__all__ = ["backward", "describe", "forward"]


def forward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_labels: Tensor | None,
    column_labels: Tensor | None,
    self_index: Tensor | None,
    similarity: str,
    relation: str,
    ignore_index: int,
    with_mean: bool,
    kept_blocks: int,
    force_running_maximum: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """positive (B,), negative_lse (B,), mean or empty, kept weights; the accumulation dtype throughout."""
    assert module is not None
    rows, width = x.shape
    positive, negative_lse = scale.new_empty(rows), scale.new_empty(rows)
    mean = empty(mean_size(rows, width) if with_mean else 0, scale.dtype)
    kept = empty(kept_size(rows, y.shape[0], kept_blocks), scale.dtype)
    scale, bias = scale.contiguous(), None if bias is None else bias.contiguous()
    labels = [int64(t) for t in (target, row_labels, column_labels, self_index)]
    call(
        module.contrast_forward,
        matrix(x),
        matrix(y),
        scale.data_ptr(),
        scale.dim(),
        pointer(bias),
        *map(pointer, labels),
        similarity,
        relation,
        ignore_index,
        force_running_maximum,
        positive.data_ptr(),
        negative_lse.data_ptr(),
        mean.data_ptr() if with_mean else 0,
        kept.data_ptr(),
        kept_blocks,
    )
    return positive, negative_lse, mean, kept


def backward(
    grad_positive: Tensor,
    grad_negative_lse: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_labels: Tensor | None,
    column_labels: Tensor | None,
    self_index: Tensor | None,
    negative_lse: Tensor,
    mean: Tensor,
    kept: Tensor,
    similarity: str,
    relation: str,
    ignore_index: int,
    kept_blocks: int,
    needs: list[bool],
    force_running_maximum: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, y, scale and bias; empty where not needed."""
    assert module is not None
    needs = [need and not (i == 3 and bias is None) for i, need in enumerate(needs)]
    shapes = (x, y, scale, scale if bias is None else bias)
    grads = [torch.empty(t.shape if need else 0, dtype=t.dtype) for t, need in zip(shapes, needs)]
    scale, bias = scale.contiguous(), None if bias is None else bias.contiguous()
    labels = [int64(t) for t in (target, row_labels, column_labels, self_index)]
    outputs = [g.data_ptr() if need else 0 for g, need in zip(grads, needs)]
    grad_positive, grad_negative_lse = grad_positive.contiguous(), grad_negative_lse.contiguous()
    negative_lse, mean, kept = negative_lse.contiguous(), mean.contiguous(), kept.contiguous()
    call(
        module.contrast_backward,
        grad_positive.data_ptr(),
        grad_negative_lse.data_ptr(),
        matrix(x),
        matrix(y),
        scale.data_ptr(),
        scale.dim(),
        pointer(bias),
        *map(pointer, labels),
        similarity,
        relation,
        ignore_index,
        force_running_maximum,
        negative_lse.data_ptr(),
        mean.data_ptr(),
        kept.data_ptr(),
        kept_blocks,
        *outputs,
    )
    return grads[0], grads[1], grads[2], grads[3]
