"""A tile of the labelled similarity matrix in Triton, BM rows x BN columns: how it is made, and how large it is.

Rows and columns beyond the last are read as the last one, so that no load is masked; who reduces a tile leaves those
columns out, who writes one leaves out those rows.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.enums import Similarity
from ...core.similarity import accumulation_dtype
from . import launch
from .constants import (
    ABSENT,
    ABSENT_TARGET,
    ANY,
    BN,
    COSINE,
    DIFFERENT,
    EUCLIDEAN,
    IGNORED,
    INTERPRETED,
    INVALID,
    MASKED,
    TMA,
    UNADMITTED,
    WHOLE,
)
from .launch import cdiv


@triton.jit
def block_offsets(block, SIZE: tl.constexpr, count):
    """Which rows (or columns) a block holds, and the same within the matrix, in 64 bits for addresses."""
    at = block * SIZE + tl.arange(0, SIZE)
    return at, tl.minimum(at, count - 1).to(tl.int64)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, DTYPE: tl.constexpr):
    """acc + a b, accumulated in DTYPE."""
    if INTERPRETED and a.dtype == tl.bfloat16:  # the interpreter would multiply the bits
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, out_dtype=DTYPE)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=DTYPE)


@triton.jit
def load(pointers, inside, LOADS: tl.constexpr):
    """A tile of vectors; zeros where it is not inside, of which a whole one has none."""
    if LOADS == WHOLE:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def factors(factor, at, SIZE: tl.constexpr, SIMILARITY: tl.constexpr, DTYPE: tl.constexpr):
    """Inverse lengths of rows or columns, (SIZE,); 1 where the similarity has none."""
    if SIMILARITY == COSINE:
        return tl.load(factor + at)
    else:
        return tl.full((SIZE,), 1.0, DTYPE)


@triton.jit
def row_factor(of_x, SIMILARITY: tl.constexpr, NORMALIZE: tl.constexpr):
    """What `half_similarities` lack: the factor of their row; 1 where there is none, or where x went in with it."""
    if SIMILARITY == COSINE and not NORMALIZE:
        return of_x
    else:
        return of_x * 0 + 1


@triton.jit
def half_similarities(
    x, y, block, tile, i, j, of_x, of_y, width, x_row, x_column, y_row, y_column,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, LOADS: tl.constexpr, SIMILARITY: tl.constexpr,
    NORMALIZE: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """u of a block of rows i and a tile of columns j but for `row_factor`, (BM, BN), accumulated in DTYPE: who
    multiplies rows anyway takes that along.

    i (BM,) and j (BN,) within the matrices; x_row, x_column: strides of x in elements; NORMALIZE: of vectors times
    their factors. TMA: x and y are tensor descriptors; beyond the last row or column they give zeros.
    """
    acc = tl.zeros((BM, BN), DTYPE)
    if SIMILARITY == EUCLIDEAN:
        # Differences, not |x|^2 + |y|^2 - 2 <x, y>, which cancels.
        x_at, y_at = x + i * x_row, y + j * y_row
        for _ in range(width):
            difference = tl.load(x_at).to(DTYPE)[:, None] - tl.load(y_at).to(DTYPE)[None, :]
            acc += difference * difference
            x_at += x_column
            y_at += y_column
        acc = -acc
    elif LOADS == TMA:
        for start in range(0, width, BK):
            acc = dot(x.load([block * BM, start]), y.load([tile * BN, start]).T, acc, PRECISION, DTYPE)
    else:
        k = tl.arange(0, BK)
        x_tile = x + i[:, None] * x_row + k[None, :].to(tl.int64) * x_column
        y_tile = y + j[None, :] * y_row + k[:, None].to(tl.int64) * y_column
        for start in range(0, width, BK):
            a = load(x_tile, start + k[None, :] < width, LOADS)
            b = load(y_tile, start + k[:, None] < width, LOADS)
            if NORMALIZE:
                a = a * of_x[:, None]
                b = b * of_y[None, :]
            acc = dot(a, b, acc, PRECISION, DTYPE)
            x_tile += BK * x_column
            y_tile += BK * y_column
    if SIMILARITY == COSINE and not NORMALIZE:
        return acc * of_y[None, :]
    else:
        return acc


@triton.jit
def similarities(
    x, y, block, tile, i, j, of_x, of_y, width, x_row, x_column, y_row, y_column,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, LOADS: tl.constexpr, SIMILARITY: tl.constexpr,
    NORMALIZE: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """u of a block of rows i and a tile of columns j, (BM, BN)."""
    t = half_similarities(
        x, y, block, tile, i, j, of_x, of_y, width, x_row, x_column, y_row, y_column,
        BM, BN, BK, LOADS, SIMILARITY, NORMALIZE, PRECISION, DTYPE,
    )  # fmt: skip
    if SIMILARITY == COSINE and not NORMALIZE:
        return t * of_x[:, None]
    else:
        return t


@triton.jit
def open_to_rows(u, i, label, self_index, at_columns, j, columns, column_labels, RELATION: tl.constexpr):
    """(BM, BN): the columns of a tile that each row may choose, whose similarities u are numbers."""
    column_label = tl.load(column_labels + j)
    mask = ((at_columns < columns) & (column_label != UNADMITTED))[None, :] & (u == u)
    if RELATION != ANY:
        same = label[:, None] == column_label[None, :]
        mask = mask & (same != (RELATION == DIFFERENT))
    if self_index is not None:
        mask = mask & (tl.load(self_index + i)[:, None] != at_columns[None, :])
    return mask


@triton.jit
def vectors(a, i, start, width, row, column, BK: tl.constexpr, DTYPE: tl.constexpr):
    """Entries start ... start + BK of the vectors i (BLOCK,) of a: (BLOCK, BK), 0 beyond the width."""
    k = start + tl.arange(0, BK)[None, :]
    return tl.load(a + i[:, None] * row + k.to(tl.int64) * column, mask=k < width, other=0.0).to(DTYPE)


@triton.jit
def pair_similarities(
    a, b, i, j, width, a_row, a_column, b_row, b_column, a_factor, b_factor,
    BLOCK: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr, SIMILARITY: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """u of the pairs (i, j) alone: (BLOCK,)."""
    total = tl.zeros((BLOCK, BK), DTYPE)
    for start in range(0, width, BK):
        u = vectors(a, i, start, width, a_row, a_column, BK, DTYPE)
        v = vectors(b, j, start, width, b_row, b_column, BK, DTYPE)
        if SIMILARITY == EUCLIDEAN:
            total += (u - v) * (u - v)
        elif NORMALIZE:
            total += (u * a_factor[:, None]) * (v * b_factor[:, None])
        else:
            total += u * v
    u = tl.sum(total, 1)
    if SIMILARITY == EUCLIDEAN:
        return -u
    elif SIMILARITY == COSINE and not NORMALIZE:
        return u * a_factor * b_factor
    else:
        return u


@triton.jit
def inverse_lengths(a, i, width, row, column, BLOCK: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr):
    """1 / |a_i| (BLOCK,); 0 where that would overflow: such a vector counts as zero."""
    squares = tl.zeros((BLOCK, BK), DTYPE)
    largest = squares
    for start in range(0, width, BK):
        v = vectors(a, i, start, width, row, column, BK, DTYPE)
        squares += v * v
        largest = tl.maximum(largest, tl.abs(v))
    squared, most = tl.sum(squares, 1), tl.max(largest, 1)
    root = tl.sqrt(squared)
    least: tl.constexpr = 1e-24 if tl.float32 == DTYPE else 1e-200
    greatest: tl.constexpr = 1e30 if tl.float32 == DTYPE else 1e200
    safe = (squared > least) & (squared < greatest)
    by = tl.where(safe | (most == 0), 1.0, most)
    if tl.min(safe.to(tl.int32), 0) == 0:  # squares overflow or vanish: again, the largest component divided out
        squares = tl.zeros((BLOCK, BK), DTYPE)
        for start in range(0, width, BK):
            v = vectors(a, i, start, width, row, column, BK, DTYPE) / by[:, None]
            squares += v * v
        root = tl.sqrt(tl.sum(squares, 1))
    smallest: tl.constexpr = 2.938735877055719e-39 if tl.float32 == DTYPE else 5.562684646268003e-309
    zero = by * root < smallest  # 1 / the largest number of the dtype
    return tl.where(zero, 0.0, 1.0 / by / tl.where(zero, 1.0, root))


@triton.jit
def factors_of(
    a, i, width, row, column, BLOCK: tl.constexpr, BK: tl.constexpr, SIMILARITY: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """`factors` of the vectors themselves, where nobody has stored them."""
    if SIMILARITY == COSINE:
        return inverse_lengths(a, i, width, row, column, BLOCK, BK, DTYPE)
    else:
        return tl.full((BLOCK,), 1.0, DTYPE)


@triton.jit
def softplus(x):
    """log(1 + e^x) and its derivative, to the last digits of either, however small."""
    t = tl.exp(-tl.abs(x))
    # log(1 + t) = 2 artanh(t / (2 + t)), a series in at most 1/9: the logarithm of a number near 1 would lose digits.
    r = t / (2 + t)
    series = r * 0.0
    for n in tl.static_range(16, -1, -1):
        series = series * r * r + 1.0 / (2 * n + 1)
    derivative = tl.where(x > 0, 1.0, t) / (1 + t)
    return tl.where(x > 0, x, 0.0) + 2 * r * series, derivative


@triton.jit
def index_status(index, size, ignored):
    """An index within [0, size), IGNORED where it equals `ignored`, INVALID elsewhere; 32 bits."""
    valid = (index >= 0) & (index < size)
    return tl.where(index == ignored, IGNORED, tl.where(valid, index, INVALID)).to(tl.int32)


@triton.jit
def target_status(target, columns, ignored):
    """`index_status`, and ABSENT for a row whose class lives elsewhere."""
    valid = (target >= 0) & (target < columns)
    other = tl.where(target == ABSENT_TARGET, ABSENT, INVALID)
    return tl.where(target == ignored, IGNORED, tl.where(valid, target, other)).to(tl.int32)


@triton.jit
def _store_inverse_lengths(
    x, y, x_factor, y_factor, rows, columns, width, x_row, x_column, y_row, y_column,
    BLOCK: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Of the rows of x by the first programs, of those of y by the others."""
    block, blocks = tl.program_id(0), tl.cdiv(rows, BLOCK)
    if block < blocks:
        at, i = block_offsets(block, BLOCK, rows)
        tl.store(x_factor + at, inverse_lengths(x, i, width, x_row, x_column, BLOCK, BK, DTYPE), mask=at < rows)
    else:
        store_column_factors(y, y_factor, block - blocks, columns, width, y_row, y_column, BLOCK, BK, DTYPE)


@triton.jit
def store_column_factors(
    y, y_factor, block, columns, width, y_row, y_column, BLOCK: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """Inverse lengths of a block of y, which come back as well, (BLOCK,)."""
    at, j = block_offsets(block, BLOCK, columns)
    of_y = inverse_lengths(y, j, width, y_row, y_column, BLOCK, BK, DTYPE)
    tl.store(y_factor + at, of_y, mask=at < columns)
    return of_y


@triton.jit
def store_units(
    a, factor, times, to, at, i, count, width, row, column, BLOCK: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr
):
    """The vectors i (BLOCK,) of a as unit vectors, by their inverse lengths, as rows `at` of a matrix; times (BLOCK,):
    what they are multiplied by then, zeros where that is 0, or None."""
    for start in range(0, width, BK):
        k = start + tl.arange(0, BK)[None, :]
        v = vectors(a, i, start, width, row, column, BK, DTYPE) * factor[:, None]
        if times is not None:
            v = tl.where(times[:, None] != 0, v * times[:, None], 0.0)
        inside = (at < count)[:, None] & (k < width)
        tl.store(to + i[:, None] * width + k, v.to(to.dtype.element_ty), mask=inside)


class Tiles(NamedTuple):
    """How a kernel cuts its work: rows of a tile, depth of a step, warps, steps in flight."""

    BM: int
    BK: int
    num_warps: int
    num_stages: int


# By dtype, of the kernels that make similarities: the largest that spill no register on any GPU that the tests name.
TILES = {
    torch.bfloat16: Tiles(64, 64, 8, 3),
    torch.float16: Tiles(64, 64, 8, 3),
    torch.float32: Tiles(64, 16, 8, 3),
    torch.float64: Tiles(16, 16, 8, 1),
}
# Where the copy engine fetches the tiles, so that no register holds an address. Two blocks of four warps, of which one
# computes while the other waits, beat one of eight: on an H200 at 1024 x 512 x 100,000 in bfloat16 similarities take
# 178 us for 265.
TMA_TILES = Tiles(128, 64, 4, 3)
# Euclidean ones subtract and have no use of the matrix units.
EUCLIDEAN_TILES = Tiles(16, 16, 4, 1)
_NUMBERS = {torch.float64: tl.float64, torch.float32: tl.float32}


def numbers(dtype: torch.dtype) -> Any:
    """Triton's name of the dtype in which inputs of `dtype` accumulate."""
    return _NUMBERS[accumulation_dtype(dtype)]


def fit(tiles: Tiles, rows: int) -> Tiles:
    """Lower where there are few rows: no tile is mostly empty."""
    if rows <= tiles.BM // 2:
        return tiles._replace(BM=max(16, 1 << (rows - 1).bit_length()), num_warps=4)
    return tiles


def vector_block(width: int, most: int = 256) -> int:
    """Entries of a vector read at once."""
    return max(16, min(most, 1 << (width - 1).bit_length() if width > 1 else 1))


def tile_options(
    table: dict[torch.dtype, Tiles], x: Tensor, y: Tensor, similarity: Similarity, with_tma: Tiles | None = None
) -> dict[str, Any]:
    """What every kernel that makes similarities is compiled for; x is the rows.

    with_tma: the tiles that it takes where the copy engine can fetch them; None: it has no use of the copy engine.
    """
    rows, width = x.shape
    euclidean = similarity == Similarity.NEGATIVE_SQUARED_EUCLIDEAN
    tma = not euclidean and with_tma is not None and launch.can_use_tma(x, y)
    tiles = fit((with_tma if tma else None) or (EUCLIDEAN_TILES if euclidean else table[x.dtype]), rows)
    return {
        "BM": tiles.BM,
        "BN": BN,
        "BK": tiles.BK,
        "LOADS": (TMA if tma else WHOLE if width > 0 and width % tiles.BK == 0 else MASKED).value,
        "SIMILARITY": int(similarity),
        # 32-bit cosines are of unit vectors, made as they are read; 16-bit ones are scaled when they are done.
        "NORMALIZE": similarity == Similarity.COSINE and x.dtype.itemsize >= 4,
        "PRECISION": launch.precision(x.dtype),
        "DTYPE": numbers(x.dtype),
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


def sides(x: Tensor, y: Tensor, options: dict[str, Any]) -> tuple[Any, Any]:
    """x and y as the kernels of these options read them."""
    if options["LOADS"] != TMA.value:
        return x, y
    depth = options["BK"]
    return launch.tma_descriptor(x, options["BM"], depth), launch.tma_descriptor(y, options["BN"], depth)


def factor_block(depth: int) -> int:
    """Vectors of which a program stores the inverse lengths, `depth` entries at once."""
    return 4096 // depth


def store_factors(x: Tensor, y: Tensor, x_factor: Tensor, y_factor: Tensor) -> None:
    """Inverse lengths of the rows of x and of y, in one launch."""
    (rows, width), columns = x.shape, y.shape[0]
    depth = vector_block(width)
    block = factor_block(depth)
    if rows + columns:
        launch.launch(
            _store_inverse_lengths, (cdiv(rows, block) + cdiv(columns, block),), x, y, x_factor, y_factor,
            rows, columns, width, *x.stride(), *y.stride(), BLOCK=block, BK=depth, DTYPE=numbers(x.dtype), num_warps=4,
        )  # fmt: skip
