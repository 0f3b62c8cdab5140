"""`scores` in Triton: one product with scale, margin and bias applied while its tiles are in registers."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import gpu, labels
from ..similarity import SIMILARITIES, accumulation_dtype
from ..triton_gradients import (
    BN,
    EUCLIDEAN_TILES,
    SIMILARITY_TILES,
    WEIGHT_TILES,
    Gradients,
    Tiles,
    fit,
    numbers,
    vector_block,
)  # fmt: skip
from ..triton_tiles import (
    COSINE,
    EUCLIDEAN,
    INVALID,
    index_status,
    inverse_lengths,
    places,
    products,
    similarities,
)  # fmt: skip


@triton.jit
def _factors(a, factor, count, width, row, column, BLOCK: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr):
    at, i = places(tl.program_id(0), BLOCK, count)
    tl.store(factor + at, inverse_lengths(a, i, width, row, column, BLOCK, BK, DTYPE), mask=at < count)


@triton.jit
def _tile_of_u(
    x, y, x_factor, y_factor, i, j, width, x_row, x_column, y_row, y_column,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, SIMILARITY: tl.constexpr,
    NORMALIZE: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    of_x = tl.full((BM,), 1.0, DTYPE)
    of_y = tl.full((BN,), 1.0, DTYPE)
    if SIMILARITY == COSINE:
        of_x = tl.load(x_factor + i)
        of_y = tl.load(y_factor + j)
    acc = products(
        x, y, i, j, width, x_row, x_column, y_row, y_column, of_x, of_y,
        BM, BN, BK, EVEN, SIMILARITY, NORMALIZE, PRECISION, DTYPE,
    )  # fmt: skip
    return similarities(acc, of_x, of_y, SIMILARITY, NORMALIZE), of_x, of_y


@triton.jit
def _scores(
    x, y, x_factor, y_factor, scale, bias, margin, target, out,
    rows, columns, width, x_row, x_column, y_row, y_column, scale_stride, margin_stride, ignore_index, row_blocks,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, SIMILARITY: tl.constexpr,
    NORMALIZE: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    block, tile = tl.program_id(0) % row_blocks, tl.program_id(0) // row_blocks
    at_rows, i = places(block, BM, rows)
    at_columns, j = places(tile, BN, columns)
    u, _, _ = _tile_of_u(
        x, y, x_factor, y_factor, i, j, width, x_row, x_column, y_row, y_column,
        BM, BN, BK, EVEN, SIMILARITY, NORMALIZE, PRECISION, DTYPE,
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
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, SIMILARITY: tl.constexpr,
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
    of_x = tl.full((BM,), 1.0, DTYPE)
    of_y = tl.full((BN,), 1.0, DTYPE)
    if SIMILARITY == COSINE:
        of_x = tl.load(x_factor + i)
        of_y = tl.load(y_factor + j)
    g = grad * factor[:, None]
    if OF_SCALE or (SIMILARITY == COSINE and OF_Y):
        u, _, _ = _tile_of_u(
            x, y, x_factor, y_factor, i, j, width, x_row, x_column, y_row, y_column,
            BM, BN, BK, EVEN, SIMILARITY, NORMALIZE, PRECISION, DTYPE,
        )  # fmt: skip
        if SIMILARITY == COSINE and OF_Y:
            tl.store(column_sums + block * chunk + here, tl.sum(tl.where(inside, g * u, 0.0), 0))
        if OF_SCALE:
            if target is not None:
                u -= tl.where(chosen, tl.load(margin + i * margin_stride)[:, None], 0.0)
            tl.store(
                scale_sums + tile * rows + at_rows, tl.sum(tl.where(inside, grad * u, 0.0), 1), mask=at_rows < rows
            )
    if OF_MARGIN:
        tl.store(margin_sums + tile * rows + at_rows, -tl.sum(tl.where(chosen, g, 0.0), 1), mask=at_rows < rows)
    if OF_BIAS:
        tl.store(bias_sums + block * chunk + here, tl.sum(grad, 0))
    if SIMILARITY == COSINE:
        w = g * of_x[:, None] * of_y[None, :]
    elif SIMILARITY == EUCLIDEAN:
        w = 2 * g
    else:
        w = g
    w = (w * tl.load(unit)).to(weights.dtype.element_ty)
    tl.store(weights + at_rows.to(tl.int64)[:, None] * chunk + here[None, :], w, mask=(at_rows < rows)[:, None])
    if SIMILARITY == EUCLIDEAN:
        tl.store(row_sums + tile * rows + at_rows, tl.sum(w.to(DTYPE), 1), mask=at_rows < rows)
        if OF_Y:
            tl.store(column_sums + block * chunk + here, tl.sum(w.to(DTYPE), 0))


# With a tile of incoming gradients in registers, too, float32 has room for fewer rows.
TILES = WEIGHT_TILES | {torch.float32: Tiles(32, 16, 4, 3)}


class _Problem(NamedTuple):
    """Inputs as the kernels read them, and their compile-time options."""

    x_factor: Tensor
    y_factor: Tensor
    target: Tensor | None
    row_block: int
    options: dict[str, Any]


def _prepare(table: dict[torch.dtype, Tiles], x: Tensor, y: Tensor, target: Tensor | None, similarity: str) -> _Problem:
    euclidean = similarity == SIMILARITIES[EUCLIDEAN.value]
    rows, width = x.shape
    tiles = fit(EUCLIDEAN_TILES if euclidean else table[x.dtype], rows)
    cosine, number = similarity == "cosine", numbers(x.dtype)
    factors = []
    for t in (x, y):
        factor = torch.empty(t.shape[0] if cosine else 0, dtype=accumulation_dtype(x.dtype), device=x.device)
        if cosine:
            gpu.launch(
                _factors,
                (triton.cdiv(t.shape[0], 16),),
                t,
                factor,
                t.shape[0],
                width,
                *t.stride(),
                BLOCK=16,
                BK=vector_block(width),
                DTYPE=number,
                num_warps=4,
            )
        factors.append(factor)
    options = {
        "BM": tiles.BM,
        "BN": BN,
        "BK": tiles.BK,
        "EVEN": width > 0 and width % tiles.BK == 0,
        "SIMILARITY": SIMILARITIES.index(similarity),
        "NORMALIZE": cosine and x.dtype in (torch.float32, torch.float64),
        "PRECISION": gpu.precision(x.dtype),
        "DTYPE": number,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }
    target = None if target is None else target.to(torch.int64).contiguous()
    return _Problem(factors[0], factors[1], target, tiles.BM, options)


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
        problem = _prepare(SIMILARITY_TILES, x, y, target, similarity)
        row_blocks = triton.cdiv(rows, problem.row_block)
        gpu.launch(
            _scores, (row_blocks * triton.cdiv(columns, BN),),
            x, y, problem.x_factor, problem.y_factor, scale, bias, margin, problem.target, out, rows, columns, width,
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
        problem = _prepare(TILES, x, y, target, similarity)
        row_blocks = triton.cdiv(rows, problem.row_block)
        unit = _unit(grad_scores, scale, problem, similarity)
        both = Gradients(x, y, similarity, of_x, of_y, problem.x_factor, problem.y_factor, unit, row_blocks)
        bias_sums = new(row_blocks, both.chunk) if of_bias else new(0)
        scale_sums, margin_sums = (new(both.chunk_tiles, rows) if need else new(0) for need in (of_scale, of_margin))
        for first in range(0, both.tiles, both.chunk_tiles):
            count = min(both.chunk_tiles, both.tiles - first)
            gpu.launch(
                _weights, (row_blocks, count),
                grad_scores, x, y, problem.x_factor, problem.y_factor, scale, margin, problem.target, unit,
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


def _unit(grad_scores: Tensor, scale: Tensor, problem: _Problem, similarity: str) -> Tensor:
    """What W is multiplied by before it is rounded: for float16 the power of two that makes its largest entry fit."""
    one = torch.ones((), dtype=scale.dtype, device=scale.device)
    if grad_scores.dtype != torch.float16:
        return one
    largest = grad_scores.abs().amax().to(scale.dtype) * scale.amax()
    if similarity == "cosine":
        largest = largest * problem.x_factor.amax() * problem.y_factor.amax()
    exponent = torch.floor(torch.log2(2.0**13 / largest)).clamp(-100, 100)
    return torch.where(largest > 0, torch.exp2(exponent), one)
