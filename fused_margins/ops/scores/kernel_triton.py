"""`scores` in Triton: one product with scale, margin and bias applied while its tiles are in registers."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import gpu, labels
from ..gpu import cdiv
from ..native import int64
from ..similarity import accumulation_dtype
from ..triton_gradients import Gradients, store_weights, unit, weight_factor
from ..triton_tiles import (
    BN,
    COSINE,
    DESCRIBED_TILES,
    EUCLIDEAN,
    INVALID,
    TILES,
    Tiles,
    factors,
    half_similarities,
    index_status,
    places,
    row_factor,
    sides,
    similarities,
    store_factors,
    tile_options,
)


@triton.jit
def _scores(
    x, y, x_factor, y_factor, scale, bias, margin, target, out,
    rows, columns, width, x_row, x_column, y_row, y_column, scale_stride, margin_stride, ignore_index, row_blocks,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, LOADS: tl.constexpr, SIMILARITY: tl.constexpr,
    NORMALIZE: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    block, tile = tl.program_id(0) % row_blocks, tl.program_id(0) // row_blocks
    at_rows, i = places(block, BM, rows)
    at_columns, j = places(tile, BN, columns)
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
    tl.store(to, z.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _weights(
    grad_scores, x, y, x_factor, y_factor, scale, margin, target, unit,
    weights, column_sums, row_sums, scale_sums, margin_sums, bias_sums,
    rows, columns, width, x_row, x_column, y_row, y_column, scale_stride, margin_stride, ignore_index,
    first_tile, chunk,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, LOADS: tl.constexpr, SIMILARITY: tl.constexpr,
    OF_Y: tl.constexpr, OF_SCALE: tl.constexpr, OF_MARGIN: tl.constexpr, OF_BIAS: tl.constexpr,
    NORMALIZE: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """A tile of W (see `fused_margins.ops.triton_gradients`), and sums for the gradients of scale, margin and bias."""
    block, tile = tl.program_id(0), tl.program_id(1)
    at_rows, i = places(block, BM, rows)
    at_columns, j = places(first_tile + tile, BN, columns)
    inside = (at_rows < rows)[:, None] & (at_columns < columns)[None, :]
    here = tile * BN + tl.arange(0, BN)
    grad = tl.load(grad_scores + i[:, None] * columns + j[None, :]).to(DTYPE)
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
    sums = store_weights(
        g * weight_factor(of_x, unit, SIMILARITY)[:, None], t, of_x, of_y, weights, column_sums, at_rows, rows,
        block, tile, chunk, BM, BN, LOADS, SIMILARITY, NORMALIZE, OF_Y, DTYPE,
    )  # fmt: skip
    if SIMILARITY == EUCLIDEAN:
        tl.store(row_sums + tile * rows + at_rows, sums, mask=at_rows < rows)


# With a tile of incoming gradients in registers, too, float32 has room for fewer rows and float64 needs more warps.
BACKWARD_TILES = TILES | {torch.float32: Tiles(32, 16, 4, 3), torch.float64: Tiles(16, 16, 8, 1)}


class _Problem(NamedTuple):
    """Inputs as the kernels read them, and their compile-time options."""

    x_factor: Tensor
    y_factor: Tensor
    target: Tensor | None
    options: dict[str, Any]


def _prepare(
    table: dict[torch.dtype, Tiles], x: Tensor, y: Tensor, target: Tensor | None, similarity: str,
    with_descriptors: Tiles | None = None,
) -> _Problem:  # fmt: skip
    factors = []
    for t in (x, y):
        size = t.shape[0] if similarity == "cosine" else 0
        factors.append(torch.empty(size, dtype=accumulation_dtype(x.dtype), device=x.device))
        if size:
            store_factors(t, factors[-1])
    return _Problem(factors[0], factors[1], int64(target), tile_options(table, x, y, similarity, with_descriptors))


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
    (rows, width), columns = x.shape, y.shape[0]
    if target is not None and labels.raises_everywhere():
        target, ignore_index = labels.check_index(target, columns, ignore_index, "target"), labels.IGNORED
    out = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    scale, margin, bias = scale.contiguous(), margin.contiguous(), None if bias is None else bias.contiguous()
    with gpu.on(x):
        problem = _prepare(TILES, x, y, target, similarity, DESCRIBED_TILES)
        row_blocks = cdiv(rows, problem.options["BM"])
        gpu.launch(
            _scores, (row_blocks * cdiv(columns, BN),),
            *sides(x, y, problem.options), problem.x_factor, problem.y_factor, scale, bias, margin, problem.target, out,
            rows, columns, width,
            *x.stride(), *y.stride(), int(scale.dim() > 0), int(margin.dim() > 0), ignore_index, row_blocks,
            **problem.options,
        )  # fmt: skip
    return out


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
    (rows, width), columns = x.shape, y.shape[0]
    of_x, of_y, of_scale, of_bias, of_margin = (n and not (i == 3 and bias is None) for i, n in enumerate(needs))

    def new(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=accumulation_dtype(x.dtype), device=x.device)

    grad_bias = new(columns if of_bias else 0)
    grad_scale, grad_margin = (
        new(*(t.shape if need else (0,))) for t, need in ((scale, of_scale), (margin, of_margin))
    )
    if not (rows and columns):
        empty = [
            torch.zeros(t.shape if need else 0, dtype=t.dtype, device=t.device) for t, need in ((x, of_x), (y, of_y))
        ]
        return empty[0], empty[1], grad_scale, grad_bias, grad_margin
    scale, margin, grad_scores = scale.contiguous(), margin.contiguous(), grad_scores.contiguous()
    with gpu.on(x):
        problem = _prepare(BACKWARD_TILES, x, y, target, similarity)
        row_blocks = cdiv(rows, problem.options["BM"])
        of_w = unit(x, lambda: _largest_weight(grad_scores, scale, problem, similarity))
        both = Gradients(x, y, similarity, of_x, of_y, problem.x_factor, problem.y_factor, of_w, row_blocks)
        bias_sums = new(row_blocks, both.chunk) if of_bias else new(0)
        scale_sums, margin_sums = (new(both.chunk_tiles, rows) if need else new(0) for need in (of_scale, of_margin))
        for first in range(0, both.tiles, both.chunk_tiles):
            count = min(both.chunk_tiles, both.tiles - first)
            gpu.launch(
                _weights, (row_blocks, count),
                grad_scores, x, y, problem.x_factor, problem.y_factor, scale, margin, problem.target, both.unit,
                both.weights, both.column_sums, both.row_sums, scale_sums, margin_sums, bias_sums,
                rows, columns, width, *x.stride(), *y.stride(), int(scale.dim() > 0), int(margin.dim() > 0),
                ignore_index, first, both.chunk, OF_Y=of_y, OF_SCALE=of_scale, OF_MARGIN=of_margin, OF_BIAS=of_bias,
                **problem.options,
            )  # fmt: skip
            both.add(first, count)
            if of_bias:
                inside = slice(first * BN, min((first + count) * BN, columns))
                grad_bias[inside] = bias_sums.sum(0)[: inside.stop - inside.start]
            for total, sums, like in ((grad_scale, scale_sums, scale), (grad_margin, margin_sums, margin)):
                if sums.numel():
                    total += sums[:count].sum(0) if like.dim() else sums[:count].sum()
        grad_x, grad_y = both.finish()
    return grad_x, grad_y, grad_scale, grad_bias, grad_margin


def _largest_weight(grad_scores: Tensor, scale: Tensor, problem: _Problem, similarity: str) -> Tensor:
    """A bound of |W|."""
    largest = grad_scores.abs().amax().to(scale.dtype) * scale.amax()
    return largest * problem.x_factor.amax() * problem.y_factor.amax() if similarity == "cosine" else largest
