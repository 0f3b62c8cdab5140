"""`margin_softmax` in CUDA C++ (csrc/margin_softmax/cuda.cu): the tensors' memory; one launch forward, two backward."""

import torch
from torch import Tensor

from .. import native
from ..cuda_launch import launch, matrix, tickets
from ..kept import saved_size
from .angle import pieces


def _angle(angle_rad: float, beyond_pi: str, straight_through: bool) -> object:
    assert native.cuda_module is not None
    return native.cuda_module.Angle(*pieces(angle_rad, beyond_pi), straight_through)


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
    assert native.cuda_module is not None
    (rows, width), columns = x.shape, y.shape[0]
    loss = scale.new_empty((rows,) if reduction == "none" else ())
    saved = scale.new_empty(saved_size(rows, columns, width, with_mean, kept_blocks, "cuda"))
    if not rows:
        return loss.zero_(), saved
    scale, margin, target = scale.contiguous(), margin.contiguous(), target.to(torch.int64).contiguous()
    counters = tickets(x.device, (rows + 15) // 16 + 1)
    launch(
        native.cuda_module.margin_softmax_forward,
        x.device,
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
        loss.data_ptr(),
        saved.data_ptr(),
        counters.data_ptr(),
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, y, scale and margin; empty where not needed."""
    assert native.cuda_module is not None
    rows = x.shape[0]
    # A gradient is contiguous, whatever the strides of its input.
    grads = tuple(t.new_empty(t.shape if need else 0) for t, need in zip((x, y, scale, margin), needs))
    if not rows:
        return tuple(g.zero_() for g in grads)  # type: ignore[return-value]
    scale, margin, target = scale.contiguous(), margin.contiguous(), target.to(torch.int64).contiguous()
    grad_loss, saved = grad_loss.contiguous(), saved.contiguous()
    scratch = saved.new_empty(native.cuda_module.margin_softmax_scratch_size(rows, y.shape[0]))
    counters = tickets(x.device, 1) if needs[2] and scale.dim() == 0 else None
    launch(
        native.cuda_module.margin_softmax_backward,
        x.device,
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
        saved.data_ptr(),
        *(g.data_ptr() if need else 0 for g, need in zip(grads, needs)),
        scratch.data_ptr(),
        native.pointer(counters),
    )
    return grads  # type: ignore[return-value]
