"""`contrast` in Triton where all columns fit one tile, as the classes of few-shot data do: three launches both ways.

A program has its rows whole: the forward makes their similarities and what becomes of them, factors included, and
`triton_epilogue` sums the losses. Of W (see `fused_margins.backends.triton.gradients`) nothing is written: a tile of
it is a few instructions an entry from saved similarities, and each program of the backward makes what it multiplies,
for some entries of the gradients, of a block of rows or of all columns. Similarities that no budget lets be saved each
makes again.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...backends.cpu import int64
from ...backends.cpu import row_factor as row_factor_of
from ...backends.triton import launch
from ...backends.triton.constants import COSINE, DOT, EUCLIDEAN, IGNORED, INVALID
from ...backends.triton.launch import Part, cdiv
from ...backends.triton.tiles import (
    TILES,
    Tiles,
    block_offsets,
    dot,
    factors,
    factors_of,
    half_similarities,
    row_factor,
    target_status,
    tile_options,
)
from ...core.enums import Similarity
from ...core.similarity import accumulation_dtype
from . import triton_epilogue
from .op import Contrast
from .triton_epilogue import of_losses, store_losses
from .triton_kernels import LN2, LOG2E
from .triton_saved import Plan, Saved

# W stays in registers while it is multiplied, in float32 by three products of its parts.
FEW_TILES = TILES | {torch.float32: Tiles(16, 16, 4, 3)}
# Entries of gradients a program: few, since there are few rows and every program of a GPU may have some.
FEW_BD = {torch.bfloat16: 64, torch.float32: 32, torch.float64: 16}


@triton.jit
def few_forward(
    x, y, target, scale, margin, angle, smoothing, x_factor, y_factor, row_target, negative_lse, similarities, losses,
    derivatives, rows, columns, width, x_row, x_column, y_row, y_column, scale_stride, margin_stride, ignore_index,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, LOADS: tl.constexpr, SIMILARITY: tl.constexpr,
    NORMALIZE: tl.constexpr, PRECISION: tl.constexpr, ANGULAR: tl.constexpr, STRAIGHT: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """The losses of a block of rows, and what the backward needs."""
    block = tl.program_id(0)
    at_rows, i = block_offsets(block, BM, rows)
    at_columns, j = block_offsets(0, BN, columns)
    inside, there = at_rows < rows, at_columns < columns
    own = target_status(tl.load(target + i), columns, ignore_index)
    of_x = factors_of(x, i, width, x_row, x_column, BM, BK, SIMILARITY, DTYPE)
    of_y = factors_of(y, j, width, y_row, y_column, BN, BK, SIMILARITY, DTYPE)
    if SIMILARITY == COSINE:
        tl.store(x_factor + at_rows, of_x, mask=inside)
        tl.store(y_factor + at_columns, of_y, mask=there & (block == 0))
    t = half_similarities(
        x, y, block, 0, i, j, of_x, of_y, width, x_row, x_column, y_row, y_column,
        BM, BN, BK, LOADS, SIMILARITY, NORMALIZE, PRECISION, DTYPE,
    )  # fmt: skip
    if similarities is not None:
        tl.store(similarities + i[:, None] * BN + tl.arange(0, BN)[None, :], t, mask=inside[:, None])
    u = t * row_factor(of_x, SIMILARITY, NORMALIZE)[:, None]
    chosen = own[:, None] == at_columns[None, :]
    of_own = tl.where(own == INVALID, float("nan"), tl.sum(tl.where(chosen, u, 0.0), 1))
    s = tl.load(scale + i * scale_stride)
    z = tl.where(chosen | ~there[None, :], float("-inf"), u * (s * LOG2E)[:, None])
    maximum = tl.max(z, 1)
    shift = tl.where(maximum == float("-inf"), 0.0, maximum)
    total = tl.sum(tl.exp2(z - shift[:, None]), 1)
    lse = tl.where((total == 0) | (own == IGNORED), float("-inf"), (shift + tl.log2(total)) * LN2)
    lse = tl.where((own != INVALID) & (s > 0), lse, float("nan"))
    tl.store(row_target + at_rows, own, mask=inside)
    tl.store(negative_lse + at_rows, lse, mask=inside)
    of_all = of_own
    if smoothing is not None:
        of_all = tl.sum(tl.where(there[None, :], u, 0.0), 1)
    store_losses(
        of_own, of_all, lse, own, s, margin, angle, smoothing, losses, derivatives, at_rows, i, rows, columns,
        margin_stride, ANGULAR, STRAIGHT,
    )  # fmt: skip


@triton.jit
def _weights(
    x, y, scale, smoothing, x_factor, row_target, negative_lse, similarities, derivatives, counted, grad_loss, block,
    j, there, of_y, rows, columns, width, x_row, x_column, y_row, y_column, scale_stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, LOADS: tl.constexpr, SIMILARITY: tl.constexpr,
    NORMALIZE: tl.constexpr, REDUCTION: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Of a block of rows W (BM, BN), as it is multiplied; what it is of before its columns have their factors; the
    similarities but for `row_factor`; the rows' factors, the gradients of their losses, and what the others' logits
    contribute to that of the scale.
    """
    at_rows, i = block_offsets(block, BM, rows)
    inside = at_rows < rows
    own, lse = tl.load(row_target + i), tl.load(negative_lse + i)
    s = tl.load(scale + i * scale_stride)
    has_loss = (own >= 0) & inside  # an invalid row has a loss of NaN, no gradient
    each = tl.cdiv(rows, 4).to(tl.int64) * 4
    g = tl.where(has_loss, of_losses(grad_loss, counted, i, REDUCTION), tl.zeros((BM,), DTYPE))
    of_own = g * tl.load(derivatives + each + i)
    nothing = (lse == float("-inf")) | ~has_loss
    outer = tl.where(nothing, 0.0, g * tl.load(derivatives + i))
    of_each = tl.zeros((BM,), DTYPE)  # smoothing's: g e / C
    if smoothing is not None:
        of_each = g * tl.load(smoothing) / columns
    of_x = factors(x_factor, i, BM, SIMILARITY, DTYPE)
    of_row = row_factor(of_x, SIMILARITY, NORMALIZE)
    if similarities is not None:
        t = tl.load(similarities + i[:, None] * BN + tl.arange(0, BN)[None, :])
    else:
        t = half_similarities(
            x, y, block, 0, i, j, of_x, of_y, width, x_row, x_column, y_row, y_column,
            BM, BN, BK, LOADS, SIMILARITY, NORMALIZE, PRECISION, DTYPE,
        )  # fmt: skip
    t = tl.where(there[None, :], t, 0.0)
    chosen = own[:, None] == tl.arange(0, BN)[None, :]
    shift = tl.where(nothing, float("inf"), lse * LOG2E)  # exp of minus infinity: such a row has no weights
    q = tl.exp2(t * (s * LOG2E * of_row)[:, None] - shift[:, None])
    of_z = tl.where(there[None, :] & ~chosen, q * outer[:, None] - of_each[:, None], 0.0)  # of the other logits
    by_scale = tl.sum(of_z * t, 1) * of_row
    w = tl.where(chosen, of_own[:, None], of_z * s[:, None])
    if SIMILARITY == EUCLIDEAN:
        w *= 2
    w = w * of_x[:, None]
    if SIMILARITY == COSINE:
        rounded = (w * of_y[None, :]).to(x.dtype.element_ty)
    else:
        rounded = w.to(x.dtype.element_ty)
    return rounded, w, t, of_x, g, by_scale


@triton.jit
def few_backward(
    x, y, scale, smoothing, x_factor, y_factor, row_target, negative_lse, similarities, derivatives, counted, grad_loss,
    grad_x, grad_y, grad_scale, grad_margin, rows, columns, width, x_row, x_column, y_row, y_column, scale_stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, LOADS: tl.constexpr,
    SIMILARITY: tl.constexpr, NORMALIZE: tl.constexpr, EUCLIDEAN_SHIFT: tl.constexpr, REDUCTION: tl.constexpr,
    PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """BD entries of a gradient: the first programs' W^T x, of all columns, minus a multiple of y; the others', of a
    block of rows, W y minus a multiple of x."""
    slices = tl.cdiv(width, BD)
    program = tl.program_id(0) - slices
    at_columns, j = block_offsets(0, BN, columns)
    there = at_columns < columns
    of_y = factors(y_factor, j, BN, SIMILARITY, DTYPE)
    at_d = (tl.program_id(0) % slices) * BD + tl.arange(0, BD)
    d, here = at_d.to(tl.int64), at_d < width
    origin = tl.zeros((BD,), DTYPE)
    if EUCLIDEAN_SHIFT:
        origin = tl.load(y + d * y_column, mask=here, other=0.0)
    y_tile = y + j[:, None] * y_row + d[None, :] * y_column
    if program < 0:
        if grad_y is not None:
            of_columns = tl.zeros((BN, BD), DTYPE)
            along_y = tl.zeros((BN,), DTYPE)
            # One step at a time: several take more shared memory than an AMD GPU has.
            for block in tl.range(tl.cdiv(rows, BM), num_stages=1):
                rounded, w, t, of_x, _, _ = _weights(
                    x, y, scale, smoothing, x_factor, row_target, negative_lse, similarities, derivatives, counted,
                    grad_loss, block, j, there, of_y, rows, columns, width, x_row, x_column, y_row, y_column,
                    scale_stride, BM, BN, BK, LOADS, SIMILARITY, NORMALIZE, REDUCTION, PRECISION, DTYPE,
                )  # fmt: skip
                if SIMILARITY == EUCLIDEAN:
                    along_y += tl.sum(rounded.to(DTYPE), 0)
                elif SIMILARITY == COSINE:  # <y, W^T x> / |y|, of the weights as they are rounded
                    if NORMALIZE:
                        t = t * tl.where(of_x > 0, 1 / tl.where(of_x > 0, of_x, 1.0), 0.0)[:, None]
                        along_y += tl.sum(w * t, 0) * of_y
                    else:
                        along_y += tl.sum(rounded.to(DTYPE) * t, 0)
                _, i = block_offsets(block, BM, rows)
                a = tl.load(x + i[:, None] * x_row + d[None, :] * x_column, mask=here[None, :], other=0.0)
                if EUCLIDEAN_SHIFT:
                    a -= origin[None, :]
                of_columns = dot(tl.trans(rounded), a, of_columns, PRECISION, DTYPE)
            if SIMILARITY == COSINE:
                along_y *= of_y
            if SIMILARITY != DOT:
                own = tl.load(y_tile, mask=here[None, :], other=0.0).to(DTYPE)
                of_columns -= along_y[:, None] * (own - origin[None, :])
            tl.store(
                grad_y + j[:, None] * width + at_d[None, :],
                of_columns.to(grad_y.dtype.element_ty),
                mask=there[:, None] & here[None, :],
            )
    else:
        block = program // slices
        at_rows, i = block_offsets(block, BM, rows)
        inside = at_rows < rows
        rounded, w, t, of_x, g, by_scale = _weights(
            x, y, scale, smoothing, x_factor, row_target, negative_lse, similarities, derivatives, counted, grad_loss,
            block, j, there, of_y, rows, columns, width, x_row, x_column, y_row, y_column, scale_stride,
            BM, BN, BK, LOADS, SIMILARITY, NORMALIZE, REDUCTION, PRECISION, DTYPE,
        )  # fmt: skip
        first, each = inside & (program % slices == 0), tl.cdiv(rows, 4).to(tl.int64) * 4
        if grad_scale is not None:
            tl.store(grad_scale + at_rows, by_scale + g * tl.load(derivatives + 2 * each + i), mask=first)
        if grad_margin is not None:
            tl.store(grad_margin + at_rows, g * tl.load(derivatives + 3 * each + i), mask=first)
        if grad_x is not None:
            b = tl.load(y_tile, mask=here[None, :], other=0.0)
            if EUCLIDEAN_SHIFT:
                b -= origin[None, :]
            of_rows = dot(rounded, b, tl.zeros((BM, BD), DTYPE), PRECISION, DTYPE)
            if SIMILARITY != DOT:
                if SIMILARITY == EUCLIDEAN:
                    along_x = tl.sum(rounded.to(DTYPE), 1)
                elif NORMALIZE:  # <x, W y> / |x|^2
                    along_x = tl.sum(w * t, 1) * of_x
                else:
                    length = tl.where(of_y > 0, 1 / tl.where(of_y > 0, of_y, 1.0), 0.0)
                    along_x = tl.sum(rounded.to(DTYPE) * t * length[None, :], 1) * of_x * of_x
                a = tl.load(x + i[:, None] * x_row + d[None, :] * x_column, mask=here[None, :], other=0.0)
                of_rows -= along_x[:, None] * (a.to(DTYPE) - origin[None, :])
            tl.store(
                grad_x + i[:, None] * width + at_d[None, :],
                of_rows.to(grad_x.dtype.element_ty),
                mask=inside[:, None] & here[None, :],
            )


def options(a: Contrast) -> dict[str, Any]:
    """What both kernels are compiled for: tiles as wide as there are columns."""
    wide = max(16, 1 << (a.y.shape[0] - 1).bit_length())
    return tile_options(FEW_TILES, a.x, a.y, a.similarity) | {"BN": wide}


def forward(a: Contrast, target: Tensor, ignore_index: int, parts: Saved, plan: Plan, losses: Tensor | Part) -> None:
    """Write the losses of rows, of checked targets, and what the backward needs."""
    (rows, width), columns, options = a.x.shape, a.y.shape[0], _options_now(a, plan)
    scale, smoothing = row_factor_of(a.scale, accumulation_dtype(a.x.dtype), a.x.device), triton_epilogue.smoothing(a)
    margin, angle = triton_epilogue.margin_and_angle(a, scale.dtype)
    with launch.on(a.x):
        launch.launch(
            few_forward, (cdiv(rows, options["BM"]),),
            a.x, a.y, int64(target), scale, margin, angle, smoothing, parts.x_factor, parts.y_factor, parts.target,
            parts.negative_lse, parts.similarities if plan.blocks else None, losses, parts.derivatives,
            rows, columns, width, *a.x.stride(), *a.y.stride(), int(scale.dim() > 0), int(margin.dim() > 0),
            ignore_index, ANGULAR=a.angle_rad != 0, STRAIGHT=a.straight_through, **options,
        )  # fmt: skip


def _options_now(a: Contrast, plan: Plan) -> dict[str, Any]:
    """Those of the plan, but for what a setting of torch may have changed since."""
    assert plan.few is not None
    return plan.few if a.x.dtype != torch.float32 else {**plan.few, "PRECISION": launch.precision(a.x.dtype)}


def backward(
    grad_loss: Tensor, a: Contrast, parts: Saved, plan: Plan, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of x and y, and of what each row has as scale and margin, those that are needed."""
    (rows, width), columns = a.x.shape, a.y.shape[0]
    scale, smoothing = row_factor_of(a.scale, accumulation_dtype(a.x.dtype), a.x.device), triton_epilogue.smoothing(a)
    options, depth = _options_now(a, plan), FEW_BD[a.x.dtype]
    euclidean = a.similarity == Similarity.NEGATIVE_SQUARED_EUCLIDEAN
    shifts = euclidean and a.x.dtype.itemsize >= 4
    of_matrices = [a.x.new_empty(t.shape) if need else None for t, need in zip((a.x, a.y), needs)]
    of_rows = [scale.new_empty(rows) if need else None for need in needs[2:]]
    with launch.on(a.x):
        launch.launch(
            few_backward, ((cdiv(rows, options["BM"]) + 1) * cdiv(width, depth),),
            a.x, a.y, scale, smoothing, parts.x_factor, parts.y_factor, parts.target, parts.negative_lse,
            parts.similarities if plan.blocks else None, parts.derivatives, parts.counted, grad_loss, *of_matrices,
            *of_rows, rows, columns, width, *a.x.stride(), *a.y.stride(), int(scale.dim() > 0),
            BD=depth, EUCLIDEAN_SHIFT=shifts, REDUCTION=int(a.reduction), **options,
        )  # fmt: skip
    return *of_matrices, *of_rows
