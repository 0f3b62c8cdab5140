"""Epilogues of `contrast` in Triton: the losses of all rows in one small kernel, their derivatives in another."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...backends.cpu import int64, row_factor
from ...backends.triton import launch
from ...backends.triton.constants import ABSENT_TARGET
from ...backends.triton.launch import cdiv
from ...backends.triton.tiles import block_offsets, numbers, softplus
from ...core.enums import BeyondPi, Reduction
from ...core.margins import pieces
from .epilogues import Epilogue
from .op import Contrast

TINY = tl.constexpr(2.0**-126)  # of float64, too: it only keeps a root and a quotient finite
MEAN, SUM, NONE = (tl.constexpr(int(option)) for option in Reduction)
INFO_NCE = tl.constexpr(int(Epilogue.INFO_NCE))


@triton.jit
def _reduced(positive, margin, angle, i, margin_stride, ANGULAR: tl.constexpr, STRAIGHT: tl.constexpr):
    """psi(u) - margin of the own class, and its derivative; that of a sine is 0, not infinite, at the poles.

    angle (7,): `fused_margins.core.margins.Pieces`.
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
def _log_odds(negative_lse, scale, reduced, i, scale_stride):
    """`fused_margins.core.reductions.log_odds` of the logit scale (psi(u) - margin)."""
    z = tl.load(scale + i * scale_stride) * reduced
    return tl.load(negative_lse + i) - z + 0.0 * tl.maximum(z, 0.0)


@triton.jit
def _losses(
    positive, negative_lse, scale, margin, angle, target, loss, counted, rows, scale_stride, margin_stride,
    ignore_index, BLOCK: tl.constexpr, EPILOGUE: tl.constexpr, REDUCTION: tl.constexpr, ANGULAR: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """The losses, or their sum or mean, by one program in a fixed order; and how many rows count."""
    total = tl.zeros((BLOCK,), DTYPE)
    count = tl.zeros((BLOCK,), DTYPE)
    for block in range(tl.cdiv(rows, BLOCK)):
        at, i = block_offsets(block, BLOCK, rows)
        inside = at < rows
        reduced, _ = _reduced(positive, margin, angle, i, margin_stride, ANGULAR, False)
        value, _ = softplus(_log_odds(negative_lse, scale, reduced, i, scale_stride))
        own = tl.load(target + i)
        has_loss = (own != ignore_index) & (own != ABSENT_TARGET)
        value = tl.where(has_loss, value, 0.0)
        if REDUCTION == NONE:
            tl.store(loss + at, value, mask=inside)
        total += tl.where(inside, value, 0.0)
        counts = inside & has_loss
        if EPILOGUE == INFO_NCE:
            counts = counts & (tl.load(negative_lse + i) != float("-inf"))
        count += tl.where(counts, 1.0, 0.0)
    rows_that_count = tl.maximum(tl.sum(count, 0), 1.0)
    tl.store(counted, rows_that_count)
    if REDUCTION == MEAN:
        tl.store(loss, tl.sum(total, 0) / rows_that_count)
    elif REDUCTION == SUM:
        tl.store(loss, tl.sum(total, 0))


@triton.jit
def _derivatives(
    positive, negative_lse, scale, margin, angle, target, counted, grad_loss, grad_positive, grad_negative_lse,
    grad_scale, grad_margin, rows, scale_stride, margin_stride, ignore_index, BLOCK: tl.constexpr,
    REDUCTION: tl.constexpr, ANGULAR: tl.constexpr, STRAIGHT: tl.constexpr,
):  # fmt: skip
    """Of the loss, with respect to what each row contributes to it."""
    at, i = block_offsets(tl.program_id(0), BLOCK, rows)
    inside = at < rows
    reduced, derivative = _reduced(positive, margin, angle, i, margin_stride, ANGULAR, STRAIGHT)
    _, p = softplus(_log_odds(negative_lse, scale, reduced, i, scale_stride))
    if REDUCTION == NONE:
        g = tl.load(grad_loss + i)
    else:
        g = tl.load(grad_loss)
        if REDUCTION == MEAN:
            g = g / tl.load(counted)
    own = tl.load(target + i)
    p = tl.where((own == ignore_index) | (own == ABSENT_TARGET), 0.0, p)
    s = tl.load(scale + i * scale_stride)
    tl.store(grad_negative_lse + at, g * p, mask=inside)
    tl.store(grad_positive + at, -g * p * s * derivative, mask=inside)
    tl.store(grad_scale + at, -g * p * reduced, mask=inside)
    tl.store(grad_margin + at, g * p * s, mask=inside)


@functools.lru_cache(maxsize=4096)
def _angle(angle_rad: float, beyond_pi: BeyondPi, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Its numbers on the device, where they stay, as captured graphs read them; as arguments of a kernel they would be
    of 32 bits."""
    with torch.inference_mode(False):
        return torch.tensor(pieces(angle_rad, beyond_pi), dtype=dtype, device=device)


def _inputs(a: Contrast, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scale, margin, pieces of the angle, and targets, as both kernels read them."""
    device = a.x.device
    scale, margin = row_factor(a.scale, dtype, device), row_factor(a.margin, dtype, device)
    angle = _angle(a.angle_rad, a.beyond_pi, dtype, device) if a.angle_rad else margin  # which is not read
    return scale, margin, angle, int64(a.target)


def losses(a: Contrast, positive: Tensor, negative_lse: Tensor, counted: Tensor) -> Tensor:
    """The loss, a scalar or (B,), of a call's two vectors; `counted` gets the number of rows that count."""
    rows, dtype = a.x.shape[0], positive.dtype
    loss = positive.new_empty((rows,) if a.reduction == Reduction.NONE else ())
    scale, margin, angle, target = _inputs(a, dtype)
    with launch.on(a.x):
        launch.launch(
            _losses, (1,),
            positive, negative_lse, scale, margin, angle, target, loss, counted, rows,
            int(scale.dim() > 0), int(margin.dim() > 0), a.ignore_index, BLOCK=1024, EPILOGUE=int(a.epilogue),
            REDUCTION=int(a.reduction), ANGULAR=a.angle_rad != 0, DTYPE=numbers(a.x.dtype), num_warps=8,
        )  # fmt: skip
    return loss


def derivatives(
    grad_loss: Tensor, a: Contrast, positive: Tensor, negative_lse: Tensor, counted: Tensor
) -> tuple[Tensor, ...]:
    """Gradients (B,) of positive and negative_lse, and of what each row had as scale and margin beside them."""
    rows = a.x.shape[0]
    of_rows = positive.new_empty(4, rows)
    if rows:
        scale, margin, angle, target = _inputs(a, positive.dtype)
        with launch.on(a.x):
            launch.launch(
                _derivatives, (cdiv(rows, 256),),
                positive, negative_lse, scale, margin, angle, target, counted,
                grad_loss, *of_rows, rows, int(scale.dim() > 0), int(margin.dim() > 0), a.ignore_index, BLOCK=256,
                REDUCTION=int(a.reduction), ANGULAR=a.angle_rad != 0, STRAIGHT=a.straight_through, num_warps=4,
            )  # fmt: skip
    return of_rows.unbind()
