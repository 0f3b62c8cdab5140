"""`contrast` in Triton where all columns fit one tile, as the classes of few-shot data do: four launches both ways.

A program has its rows whole: the forward makes their similarities and what becomes of them, factors included, and
`triton_epilogue` sums the losses; the backward makes W (see `fused_margins.backends.triton.gradients`) and the gradient
of x, and `columns_gradient` that of y. Labels are smoothed here, since the mean over all columns is at hand.
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
from ...backends.triton.constants import BN, COSINE, DOT, IGNORED, INVALID, MASKED, WHOLE
from ...backends.triton.gradients import (
    BD,
    PRODUCT_TILES,
    columns_gradient,
    gradient_scale,
    store_weights,
    weight_factor,
)
from ...backends.triton.launch import cdiv
from ...backends.triton.tiles import (
    TILES,
    Tiles,
    block_offsets,
    dot,
    factors,
    fit,
    half_similarities,
    inverse_lengths,
    row_factor,
    target_status,
    tile_options,
)
from ...core.enums import Similarity
from . import triton_epilogue
from .epilogues import Epilogue
from .op import Contrast
from .triton_epilogue import of_losses, of_negatives, reduced_similarity
from .triton_kernels import LN2, LOG2E
from .triton_saved import Saved, is_plain

most_columns = BN  # a test may ask for the path of more columns
# W stays in registers while it is multiplied, in float32 by three products of its parts.
FEW_TILES = TILES | {torch.float32: Tiles(32, 16, 8, 3)}


def takes(a: Contrast) -> bool:
    """Whether a call goes this way: a loss of targets alone. float16 would ask how large W is before it is made."""
    of_loss = a.epilogue != Epilogue.NONE and is_plain(a) and a.group_size == 1 and a.x.dtype != torch.float16
    return of_loss and min(a.x.shape) > 0 and 0 < a.y.shape[0] <= most_columns


@triton.jit
def few_forward(
    x, y, target, scale, margin, angle, smoothing, x_factor, y_factor, row_target, positive, negative_lse, similarities,
    smoothed, rows, columns, width, x_row, x_column, y_row, y_column, scale_stride, margin_stride, ignore_index,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, LOADS: tl.constexpr, SIMILARITY: tl.constexpr,
    NORMALIZE: tl.constexpr, PRECISION: tl.constexpr, ANGULAR: tl.constexpr, STRAIGHT: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Both vectors of a block of rows, what the backward needs, and of smoothing what it adds to their losses."""
    block = tl.program_id(0)
    at_rows, i = block_offsets(block, BM, rows)
    at_columns, j = block_offsets(0, BN, columns)
    inside, there = at_rows < rows, at_columns < columns
    own = target_status(tl.load(target + i), columns, ignore_index)
    of_x, of_y = tl.full((BM,), 1.0, DTYPE), tl.full((BN,), 1.0, DTYPE)
    if SIMILARITY == COSINE:
        of_x = inverse_lengths(x, i, width, x_row, x_column, BM, BK, DTYPE)
        of_y = inverse_lengths(y, j, width, y_row, y_column, BN, BK, DTYPE)
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
    tl.store(positive + at_rows, of_own, mask=inside)
    tl.store(negative_lse + at_rows, lse, mask=inside)
    if smoothing is not None:
        of_all = tl.sum(tl.where(there[None, :], u, 0.0), 1)
        reduced, _ = reduced_similarity(of_own, margin, angle, i, margin_stride, ANGULAR, STRAIGHT)
        mean = (of_all - of_own + reduced) / columns
        tl.store(smoothed + at_rows, tl.load(smoothing) * s * (reduced - mean), mask=inside)


@triton.jit
def few_backward(
    x, y, x_factor, y_factor, scale, margin, angle, smoothing, row_target, positive, negative_lse, similarities,
    counted, grad_loss, one, weights, column_sums, grad_x, grad_scale, grad_margin,
    rows, columns, width, x_row, x_column, y_row, y_column, scale_stride, margin_stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, LOADS: tl.constexpr,
    SIMILARITY: tl.constexpr, NORMALIZE: tl.constexpr, EUCLIDEAN_SHIFT: tl.constexpr, REDUCTION: tl.constexpr,
    ANGULAR: tl.constexpr, STRAIGHT: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """W of a block of rows, and their gradient: W y minus a multiple of x, BD entries at a time.

    Programs that share rows take such parts in turn and write the same W and sums. Where similarities are made again
    there is one program, so that they are made once.
    """
    block = tl.program_id(0)
    at_rows, i = block_offsets(block, BM, rows)
    at_columns, j = block_offsets(0, BN, columns)
    inside, there = at_rows < rows, at_columns < columns
    own, lse = tl.load(row_target + i), tl.load(negative_lse + i)
    s = tl.load(scale + i * scale_stride)
    reduced, derivative = reduced_similarity(tl.load(positive + i), margin, angle, i, margin_stride, ANGULAR, STRAIGHT)
    g = of_losses(grad_loss, counted, i, REDUCTION)
    p = g * of_negatives(negative_lse, scale, reduced, row_target, i, scale_stride)
    # An invalid row has a loss of NaN, no gradient.
    nothing = (lse == float("-inf")) | (~inside) | (own == IGNORED) | (own == INVALID)
    has_target = (own >= 0) & inside
    outer = tl.where(nothing, 0.0, p)
    along_z = tl.where(has_target, p, 0.0)  # minus the derivative by the own logit
    of_each = tl.zeros((BM,), DTYPE)  # smoothing's: g e / C
    if smoothing is not None:
        even = tl.where(has_target, g * tl.load(smoothing), tl.zeros((BM,), DTYPE))
        of_each = even / columns
        along_z = along_z - even + of_each
    of_x = factors(x_factor, i, BM, SIMILARITY, DTYPE)
    of_y = factors(y_factor, j, BN, SIMILARITY, DTYPE)
    of_row = row_factor(of_x, SIMILARITY, NORMALIZE)
    if similarities is not None:
        t = tl.load(similarities + i[:, None] * BN + tl.arange(0, BN)[None, :])
    else:
        t = half_similarities(
            x, y, block, 0, i, j, of_x, of_y, width, x_row, x_column, y_row, y_column,
            BM, BN, BK, LOADS, SIMILARITY, NORMALIZE, PRECISION, DTYPE,
        )  # fmt: skip
    t = tl.where(there[None, :], t, 0.0)
    chosen = own[:, None] == at_columns[None, :]
    others = there[None, :] & ~chosen
    shift = tl.where(nothing, float("inf"), lse * LOG2E)  # exp of minus infinity: such a row has no weights
    q = tl.exp2(t * (s * LOG2E * of_row)[:, None] - shift[:, None])
    of_z = tl.where(others, q * outer[:, None] - of_each[:, None], 0.0)  # of the other logits
    if grad_scale is not None:
        tl.store(grad_scale + at_rows, tl.sum(of_z * t, 1) * of_row - along_z * reduced, mask=inside)
    if grad_margin is not None:
        tl.store(grad_margin + at_rows, along_z * s, mask=inside)
    w = tl.where(chosen, -(along_z * derivative)[:, None], of_z)
    w = w * (s * weight_factor(of_x, one, SIMILARITY))[:, None]
    rounded, sums = store_weights(
        w, t, of_x, of_y, weights, column_sums, at_rows, rows, block, 0, BN,
        BM, BN, MASKED, SIMILARITY, NORMALIZE, True, DTYPE,
    )  # fmt: skip
    if grad_x is not None:
        multiple = sums
        if SIMILARITY == COSINE:  # <x, W y> / |x|^2, of the weights as they are rounded
            if NORMALIZE:
                multiple = tl.sum(w * t, 1) * of_x
            else:
                length = tl.where(of_y > 0, 1 / tl.where(of_y > 0, of_y, 1.0), 0.0)
                multiple = tl.sum(rounded.to(DTYPE) * t * length[None, :], 1) * of_x * of_x
        # One step at a time: several take more shared memory than an AMD GPU has.
        for first in tl.range(tl.program_id(1) * BD, width, tl.num_programs(1) * BD, num_stages=1):
            at_d = first + tl.arange(0, BD)
            d = at_d.to(tl.int64)
            origin = tl.zeros((BD,), DTYPE)
            if EUCLIDEAN_SHIFT:
                origin = tl.load(y + d * y_column, mask=at_d < width, other=0.0)
            b = tl.load(y + j[:, None] * y_row + d[None, :] * y_column, mask=(at_d < width)[None, :], other=0.0)
            if EUCLIDEAN_SHIFT:
                b -= origin[None, :]
            acc = dot(rounded, b, tl.zeros((BM, BD), DTYPE), PRECISION, DTYPE)
            if SIMILARITY != DOT:
                a = tl.load(x + i[:, None] * x_row + d[None, :] * x_column, mask=(at_d < width)[None, :], other=0.0)
                acc -= multiple[:, None] * (a.to(DTYPE) - origin[None, :])
            to = grad_x + i[:, None] * width + at_d[None, :]
            tl.store(to, acc.to(grad_x.dtype.element_ty), mask=inside[:, None] & (at_d < width)[None, :])


def _options(a: Contrast) -> dict[str, Any]:
    """What both kernels are compiled for: tiles as wide as there are columns."""
    wide = max(16, 1 << (a.y.shape[0] - 1).bit_length())
    of_angle = {"ANGULAR": a.angle_rad != 0, "STRAIGHT": a.straight_through}
    return tile_options(FEW_TILES, a.x, a.y, a.similarity) | {"BN": wide} | of_angle


def forward(a: Contrast, target: Tensor, ignore_index: int, parts: Saved, saves: bool) -> Tensor:
    """The loss, a scalar or (B,), of checked targets."""
    (rows, width), columns = a.x.shape, a.y.shape[0]
    scale, margin, angle = triton_epilogue.inputs(a, parts.positive.dtype)
    options = _options(a)
    smoothing = row_factor_of(a.smoothing, parts.positive.dtype, a.x.device) if a.smoothing else None
    smoothed = parts.positive.new_empty(rows) if a.smoothing else None
    with launch.on(a.x):
        launch.launch(
            few_forward, (cdiv(rows, options["BM"]),),
            a.x, a.y, int64(target), scale, margin, angle, smoothing, parts.x_factor, parts.y_factor, parts.target,
            parts.positive, parts.negative_lse, parts.similarities if saves else None, smoothed, rows, columns, width,
            *a.x.stride(), *a.y.stride(), int(scale.dim() > 0), int(margin.dim() > 0), ignore_index, **options,
        )  # fmt: skip
    return triton_epilogue.losses(a, parts, smoothed=smoothed)


def backward(
    grad_loss: Tensor, a: Contrast, parts: Saved, is_saved: bool, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of x and y, and of what each row has as scale and margin, those that are needed."""
    (rows, width), columns, dtype = a.x.shape, a.y.shape[0], parts.positive.dtype
    of_x, of_y, of_scale, of_margin = needs
    scale, margin, angle = triton_epilogue.inputs(a, dtype)
    smoothing = row_factor_of(a.smoothing, dtype, a.x.device) if a.smoothing else None
    options = _options(a)
    blocks, depth = cdiv(rows, options["BM"]), BD[a.x.dtype]
    euclidean = a.similarity == Similarity.NEGATIVE_SQUARED_EUCLIDEAN
    shifts = euclidean and a.x.dtype.itemsize >= 4
    one = gradient_scale(a.x, lambda: scale)
    weights = a.x.new_empty(rows, options["BN"])
    column_sums = parts.positive.new_empty(blocks, options["BN"])
    grad_x, grad_y = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (a.x, a.y))
    rows_of_scale, rows_of_margin = (parts.positive.new_empty(rows) if need else None for need in (of_scale, of_margin))
    sizes = rows, columns, width, *a.x.stride(), *a.y.stride()
    with launch.on(a.x):
        launch.launch(
            few_backward, (blocks, cdiv(width, depth) if of_x and is_saved else 1),
            a.x, a.y, parts.x_factor, parts.y_factor, scale, margin, angle, smoothing, parts.target, parts.positive,
            parts.negative_lse, parts.similarities if is_saved else None, parts.counted, grad_loss, one, weights,
            column_sums, grad_x if of_x else None, rows_of_scale, rows_of_margin, *sizes, int(scale.dim() > 0),
            int(margin.dim() > 0), BD=depth, EUCLIDEAN_SHIFT=shifts, REDUCTION=int(a.reduction), **options,
        )  # fmt: skip
        if of_y:
            tiles = fit(PRODUCT_TILES[a.x.dtype], rows)
            whole = rows % tiles.BK == 0 and width % depth == 0
            launch.launch(
                columns_gradient, (cdiv(width, depth), 1),
                weights, a.x, a.y, parts.y_factor, column_sums, one, grad_y, *sizes, 0, options["BN"], blocks,
                BN=options["BN"], BD=depth, BK=tiles.BK, LOADS=(WHOLE if whole else MASKED).value,
                SIMILARITY=options["SIMILARITY"], EUCLIDEAN_SHIFT=shifts, PRECISION=options["PRECISION"],
                DTYPE=options["DTYPE"], num_warps=tiles.num_warps, num_stages=tiles.num_stages,
            )  # fmt: skip
    return grad_x if of_x else None, grad_y if of_y else None, rows_of_scale, rows_of_margin
