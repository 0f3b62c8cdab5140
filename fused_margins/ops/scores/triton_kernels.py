"""What runs on the GPU of `scores`: see ``kernel_triton.py``, which launches it."""

import triton
import triton.language as tl

from ...backends.triton.constants import COSINE, EUCLIDEAN, INVALID
from ...backends.triton.gradients import store_weights, weight_factor
from ...backends.triton.tiles import block_offsets, factors, half_similarities, index_status, row_factor, similarities


@triton.jit
def scores(
    x, y, x_factor, y_factor, scale, bias, margin, target, out,
    rows, columns, width, x_row, x_column, y_row, y_column, scale_stride, margin_stride, ignore_index, row_blocks,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, LOADS: tl.constexpr, SIMILARITY: tl.constexpr,
    NORMALIZE: tl.constexpr, NEGATED: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """A tile of the matrix; NEGATED: of its negative, whose zeros are positive."""
    block, tile = tl.program_id(0) % row_blocks, tl.program_id(0) // row_blocks
    at_rows, i = block_offsets(block, BM, rows)
    at_columns, j = block_offsets(tile, BN, columns)
    of_x, of_y = factors(x_factor, i, BM, SIMILARITY, DTYPE), factors(y_factor, j, BN, SIMILARITY, DTYPE)
    u = similarities(
        x, y, block, tile, i, j, of_x, of_y, width, x_row, x_column, y_row, y_column,
        BM, BN, BK, LOADS, SIMILARITY, NORMALIZE, PRECISION, DTYPE,
    )  # fmt: skip
    factor = tl.load(scale + i * scale_stride)
    factor = tl.where(factor > 0, factor, float("nan"))
    if target is not None:
        own = index_status(tl.load(target + i), columns, ignore_index)
        u -= tl.where(own[:, None] == at_columns[None, :], tl.load(margin + i * margin_stride)[:, None], 0.0)
        factor = tl.where(own == INVALID, float("nan"), factor)
    z = u * factor[:, None]
    if bias is not None:
        z += tl.load(bias + j)[None, :]
    to = out + i[:, None] * columns + at_columns[None, :]
    inside = (at_rows < rows)[:, None] & (at_columns < columns)[None, :]
    if NEGATED:
        z = 0 - z
    z = z.to(out.dtype.element_ty)
    if NEGATED:  # what a narrow dtype rounds to zero
        z = tl.where(z == 0, 0.0, z)
    tl.store(to, z, mask=inside)


@triton.jit
def weights(
    grad_scores, x, y, x_factor, y_factor, scale, margin, target, gradient_scale,
    weights, column_sums, row_sums, scale_sums, margin_sums, bias_sums,
    rows, columns, width, x_row, x_column, y_row, y_column, scale_stride, margin_stride, ignore_index,
    first_tile, chunk,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, LOADS: tl.constexpr, SIMILARITY: tl.constexpr,
    OF_Y: tl.constexpr, OF_SCALE: tl.constexpr, OF_MARGIN: tl.constexpr, OF_BIAS: tl.constexpr,
    NORMALIZE: tl.constexpr, NEGATED: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """A tile of W (see `fused_margins.backends.triton.gradients`); sums for the gradients of scale, margin and bias."""
    block, tile = tl.program_id(0), tl.program_id(1)
    at_rows, i = block_offsets(block, BM, rows)
    at_columns, j = block_offsets(first_tile + tile, BN, columns)
    inside = (at_rows < rows)[:, None] & (at_columns < columns)[None, :]
    here = tile * BN + tl.arange(0, BN)
    grad = tl.load(grad_scores + i[:, None] * columns + j[None, :]).to(DTYPE)
    if NEGATED:
        grad = -grad
    grad = tl.where(inside, grad, 0.0)
    factor = tl.load(scale + i * scale_stride)
    chosen = inside & False
    if target is not None:
        own = index_status(tl.load(target + i), columns, ignore_index)
        grad = tl.where((own == INVALID)[:, None], 0.0, grad)
        chosen = inside & (own[:, None] == at_columns[None, :])
    of_x, of_y = factors(x_factor, i, BM, SIMILARITY, DTYPE), factors(y_factor, j, BN, SIMILARITY, DTYPE)
    g = grad * factor[:, None]
    t = g  # which nobody reads where neither factors nor the scale have a gradient
    if OF_SCALE or (SIMILARITY == COSINE and OF_Y):
        t = half_similarities(
            x, y, block, first_tile + tile, i, j, of_x, of_y, width, x_row, x_column, y_row, y_column,
            BM, BN, BK, LOADS, SIMILARITY, NORMALIZE, PRECISION, DTYPE,
        )  # fmt: skip
    if OF_SCALE:
        above = t * row_factor(of_x, SIMILARITY, NORMALIZE)[:, None]
        if target is not None:
            above -= tl.where(chosen, tl.load(margin + i * margin_stride)[:, None], 0.0)
        tl.store(scale_sums + tile * rows + at_rows, tl.sum(grad * above, 1), mask=at_rows < rows)
    if OF_MARGIN:
        tl.store(margin_sums + tile * rows + at_rows, -tl.sum(tl.where(chosen, g, 0.0), 1), mask=at_rows < rows)
    if OF_BIAS:
        tl.store(bias_sums + block * chunk + here, tl.sum(grad, 0))
    _, sums = store_weights(
        g * weight_factor(of_x, gradient_scale, SIMILARITY)[:, None], t, of_x, of_y, weights, column_sums, at_rows,
        rows, block, tile, chunk, BM, BN, LOADS, SIMILARITY, NORMALIZE, OF_Y, DTYPE,
    )  # fmt: skip
    if SIMILARITY == EUCLIDEAN:
        tl.store(row_sums + tile * rows + at_rows, sums, mask=at_rows < rows)
