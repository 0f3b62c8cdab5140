"""`scores` in C++ on a CPU (csrc/scores/cpu.cpp): the tensors' memory, handed over."""

import torch
from torch import Tensor

from ..native import call, int64, matrix, module, pointer


def forward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    margin: Tensor,
    target: Tensor | None,
    similarity: str,
    ignore_index: int,
) -> Tensor:
    """(B, N) in the dtype of x."""
    assert module is not None
    scores = torch.empty(x.shape[0], y.shape[0], dtype=x.dtype)
    scale, margin = scale.contiguous(), margin.contiguous()
    bias, target = None if bias is None else bias.contiguous(), int64(target)
    call(
        module.scores_forward,
        matrix(x),
        matrix(y),
        scale.data_ptr(),
        scale.dim(),
        pointer(bias),
        margin.data_ptr(),
        margin.dim(),
        pointer(target),
        similarity,
        ignore_index,
        scores.data_ptr(),
    )
    return scores


def backward(
    grad_scores: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    margin: Tensor,
    target: Tensor | None,
    similarity: str,
    ignore_index: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, y, scale, bias and margin; empty where not needed."""
    assert module is not None
    needs = [need and not (i == 3 and bias is None) for i, need in enumerate(needs)]
    shapes = (x, y, scale, scale if bias is None else bias, margin)
    grads = [torch.empty(t.shape if need else 0, dtype=t.dtype) for t, need in zip(shapes, needs)]
    outputs = [g.data_ptr() if need else 0 for g, need in zip(grads, needs)]
    grad_scores, scale, margin = grad_scores.contiguous(), scale.contiguous(), margin.contiguous()
    bias, target = None if bias is None else bias.contiguous(), int64(target)
    call(
        module.scores_backward,
        grad_scores.data_ptr(),
        matrix(x),
        matrix(y),
        scale.data_ptr(),
        scale.dim(),
        pointer(bias),
        margin.data_ptr(),
        margin.dim(),
        pointer(target),
        similarity,
        ignore_index,
        *outputs,
    )
    return grads[0], grads[1], grads[2], grads[3], grads[4]
