"""Epilogues of `contrast` in Triton: losses and their derivatives where a kernel has the rows, and losses summed."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...backends.cpu import row_factor
from ...backends.triton import launch
from ...backends.triton.constants import ABSENT, IGNORED
from ...backends.triton.launch import Part
from ...backends.triton.tiles import block_offsets, numbers, softplus
from ...core.enums import BeyondPi, Reduction
from ...core.margins import pieces
from ...core.similarity import accumulation_dtype
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
def store_losses(
    u, of_all, lse, own, s, margin, angle, smoothing, losses, derivatives, at, i, rows, columns, margin_stride,
    ANGULAR: tl.constexpr, STRAIGHT: tl.constexpr,
):  # fmt: skip
    """Of a block of rows the losses, and their derivatives by the log-sum-exp, by the positive's similarity u, and by
    what the positive's logit s (psi(u) - margin) has as scale and margin. Returns psi'.

    u, lse, s (BLOCK,); of_all (BLOCK,): with smoothing the sum of a row's similarities. derivatives: (4, rows rounded
    up to 4); 0 in rows that have no loss, or one of NaN for a target that does not exist.
    """
    inside, has_loss = at < rows, (own != IGNORED) & (own != ABSENT)
    reduced, derivative = reduced_similarity(u, margin, angle, i, margin_stride, ANGULAR, STRAIGHT)
    z = s * reduced
    value, p = softplus(lse - z + 0.0 * tl.maximum(z, 0.0))  # as `fused_margins.core.reductions.log_odds` has it
    along = p  # minus the derivative by the positive's logit
    if smoothing is not None:
        share = tl.load(smoothing)
        value += share * s * (reduced - (of_all - u + reduced) / columns)
        along = p - share + share / columns
    tl.store(losses + at, tl.where(has_loss, value, 0.0), mask=inside)
    of_own, to = own >= 0, derivatives + at
    each = tl.cdiv(rows, 4).to(tl.int64) * 4
    tl.store(to, tl.where(of_own, p, 0.0), mask=inside)
    tl.store(to + each, tl.where(of_own, -along * s * derivative, 0.0), mask=inside)
    tl.store(to + 2 * each, tl.where(of_own, -along * reduced, 0.0), mask=inside)
    tl.store(to + 3 * each, tl.where(of_own, along * s, 0.0), mask=inside)
    return derivative


@triton.jit
def _reduce_losses(
    losses, negative_lse, row_target, reduced, counted, rows, BLOCK: tl.constexpr, EPILOGUE: tl.constexpr,
    REDUCTION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Their sum or mean, by one program in a fixed order; and how many rows count."""
    total = tl.zeros((BLOCK,), DTYPE)
    count = tl.zeros((BLOCK,), DTYPE)
    for block in range(tl.cdiv(rows, BLOCK)):
        at, i = block_offsets(block, BLOCK, rows)
        own = tl.load(row_target + i)
        counts = (at < rows) & (own != IGNORED) & (own != ABSENT)
        if EPILOGUE == INFO_NCE:
            counts = counts & (tl.load(negative_lse + i) != float("-inf"))
        total += tl.where(at < rows, tl.load(losses + i), 0.0)
        count += tl.where(counts, 1.0, 0.0)
    rows_that_count = tl.maximum(tl.sum(count, 0), 1.0)
    tl.store(counted, rows_that_count)
    if REDUCTION == MEAN:
        tl.store(reduced, tl.sum(total, 0) / rows_that_count)
    else:
        tl.store(reduced, tl.sum(total, 0))


@triton.jit
def of_losses(grad_loss, counted, i, REDUCTION: tl.constexpr):
    """The gradient of each row's loss, (BLOCK,) or one for all."""
    if REDUCTION == NONE:
        return tl.load(grad_loss + i)
    elif REDUCTION == MEAN:
        return tl.load(grad_loss) / tl.load(counted)
    else:
        return tl.load(grad_loss)


@functools.lru_cache(maxsize=4096)
def _angle(angle_rad: float, beyond_pi: BeyondPi, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Its numbers on the device, where they stay, as captured graphs read them; as arguments of a kernel they would be
    of 32 bits."""
    with torch.inference_mode(False):
        return torch.tensor(pieces(angle_rad, beyond_pi), dtype=dtype, device=device)


def margin_and_angle(a: Contrast, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The margin and the pieces of the angle, as the kernels read them."""
    margin = row_factor(a.margin, dtype, a.x.device)
    return margin, _angle(a.angle_rad, a.beyond_pi, dtype, a.x.device) if a.angle_rad else margin  # which is not read


def smoothing(a: Contrast) -> Tensor | None:
    """As the kernels read it."""
    return row_factor(a.smoothing, accumulation_dtype(a.x.dtype), a.x.device) if a.smoothing else None


def reduced(a: Contrast, losses: Part, parts: Saved, saved: Tensor) -> Tensor:
    """The sum or mean of the losses of rows; `parts.counted` gets the number of rows that count."""
    loss = saved.new_empty(())
    with launch.on(a.x):
        launch.launch(
            _reduce_losses, (1,),
            losses, parts.negative_lse, parts.target, loss, parts.counted, a.x.shape[0], BLOCK=1024,
            EPILOGUE=int(a.epilogue), REDUCTION=int(a.reduction), DTYPE=numbers(a.x.dtype), num_warps=8,
        )  # fmt: skip
    return loss


def of_each_loss(a: Contrast, parts: Saved) -> tuple[Part, Part]:
    """Its gradients of negative_lse and of positive."""
    rows = a.x.shape[0]
    return parts.derivatives.slice(0, rows), parts.derivatives.slice(parts.derivatives.size // 4, rows)


def derivatives(grad_loss: Tensor, a: Contrast, parts: Saved, *numbers: int) -> list[Tensor]:
    """(B,) each: those of what `store_losses` saved, times the gradient of each row's loss."""
    saved, of_rows = parts.derivatives.tensor().view(4, -1), of_each_row(grad_loss, a, parts)
    return [saved[n, : a.x.shape[0]] * of_rows for n in numbers]


def of_each_row(grad_loss: Tensor, a: Contrast, parts: Saved) -> Tensor:
    """The gradient of each row's loss, (B,) or one for all."""
    return grad_loss / parts.counted.tensor()[0] if a.reduction == Reduction.MEAN else grad_loss
