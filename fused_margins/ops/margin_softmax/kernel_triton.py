"""`margin_softmax` in Triton: `contrast` over classes, and the losses of all rows in one small kernel."""

import functools
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
from .angle import pieces

TINY = tl.constexpr(2.0**-126)  # of float64, too: it only keeps a root and a quotient finite
MEAN, SUM, NONE = (tl.constexpr(REDUCTIONS.index(name)) for name in ("mean", "sum", "none"))


@triton.jit
def _reduced(positive, margin, angle, i, margin_stride, ANGULAR: tl.constexpr, STRAIGHT: tl.constexpr):
    """psi(u) - margin of the own class, and its derivative; that of a sine is 0, not infinite, at the poles.

    angle (7,): `fused_margins.ops.margin_softmax.angle.Pieces`.
    """
    u = tl.load(positive + i)
    derivative = u * 0.0 + 1.0
    psi = u
    if ANGULAR:
        squared = (1 - u) * (1 + u)
        s = tl.sqrt(tl.maximum(squared, TINY))
        of_sine = tl.where(squared > TINY, -u / s, 0.0)
        beyond = tl.load(angle + 2) * u > tl.load(angle + 3)
        along = tl.where(beyond, tl.load(angle + 4), tl.load(angle))
        across = tl.where(beyond, tl.load(angle + 5), -tl.load(angle + 1))
        psi = along * u + across * s + tl.where(beyond, tl.load(angle + 6), 0.0)
        if not STRAIGHT:
            derivative = along + across * of_sine
    return psi - tl.load(margin + i * margin_stride), derivative


@triton.jit
def _difference(negative_lse, scale, reduced, i, scale_stride):
    """negative_lse - scale (psi(u) - margin), what the loss is the softplus of; -inf where the row has no loss."""
    lse = tl.load(negative_lse + i)
    return tl.where(lse == float("-inf"), float("-inf"), lse - tl.load(scale + i * scale_stride) * reduced)


@triton.jit
def _losses(
    positive, negative_lse, scale, margin, angle, target, loss, counted, rows, scale_stride, margin_stride,
    ignore_index, BLOCK: tl.constexpr, REDUCTION: tl.constexpr, ANGULAR: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The losses, or their sum or mean, by one program in a fixed order; and how many rows count."""
    total = tl.zeros((BLOCK,), DTYPE)
    count = tl.zeros((BLOCK,), DTYPE)
    for block in range(tl.cdiv(rows, BLOCK)):
        at, i = places(block, BLOCK, rows)
        inside = at < rows
        reduced, _ = _reduced(positive, margin, angle, i, margin_stride, ANGULAR, False)
        value, _ = softplus(_difference(negative_lse, scale, reduced, i, scale_stride))
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
    positive, negative_lse, scale, margin, angle, counted, grad_loss, grad_positive, grad_negative_lse, grad_scale,
    grad_margin, rows, scale_stride, margin_stride, BLOCK: tl.constexpr, REDUCTION: tl.constexpr,
    ANGULAR: tl.constexpr, STRAIGHT: tl.constexpr,
):  # fmt: skip
    """Of the loss, with respect to what each row contributes to it."""
    at, i = places(tl.program_id(0), BLOCK, rows)
    inside = at < rows
    reduced, derivative = _reduced(positive, margin, angle, i, margin_stride, ANGULAR, STRAIGHT)
    _, p = softplus(_difference(negative_lse, scale, reduced, i, scale_stride))
    if REDUCTION == NONE:
        g = tl.load(grad_loss + i)
    else:
        g = tl.load(grad_loss)
        if REDUCTION == MEAN:
            g = g / tl.load(counted)
    p = tl.where(tl.load(negative_lse + i) == float("-inf"), 0.0, p)
    s = tl.load(scale + i * scale_stride)
    tl.store(grad_negative_lse + at, g * p, mask=inside)
    tl.store(grad_positive + at, -g * p * s * derivative, mask=inside)
    tl.store(grad_scale + at, -g * p * reduced, mask=inside)
    tl.store(grad_margin + at, g * p * s, mask=inside)


@functools.lru_cache(maxsize=4096)
def _angle(angle_rad: float, beyond_pi: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Its numbers on the device, where they stay, as captured graphs read them; as arguments of a kernel they would be
    of 32 bits."""
    with torch.inference_mode(False):
        return torch.tensor(pieces(angle_rad, beyond_pi), dtype=dtype, device=device)


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
    angle_rad: float,
    beyond_pi: str,
    straight_through: bool,
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
    angle = _angle(angle_rad, beyond_pi, dtype, x.device) if angle_rad else margin  # not read
    with gpu.on(x):
        gpu.launch(
            _losses, (1,),
            *parts[:2], scale, margin, angle, target, loss, counted, rows,
            int(scale.dim() > 0), int(margin.dim() > 0), ignore_index, BLOCK=1024,
            REDUCTION=REDUCTIONS.index(reduction), ANGULAR=angle_rad != 0, DTYPE=numbers(x.dtype), num_warps=8,
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
    (rows, width), columns = x.shape, y.shape[0]
    positive, negative_lse, mean, weights, counted = _parts(saved.contiguous(), rows, columns, width, kept_blocks)
    scale, margin, grad_loss = scale.contiguous(), margin.contiguous(), grad_loss.contiguous()
    angle = _angle(angle_rad, beyond_pi, saved.dtype, x.device) if angle_rad else margin  # not read
    of_rows = torch.empty(4, rows, dtype=saved.dtype, device=x.device)
    if rows:
        with gpu.on(x):
            gpu.launch(
                _derivatives, (cdiv(rows, 256),),
                positive, negative_lse, scale, margin, angle, counted,
                grad_loss, *of_rows, rows, int(scale.dim() > 0), int(margin.dim() > 0), BLOCK=256,
                REDUCTION=REDUCTIONS.index(reduction), ANGULAR=angle_rad != 0, STRAIGHT=straight_through, num_warps=4,
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
