"""Both gradients of a similarity matrix from W, chunk by chunk of columns, in Triton.

W (rows x chunk) holds dL/du, times what makes W^T x and W y the gradients but for a multiple of each vector itself:

    cosine      W_ij = G_ij / (|x_i| |y_j|)    grad y_j = (W^T x)_j - y_j sum_i G_ij u_ij / |y_j|^2
    dot         W_ij = G_ij                    grad y_j = (W^T x)_j
    Euclidean   W_ij = 2 G_ij                  grad y_j = (W^T x)_j - y_j sum_i W_ij

and likewise for x. An op's own kernel writes a chunk of W, in the dtype of x, which stays in the L2 cache;
`columns_gradient` makes the gradient of the chunk's y of it, `_rows` adds to that of x. Sums run in a fixed order,
without atomics.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.enums import Similarity
from ...core.similarity import accumulation_dtype
from . import launch
from .constants import BN, COSINE, DOT, EUCLIDEAN, MASKED, TMA, WHOLE
from .launch import Part, cdiv
from .tiles import Tiles, block_offsets, dot, fit, load, numbers, vector_block

CHUNK_BYTES = 100 * 2**20  # of W, which goes through the L2 cache of a large GPU; smaller ones are more launches


@triton.jit
def weight_factor(of_x, gradient_scale, SIMILARITY: tl.constexpr):
    """What makes W of G in a whole row, (BM,)."""
    if SIMILARITY == EUCLIDEAN:
        return of_x * (2 * tl.load(gradient_scale))
    else:
        return of_x * tl.load(gradient_scale)


@triton.jit
def store_weights(
    w, t, of_x, of_y, weights, column_sums, at_rows, rows, block, tile, chunk,
    BM: tl.constexpr, BN: tl.constexpr, LOADS: tl.constexpr, SIMILARITY: tl.constexpr, NORMALIZE: tl.constexpr,
    OF_Y: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """A tile of W from G times `weight_factor`, which is 0 beyond the matrix, and the sums that the multiples of y are
    made of; t: `half_similarities`. Back come W as it is stored and, for Euclidean distances, the sums that the
    multiples of x are made of, (BM,)."""
    here = tile * BN + tl.arange(0, BN)
    if SIMILARITY == COSINE:
        if OF_Y:
            if NORMALIZE:
                t = t * tl.where(of_x > 0, 1 / tl.where(of_x > 0, of_x, 1.0), 0.0)[:, None]
            tl.store(column_sums + block * chunk + here, tl.sum(w * t, 0))
        w = w * of_y[None, :]
    sums = of_x
    if LOADS == TMA:
        w = w.to(weights.dtype)
        weights.store([block * BM, tile * BN], w)
    else:
        w = w.to(weights.dtype.element_ty)
        tl.store(weights + at_rows.to(tl.int64)[:, None] * chunk + here[None, :], w, mask=(at_rows < rows)[:, None])
        if SIMILARITY == EUCLIDEAN:  # of the rounded weights, so that differences cancel as they should
            sums = tl.sum(w.to(DTYPE), 1)
            if OF_Y:
                tl.store(column_sums + block * chunk + here, tl.sum(w.to(DTYPE), 0))
    return w, sums


@triton.jit
def columns_gradient(
    weights, x, y, y_factor, column_sums, gradient_scale, grad_y,
    rows, columns, width, x_row, x_column, y_row, y_column, first_column, chunk, blocks,
    BN: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, LOADS: tl.constexpr, SIMILARITY: tl.constexpr,
    EUCLIDEAN_SHIFT: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of y, (BN, BD): W^T x minus a multiple of y."""
    d_block, tile = tl.program_id(0), tl.program_id(1)
    here = tile * BN + tl.arange(0, BN)
    at_d = d_block * BD + tl.arange(0, BD)
    d = at_d.to(tl.int64)
    acc = tl.zeros((BN, BD), DTYPE)
    origin = tl.zeros((BD,), DTYPE)
    if EUCLIDEAN_SHIFT:
        origin = tl.load(y + d * y_column, mask=at_d < width, other=0.0)
    if LOADS == TMA:
        for start in range(0, rows, BK):
            a = weights.load([start, tile * BN]).T
            acc = dot(a, x.load([start, d_block * BD]), acc, PRECISION, DTYPE)
    else:
        k = tl.arange(0, BK)
        w_tile = weights + k[None, :].to(tl.int64) * chunk + here[:, None]
        x_tile = x + k[:, None].to(tl.int64) * x_row + d[None, :] * x_column
        for start in range(0, rows, BK):
            # Whole: neither rows nor entries end within a tile.
            a = load(w_tile, start + k[None, :] < rows, LOADS)
            b = load(x_tile, (start + k[:, None] < rows) & (at_d < width)[None, :], LOADS)
            if EUCLIDEAN_SHIFT:
                b -= origin[None, :]
            acc = dot(a, b, acc, PRECISION, DTYPE)
            w_tile += BK * chunk
            x_tile += BK * x_row
    acc = acc / tl.load(gradient_scale)
    at_columns, j = block_offsets((first_column // BN) + tile, BN, columns)
    if SIMILARITY != DOT:
        multiple = tl.zeros((BN,), DTYPE)
        for block in range(blocks):
            multiple += tl.load(column_sums + block * chunk + here)
        multiple /= tl.load(gradient_scale)
        if SIMILARITY == COSINE:
            of_y = tl.load(y_factor + j)
            multiple *= of_y * of_y
        own = tl.load(y + j[:, None] * y_row + d[None, :] * y_column, mask=(at_d < width)[None, :], other=0.0).to(DTYPE)
        acc -= multiple[:, None] * (own - origin[None, :])
    to = grad_y + j[:, None] * width + at_d[None, :]
    tl.store(to, acc.to(grad_y.dtype.element_ty), mask=(at_columns < columns)[:, None] & (at_d < width)[None, :])


@triton.jit
def _rows(
    weights, y, partial, rows, columns, width, y_row, y_column, first_column, here, chunk, each,
    BM: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, ADD: tl.constexpr, LOADS: tl.constexpr,
    EUCLIDEAN_SHIFT: tl.constexpr, PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """A share's part of W y, (BM, BD), added to what the chunks before have left."""
    block, d_block, share = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    at_rows, i = block_offsets(block, BM, rows)
    at_d = d_block * BD + tl.arange(0, BD)
    d = at_d.to(tl.int64)
    first = share * each
    last = tl.minimum(first + each, here)
    to = partial + (share * rows + i[:, None]) * width + at_d[None, :]
    mask = (at_rows < rows)[:, None] & (at_d < width)[None, :]
    acc = tl.zeros((BM, BD), DTYPE)
    if ADD:  # now, while nothing else is held
        acc = tl.load(to, mask=mask, other=0.0)
    if LOADS == TMA:  # zeros beyond the last y
        for start in range(first, last, BK):
            a = weights.load([block * BM, start])
            acc = dot(a, y.load([first_column + start, d_block * BD]), acc, PRECISION, DTYPE)
    else:
        k = tl.arange(0, BK)
        origin = tl.zeros((BD,), DTYPE)
        if EUCLIDEAN_SHIFT:
            origin = tl.load(y + d * y_column, mask=at_d < width, other=0.0)
        w_tile = weights + i[:, None] * chunk + first + k[None, :]
        for start in range(first, last, BK):
            # W is 0 in columns beyond the last, which read the last y.
            j = tl.minimum(first_column + start + k, columns - 1).to(tl.int64)
            y_tile = y + j[:, None] * y_row + d[None, :] * y_column
            a = tl.load(w_tile)
            b = load(y_tile, (at_d < width)[None, :], LOADS)
            if EUCLIDEAN_SHIFT:
                b -= origin[None, :]
            acc = dot(a, b, acc, PRECISION, DTYPE)
            w_tile += BK
    tl.store(to, acc, mask=mask)


@triton.jit
def _finish_rows(
    partial, x, y, x_factor, row_sums, gradient_scale, grad_x, rows, width, x_row, x_column, y_column, shares,
    BLOCK: tl.constexpr, BD: tl.constexpr, SIMILARITY: tl.constexpr, EUCLIDEAN_SHIFT: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Gradient of x: the shares of W y in their order, minus a multiple of x."""
    at, i = block_offsets(tl.program_id(0), BLOCK, rows)
    by = 1.0 / tl.load(gradient_scale)
    multiple = tl.zeros((BLOCK,), DTYPE)
    if SIMILARITY == COSINE:
        along = tl.zeros((BLOCK, BD), DTYPE)
        for start in range(0, width, BD):
            d = start + tl.arange(0, BD)[None, :]
            inside = d < width
            v = tl.zeros((BLOCK, BD), DTYPE)
            for share in range(shares):
                v += tl.load(partial + (share * rows + i[:, None]) * width + d, mask=inside, other=0.0)
            u = tl.load(x + i[:, None] * x_row + d.to(tl.int64) * x_column, mask=inside, other=0.0).to(DTYPE)
            along += u * v
        of_x = tl.load(x_factor + i)
        multiple = tl.sum(along, 1) * of_x * of_x
    elif SIMILARITY == EUCLIDEAN:
        multiple = tl.load(row_sums + i)
    for start in range(0, width, BD):
        d = start + tl.arange(0, BD)[None, :]
        inside = d < width
        v = tl.zeros((BLOCK, BD), DTYPE)
        for share in range(shares):
            v += tl.load(partial + (share * rows + i[:, None]) * width + d, mask=inside, other=0.0)
        if SIMILARITY != DOT:
            u = tl.load(x + i[:, None] * x_row + d.to(tl.int64) * x_column, mask=inside, other=0.0).to(DTYPE)
            if EUCLIDEAN_SHIFT:
                u -= tl.load(y + d.to(tl.int64) * y_column, mask=inside, other=0.0)
            v -= u * multiple[:, None]
        to = grad_x + i[:, None] * width + d
        tl.store(to, (v * by).to(grad_x.dtype.element_ty), mask=(at < rows)[:, None] & inside)


# By dtype: rows of x of a tile, depth of a step; BD columns of x or y at once.
PRODUCT_TILES = {
    torch.bfloat16: Tiles(128, 64, 8, 3),
    torch.float16: Tiles(128, 64, 8, 3),
    torch.float32: Tiles(128, 32, 8, 3),
    torch.float64: Tiles(32, 16, 8, 1),
}
TMA_PRODUCT = Tiles(128, 64, 4, 3)
BD = {torch.bfloat16: 128, torch.float16: 128, torch.float32: 64, torch.float64: 32}


class Gradients:
    """Of x and y of a call, where they are needed. gradient_scale: what the function of this name gives.

    An op writes `weights` (rows, chunk), `column_sums` (row blocks, chunk), where the similarity has such, and
    `row_sums` (tiles of the chunk, rows) for Euclidean distances; then `add` takes them up.
    """

    def __init__(
        self, a: Any, needs: Sequence[bool], factors: Sequence[Tensor | Part], gradient_scale: Tensor, row_blocks: int
    ) -> None:
        x, y, similarity = a.x, a.y, a.similarity
        (rows, width), columns = x.shape, y.shape[0]
        self.x, self.y, self.gradient_scale, self.row_blocks = x, y, gradient_scale, row_blocks
        self.x_factor, self.y_factor = factors
        of_x, of_y = needs
        self.of_x, self.of_y = of_x, of_y
        self.sizes = rows, columns, width
        self.tiles = cdiv(columns, BN)
        most = min(max(1, CHUNK_BYTES // (rows * BN * x.element_size())), 1 << 14)
        self.chunk_tiles = cdiv(self.tiles, cdiv(self.tiles, most))  # in equal parts
        self.chunk = self.chunk_tiles * BN
        self.tma = similarity != Similarity.NEGATIVE_SQUARED_EUCLIDEAN and launch.can_use_tma(x, y)
        self.product = fit(TMA_PRODUCT if self.tma else PRODUCT_TILES[x.dtype], rows)
        self.BD = BD[x.dtype]
        self.d_blocks = cdiv(max(1, width), self.BD)
        programs = self.chunk_tiles * cdiv(rows, self.product.BM) * self.d_blocks
        self.each = cdiv(programs, launch.num_persistent_programs(x.device)) * BN  # columns of a share of W y
        self.shares = cdiv(self.chunk, self.each)

        def new(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=accumulation_dtype(x.dtype), device=x.device)

        self.similarity = int(similarity)
        euclidean = similarity == Similarity.NEGATIVE_SQUARED_EUCLIDEAN
        self.weights = torch.empty(rows, self.chunk, dtype=x.dtype, device=x.device)
        self.column_sums = new(row_blocks, self.chunk) if of_y and similarity != Similarity.DOT else new(0)
        self.row_sums = new(self.chunk_tiles, rows) if euclidean else new(0)
        self.all_row_sums = new(rows).zero_() if euclidean else new(0)
        self.partial = new(self.shares, rows, width) if of_x else new(0)
        self.grad_x = x.new_empty(x.shape) if of_x else None
        self.grad_y = y.new_empty(y.shape) if of_y else None
        self.options: dict[str, Any] = {
            "BD": self.BD,
            "BK": self.product.BK,
            # W y - x sum W cancels far from the origin, so it moves to y_0; in 16 bits differences would be rounded.
            "EUCLIDEAN_SHIFT": euclidean and x.dtype in (torch.float32, torch.float64),
            "PRECISION": launch.precision(x.dtype),
            "DTYPE": numbers(x.dtype),
            "num_warps": self.product.num_warps,
            "num_stages": self.product.num_stages,
        }
        self.chunks_before = 0
        # What the two products read: W of some rows (of x) and x, W of some columns and y.
        step, block = self.product.BK, self.product.BM
        self.of_columns = self._tiles(self.weights, step, BN), self._tiles(x, step, self.BD)
        self.of_rows = self._tiles(self.weights, block, step), self._tiles(y, step, self.BD)

    def _tiles(self, t: Tensor, *block: int) -> Any:
        """A matrix as a product reads blocks of it."""
        return launch.tma_descriptor(t, *block) if self.tma else t

    def _loads(self, whole: bool) -> int:
        return (TMA if self.tma else WHOLE if whole else MASKED).value

    def add(self, first: int, count: int) -> None:
        """Take up tiles first ... first + count - 1, which lie in `weights` from its start."""
        rows, _, width = self.sizes
        step, block = self.product.BK, self.product.BM
        if self.of_y and width:
            launch.launch(
                columns_gradient, (self.d_blocks, count),
                *self.of_columns,
                self.y, self.y_factor, self.column_sums, self.gradient_scale, self.grad_y,
                *self.sizes, *self.x.stride(), *self.y.stride(), first * BN, self.chunk, self.row_blocks,
                BN=BN, LOADS=self._loads(rows % step == 0 and width % self.BD == 0), SIMILARITY=self.similarity,
                **self.options,
            )  # fmt: skip
        if self.of_x and width:
            launch.launch(
                _rows, (cdiv(rows, block), self.d_blocks, self.shares),
                *self.of_rows,
                self.partial, *self.sizes, *self.y.stride(), first * BN, count * BN, self.chunk,
                self.each, BM=block, ADD=self.chunks_before > 0, LOADS=self._loads(width % self.BD == 0),
                **self.options,
            )  # fmt: skip
        if self.row_sums.numel():
            self.all_row_sums += self.row_sums[:count].sum(0)
        self.chunks_before += 1

    def finish(self) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of x and y, those that are wanted."""
        rows, _, width = self.sizes
        if self.of_x and width:
            launch.launch(
                _finish_rows, (cdiv(rows, 4),),
                self.partial, self.x, self.y, self.x_factor, self.all_row_sums, self.gradient_scale, self.grad_x,
                rows, width, *self.x.stride(), self.y.stride(1), self.shares, BLOCK=4, BD=vector_block(width),
                SIMILARITY=self.similarity, EUCLIDEAN_SHIFT=self.options["EUCLIDEAN_SHIFT"],
                DTYPE=self.options["DTYPE"], num_warps=4,
            )  # fmt: skip
        return self.grad_x, self.grad_y


def gradient_scale(x: Tensor, largest_weight: Callable[[], Tensor]) -> Tensor:
    """What W is multiplied by before it is rounded: 1; for float16 the power of two that makes all of it fit."""
    one = launch.one(x.device, accumulation_dtype(x.dtype))
    if x.dtype != torch.float16:
        return one
    largest = largest_weight()
    exponent = torch.floor(torch.log2(2.0**13 / largest)).clamp(-100, 100)
    return torch.where(largest > 0, torch.exp2(exponent), one)
