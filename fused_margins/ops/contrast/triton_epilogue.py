"""Epilogues of `contrast` in Triton: the losses of all rows in one small kernel, their derivatives in another."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...backends.cpu import row_factor
from ...backends.triton import launch
from ...backends.triton.constants import ABSENT, IGNORED
from ...backends.triton.launch import cdiv
from ...backends.triton.tiles import block_offsets, numbers, softplus
from ...core.enums import BeyondPi, Reduction
from ...core.margins import pieces
from .epilogues import Epilogue
from .op import Contrast
from .triton_saved import Saved

TINY = tl.constexpr(2.0**-126)  # of float64, too: it only keeps a root and a quotient finite
MEAN, SUM, NONE = (tl.constexpr(int(option)) for option in Reduction)
INFO_NCE = tl.constexpr(int(Epilogue.INFO_NCE))


@triton.jit
def reduced_similarity(u, margin, angle, i, margin_stride, ANGULAR: tl.constexpr, STRAIGHT: tl.constexpr):
    """psi(u) - margin of an own class's u, and its derivative; that of a sine is 0, not infinite, at the poles.

    u: (BLOCK,). angle (7,): `fused_margins.core.margins.Pieces`.
    """
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
    positive, negative_lse, scale, margin, angle, row_target, smoothed, loss, counted, exponentials, rows, scale_stride,
    margin_stride, kept, exponentials_row, BLOCK: tl.constexpr, EPILOGUE: tl.constexpr, REDUCTION: tl.constexpr,
    ANGULAR: tl.constexpr, STRAIGHT: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The losses, or their sum or mean, by one program in a fixed order; and how many rows count.

    Where exponentials are kept, the positive's gets what makes its derivative that of the others times the same factor
    of the row, s p / S: minus S psi', S the row's sum.
    """
    total = tl.zeros((BLOCK,), DTYPE)
    count = tl.zeros((BLOCK,), DTYPE)
    for block in range(tl.cdiv(rows, BLOCK)):
        at, i = block_offsets(block, BLOCK, rows)
        inside = at < rows
        reduced, derivative = reduced_similarity(
            tl.load(positive + i), margin, angle, i, margin_stride, ANGULAR, STRAIGHT
        )
        value, _ = softplus(_log_odds(negative_lse, scale, reduced, i, scale_stride))
        own = tl.load(row_target + i)
        has_loss = (own != IGNORED) & (own != ABSENT)
        if smoothed is not None:
            value += tl.load(smoothed + i)
        value = tl.where(has_loss, value, 0.0)
        if REDUCTION == NONE:
            tl.store(loss + at, value, mask=inside)
        total += tl.where(inside, value, 0.0)
        counts = inside & has_loss
        if EPILOGUE == INFO_NCE:
            counts = counts & (tl.load(negative_lse + i) != float("-inf"))
        count += tl.where(counts, 1.0, 0.0)
        if exponentials is not None:
            here = inside & (own >= 0) & (own < kept)
            to = exponentials + i * exponentials_row + own
            # In float32: of a row that its positive dominates all but the rounding of the two cancels.
            among = tl.load(to, mask=here, other=0.0) != 0
            z = tl.load(scale + i * scale_stride) * tl.load(positive + i)
            entry = tl.where(among, tl.exp(z), 0.0) - tl.exp(tl.load(negative_lse + i)) * derivative
            tl.store(to, entry.to(tl.bfloat16), mask=here)
    rows_that_count = tl.maximum(tl.sum(count, 0), 1.0)
    tl.store(counted, rows_that_count)
    if REDUCTION == MEAN:
        tl.store(loss, tl.sum(total, 0) / rows_that_count)
    elif REDUCTION == SUM:
        tl.store(loss, tl.sum(total, 0))


@triton.jit
def of_negatives(negative_lse, scale, reduced, row_target, i, scale_stride):
    """p, the derivative of each row's loss by its log-sum-exp; 0 where it has no loss."""
    _, p = softplus(_log_odds(negative_lse, scale, reduced, i, scale_stride))
    own = tl.load(row_target + i)
    return tl.where((own == IGNORED) | (own == ABSENT), 0.0, p)


@triton.jit
def of_losses(grad_loss, counted, i, REDUCTION: tl.constexpr):
    """The gradient of each row's loss, (BLOCK,) or one for all."""
    if REDUCTION == NONE:
        return tl.load(grad_loss + i)
    elif REDUCTION == MEAN:
        return tl.load(grad_loss) / tl.load(counted)
    else:
        return tl.load(grad_loss)


@triton.jit
def _derivatives(
    positive, negative_lse, scale, margin, angle, row_target, counted, grad_loss, grad_positive, grad_negative_lse,
    grad_scale, grad_margin, rows, scale_stride, margin_stride, BLOCK: tl.constexpr, REDUCTION: tl.constexpr,
    ANGULAR: tl.constexpr, STRAIGHT: tl.constexpr,
):  # fmt: skip
    """Of the loss, with respect to what each row contributes to it."""
    at, i = block_offsets(tl.program_id(0), BLOCK, rows)
    inside = at < rows
    reduced, derivative = reduced_similarity(tl.load(positive + i), margin, angle, i, margin_stride, ANGULAR, STRAIGHT)
    p = of_negatives(negative_lse, scale, reduced, row_target, i, scale_stride)
    g = of_losses(grad_loss, counted, i, REDUCTION)
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


def inputs(a: Contrast, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """scale, margin and pieces of the angle, as the kernels read them."""
    device = a.x.device
    scale, margin = row_factor(a.scale, dtype, device), row_factor(a.margin, dtype, device)
    return (
        scale,
        margin,
        _angle(a.angle_rad, a.beyond_pi, dtype, device) if a.angle_rad else margin,
    )  # which is not read


def losses(a: Contrast, parts: Saved, exponentials: Tensor | None = None, smoothed: Tensor | None = None) -> Tensor:
    """The loss, a scalar or (B,), of a call's two vectors; `parts.counted` gets the number of rows that count.

    smoothed: (B,) what smoothing adds to the losses.
    """
    rows, dtype = a.x.shape[0], parts.positive.dtype
    loss = parts.positive.new_empty((rows,) if a.reduction == Reduction.NONE else ())
    scale, margin, angle = inputs(a, dtype)
    kept, stride = (
        (0, 0) if exponentials is None else (min(a.y.shape[0], exponentials.shape[1]), exponentials.stride(0))
    )
    with launch.on(a.x):
        launch.launch(
            _losses, (1,),
            parts.positive, parts.negative_lse, scale, margin, angle, parts.target, smoothed, loss, parts.counted,
            exponentials, rows, int(scale.dim() > 0), int(margin.dim() > 0), kept, stride, BLOCK=1024,
            EPILOGUE=int(a.epilogue), REDUCTION=int(a.reduction), ANGULAR=a.angle_rad != 0,
            STRAIGHT=a.straight_through, DTYPE=numbers(a.x.dtype), num_warps=8,
        )  # fmt: skip
    return loss


def derivatives(grad_loss: Tensor, a: Contrast, parts: Saved) -> tuple[Tensor, ...]:
    """Gradients (B,) of positive and negative_lse, and of what each row had as scale and margin beside them."""
    rows = a.x.shape[0]
    of_rows = parts.positive.new_empty(4, rows)
    if rows:
        scale, margin, angle = inputs(a, parts.positive.dtype)
        with launch.on(a.x):
            launch.launch(
                _derivatives, (cdiv(rows, 256),),
                parts.positive, parts.negative_lse, scale, margin, angle, parts.target, parts.counted,
                grad_loss, *of_rows, rows, int(scale.dim() > 0), int(margin.dim() > 0), BLOCK=256,
                REDUCTION=int(a.reduction), ANGULAR=a.angle_rad != 0, STRAIGHT=a.straight_through, num_warps=4,
            )  # fmt: skip
    return of_rows.unbind()
