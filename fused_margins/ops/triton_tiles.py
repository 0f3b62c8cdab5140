"""Pieces of Triton kernels: a tile of the labelled similarity matrix, and what its rows and columns bring along.

A tile is BM rows x BN columns. Rows and columns beyond the last are read as the last one, so that no load is masked;
who reduces a tile leaves those columns out, who writes one leaves out those rows.
"""

import triton
import triton.language as tl

from . import gpu

COSINE, DOT, EUCLIDEAN = (tl.constexpr(i) for i in range(3))
DIFFERENT, SAME, ANY = (tl.constexpr(i) for i in range(3))
IGNORED, INVALID = tl.constexpr(-1), tl.constexpr(-2)
INTERPRETED = tl.constexpr(gpu.interpreted)
LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)


@triton.jit
def places(block, SIZE: tl.constexpr, count):
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
def _load(pointers, at_k, width, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=at_k < width, other=0.0)


@triton.jit
def products(
    x, y, rows, columns, width, x_row, x_column, y_row, y_column, x_factor, y_factor,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, SIMILARITY: tl.constexpr,
    NORMALIZE: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """<x_i, y_j> (BM, BN) or |x_i - y_j|^2, accumulated in DTYPE; NORMALIZE: of vectors times their factors.

    rows (BM,) and columns (BN,) within the matrices; x_row, x_column: strides of x in elements.
    """
    acc = tl.zeros((BM, BN), DTYPE)
    if SIMILARITY == EUCLIDEAN:
        # Differences, not |x|^2 + |y|^2 - 2 <x, y>, which cancels.
        x_at, y_at = x + rows * x_row, y + columns * y_row
        for _ in range(width):
            difference = tl.load(x_at).to(DTYPE)[:, None] - tl.load(y_at).to(DTYPE)[None, :]
            acc += difference * difference
            x_at += x_column
            y_at += y_column
    else:
        k = tl.arange(0, BK)
        x_tile = x + rows[:, None] * x_row + k[None, :] * x_column
        y_tile = y + columns[None, :] * y_row + k[:, None] * y_column
        for start in range(0, width, BK):
            a = _load(x_tile, start + k[None, :], width, EVEN)
            b = _load(y_tile, start + k[:, None], width, EVEN)
            if NORMALIZE:
                a = a * x_factor[:, None]
                b = b * y_factor[None, :]
            acc = dot(a, b, acc, PRECISION, DTYPE)
            x_tile += BK * x_column
            y_tile += BK * y_column
    return acc


@triton.jit
def similarities(acc, x_factor, y_factor, SIMILARITY: tl.constexpr, NORMALIZE: tl.constexpr):
    """u of a tile of `products`."""
    if SIMILARITY == EUCLIDEAN:
        return -acc
    elif SIMILARITY == COSINE and not NORMALIZE:
        return acc * x_factor[:, None] * y_factor[None, :]
    else:
        return acc


@triton.jit
def _vectors(a, i, start, width, row, column, BK: tl.constexpr, DTYPE: tl.constexpr):
    """Entries start ... start + BK of the vectors i (BLOCK,) of a: (BLOCK, BK), 0 beyond the width."""
    k = start + tl.arange(0, BK)[None, :]
    return tl.load(a + i[:, None] * row + k.to(tl.int64) * column, mask=k < width, other=0.0).to(DTYPE)


@triton.jit
def pair_products(
    a, b, i, j, width, a_row, a_column, b_row, b_column, a_factor, b_factor,
    BLOCK: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr, SIMILARITY: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """`products` of the pairs (i, j) alone: (BLOCK,)."""
    total = tl.zeros((BLOCK, BK), DTYPE)
    for start in range(0, width, BK):
        u = _vectors(a, i, start, width, a_row, a_column, BK, DTYPE)
        v = _vectors(b, j, start, width, b_row, b_column, BK, DTYPE)
        if SIMILARITY == EUCLIDEAN:
            total += (u - v) * (u - v)
        elif NORMALIZE:
            total += (u * a_factor[:, None]) * (v * b_factor[:, None])
        else:
            total += u * v
    return tl.sum(total, 1)


@triton.jit
def inverse_lengths(a, i, width, row, column, BLOCK: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr):
    """1 / |a_i| (BLOCK,); 0 where that would overflow: such a vector counts as zero."""
    largest = tl.zeros((BLOCK, BK), DTYPE)
    for start in range(0, width, BK):
        largest = tl.maximum(largest, tl.abs(_vectors(a, i, start, width, row, column, BK, DTYPE)))
    most = tl.max(largest, 1)  # divided out first: squares then neither overflow nor vanish
    by = tl.where(most > 0, most, 1.0)
    squares = tl.zeros((BLOCK, BK), DTYPE)
    for start in range(0, width, BK):
        v = _vectors(a, i, start, width, row, column, BK, DTYPE) / by[:, None]
        squares += v * v
    root = tl.sqrt(tl.sum(squares, 1))
    smallest: tl.constexpr = 2.938735877055719e-39 if tl.float32 == DTYPE else 5.562684646268003e-309
    zero = most * root < smallest  # 1 / the largest number of the dtype
    return tl.where(zero, 0.0, 1.0 / by / tl.where(zero, 1.0, root))


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
