"""`margin_softmax` in Triton: `contrast` over classes, and the losses of all rows in one small kernel."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...reductions import REDUCTIONS
from .. import gpu, kept
from ..contrast import kernel_triton as contrast
from ..gpu import cdiv
from ..similarity import accumulation_dtype
from ..triton_tiles import numbers, places, softplus

MEAN, SUM, NONE = (tl.constexpr(REDUCTIONS.index(name)) for name in ("mean", "sum", "none"))


@triton.jit
def _difference(positive, negative_lse, scale, margin, i, scale_stride, margin_stride):
    """negative_lse - scale (u - margin), what the loss is the softplus of; -inf where the row has no loss."""
    lse = tl.load(negative_lse + i)
    z = tl.load(scale + i * scale_stride) * (tl.load(positive + i) - tl.load(margin + i * margin_stride))
    return tl.where(lse == float("-inf"), float("-inf"), lse - z)


@triton.jit
def _losses(
    positive, negative_lse, scale, margin, target, loss, counted, rows, scale_stride, margin_stride, ignore_index,
    BLOCK: tl.constexpr, REDUCTION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The losses, or their sum or mean, by one program in a fixed order; and how many rows count."""
    total = tl.zeros((BLOCK,), DTYPE)
    count = tl.zeros((BLOCK,), DTYPE)
    for block in range(tl.cdiv(rows, BLOCK)):
        at, i = places(block, BLOCK, rows)
        inside = at < rows
        value, _ = softplus(_difference(positive, negative_lse, scale, margin, i, scale_stride, margin_stride))
        if REDUCTION == NONE:
            tl.store(loss + at, value, mask=inside)
        total += tl.where(inside, value, 0.0)
        count += tl.where(inside & (tl.load(target + i) != ignore_index), 1.0, 0.0)
    rows_that_count = tl.maximum(tl.sum(count, 0), 1.0)
    tl.store(counted, rows_that_count)
    if REDUCTION == MEAN:
        tl.store(loss, tl.sum(total, 0) / rows_that_count)
    elif REDUCTION == SUM:
        tl.store(loss, tl.sum(total, 0))


@triton.jit
def _derivatives(
    positive, negative_lse, scale, margin, counted, grad_loss, grad_positive, grad_negative_lse, grad_scale,
    grad_margin, rows, scale_stride, margin_stride, BLOCK: tl.constexpr, REDUCTION: tl.constexpr,
):  # fmt: skip
    """Of the loss, with respect to what each row contributes to it."""
    at, i = places(tl.program_id(0), BLOCK, rows)
    inside = at < rows
    _, p = softplus(_difference(positive, negative_lse, scale, margin, i, scale_stride, margin_stride))
    if REDUCTION == NONE:
        g = tl.load(grad_loss + i)
    else:
        g = tl.load(grad_loss)
        if REDUCTION == MEAN:
            g = g / tl.load(counted)
    p = tl.where(tl.load(negative_lse + i) == float("-inf"), 0.0, p)
    s = tl.load(scale + i * scale_stride)
    above = tl.load(positive + i) - tl.load(margin + i * margin_stride)
    tl.store(grad_negative_lse + at, g * p, mask=inside)
    tl.store(grad_positive + at, -g * p * s, mask=inside)
    tl.store(grad_scale + at, -g * p * above, mask=inside)
    tl.store(grad_margin + at, g * p * s, mask=inside)


def _parts(saved: Tensor, rows: int, columns: int, width: int, kept_blocks: int) -> tuple[Tensor, ...]:
    """positive, negative_lse, mean and kept weights as `contrast` has them, and the number of rows that count; those of
    rows up to 16 bytes."""
    step = (rows + 3) // 4 * 4
    sizes = kept.kept_size(rows, columns, kept_blocks, "triton"), kept.mean_size(rows, width, columns, "triton")
    rest = saved.shape[0] - sum(sizes) - 2 * step
    weights, mean, positive, negative_lse, counted = saved.split((*sizes, step, step, rest))
    return positive, negative_lse, mean, weights, counted


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
    (rows, width), columns = x.shape, y.shape[0]
    dtype = accumulation_dtype(x.dtype)
    saved = torch.empty(
        kept.saved_size(rows, columns, width, with_mean, kept_blocks, "triton"), dtype=dtype, device=x.device
    )
    *parts, counted = _parts(saved, rows, columns, width, kept_blocks)
    scale, margin = scale.contiguous(), margin.contiguous()
    target = target.to(torch.int64).contiguous()
    inputs = (x, y, scale, None, target, None, None, None)
    contrast.forward_into(tuple(parts), inputs, (similarity, "different", ignore_index), kept_blocks)
    loss = torch.empty((rows,) if reduction == "none" else (), dtype=dtype, device=x.device)
    with gpu.on(x):
        gpu.launch(
            _losses, (1,),
            *parts[:2], scale, margin, target, loss, counted, rows, int(scale.dim() > 0), int(margin.dim() > 0),
            ignore_index, BLOCK=1024, REDUCTION=REDUCTIONS.index(reduction), DTYPE=numbers(x.dtype), num_warps=8,
        )  # fmt: skip
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
    (rows, width), columns = x.shape, y.shape[0]
    positive, negative_lse, mean, weights, counted = _parts(saved.contiguous(), rows, columns, width, kept_blocks)
    scale, margin, grad_loss = scale.contiguous(), margin.contiguous(), grad_loss.contiguous()
    of_rows = torch.empty(4, rows, dtype=saved.dtype, device=x.device)
    if rows:
        with gpu.on(x):
            gpu.launch(
                _derivatives, (cdiv(rows, 256),),
                positive, negative_lse, scale, margin, counted, grad_loss, *of_rows, rows, int(scale.dim() > 0),
                int(margin.dim() > 0), BLOCK=256, REDUCTION=REDUCTIONS.index(reduction), num_warps=4,
            )  # fmt: skip
    of_positive, of_lse, of_scale, of_margin = of_rows
    grad_x, grad_y, grad_scale, _ = contrast.backward(
        of_positive, of_lse, x, y, scale, None, target, None, None, None, negative_lse, mean, weights, similarity,
        "different", ignore_index, kept_blocks, [*needs[:3], False],
    )  # fmt: skip
    if needs[2]:
        grad_scale = grad_scale + (of_scale if scale.dim() else of_scale.sum())
    if not needs[3]:
        return grad_x, grad_y, grad_scale, saved.new_empty(0)
    return grad_x, grad_y, grad_scale, of_margin.clone() if margin.dim() else of_margin.sum()


def describe(problem: Any) -> str:
    """What the memory budget makes of the problem."""
    return kept.describe(problem, "triton")
