"""What runs on the GPU of `sample`: see ``kernel_triton.py``, which launches it."""

import triton
import triton.language as tl

from ...backends.triton.constants import IGNORED, INVALID
from ...backends.triton.tiles import block_offsets, factors, index_status, open_to_rows, similarities

# Squared distances below which weights are equal, and from which on there is none.
NEAREST_SQUARED, FARTHEST_SQUARED = tl.constexpr(0.25), tl.constexpr(1.96)
# What brings variates below every logarithm of a weight without a change of their order: 2^100.
BEYOND = tl.constexpr(1.2676506002282294e30)


@triton.jit
def _philox(a, b, key):
    """Philox 2x32-10: the first word of the counters (a, b); unsigned 32-bit numbers."""
    for n in tl.static_range(10):
        high = tl.umulhi(a, 0xD256D193)
        low = a * 0xD256D193
        a = high ^ b ^ (key + (n * 0x9E3779B9 & 0xFFFFFFFF))
        b = low
    return a


@triton.jit
def _exponentials(i, tile, key, BN: tl.constexpr, DTYPE: tl.constexpr):
    """E (BM, BN) of rows i and a tile of columns."""
    j = tile * BN + tl.arange(0, BN)
    word = _philox(i.to(tl.uint32)[:, None], j.to(tl.uint32)[None, :], key)
    uniform = (word.to(DTYPE) + 0.5) * 2.3283064365386963e-10
    uniform = tl.minimum(uniform, 0.999999940395355224609375)
    direct = -tl.log(1 - uniform)
    if tl.float64 == DTYPE:
        return direct
    # 1 - U has lost the digits of a small U, of which the series makes up.
    series = uniform * (1 + uniform * (0.5 + uniform * (1 / 3 + uniform * 0.25)))
    return tl.where(uniform < 0.015625, series, direct)


@triton.jit
def search(
    x, y, x_factor, y_factor, row_labels, column_labels, self_index, seed, values, indices,
    rows, columns, width, x_row, x_column, y_row, y_column, tiles_each,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, LOADS: tl.constexpr, SIMILARITY: tl.constexpr,
    RELATION: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Of each row the largest number among this program's tiles, -inf where nothing is admitted: (share, rows)."""
    block, share = tl.program_id(0), tl.program_id(1)
    at_rows, i = block_offsets(block, BM, rows)
    of_x = factors(x_factor, i, BM, SIMILARITY, DTYPE)
    label = tl.load(row_labels + i)
    key = tl.load(seed).to(tl.uint32)
    of_distance, of_chord = (2 - width) * 0.5, (3 - width) * 0.5
    # Of each place in a tile, what it held at best, and in which tile.
    best = tl.full((BM, BN), float("-inf"), DTYPE)
    of_tile = tl.full((BM, BN), -1, tl.int32)
    first = share * tiles_each
    for tile in range(first, tl.minimum(first + tiles_each, tl.cdiv(columns, BN))):
        at_columns, j = block_offsets(tile, BN, columns)
        of_y = factors(y_factor, j, BN, SIMILARITY, DTYPE)
        u = similarities(
            x, y, block, tile, i, j, of_x, of_y, width, x_row, x_column, y_row, y_column,
            BM, BN, BK, LOADS, SIMILARITY, NORMALIZE, PRECISION, DTYPE,
        )  # fmt: skip
        mask = open_to_rows(u, i, label, self_index, at_columns, j, columns, column_labels, RELATION)
        squared = 2 - 2 * u
        near = tl.minimum(tl.maximum(squared, NEAREST_SQUARED), FARTHEST_SQUARED)
        weight = of_distance * tl.log(near) + of_chord * tl.log(1 - 0.25 * near)
        exponential = _exponentials(i, tile, key, BN, DTYPE)
        number = tl.where(squared < FARTHEST_SQUARED, weight - tl.log(exponential), -BEYOND * exponential)
        number = tl.where(mask, number, float("-inf"))
        better = number > best  # a later column must be better, not equal
        best = tl.where(better, number, best)
        of_tile = tl.where(better, tile, of_tile)
    most = tl.max(best, 1)
    column = tl.where((best == most[:, None]) & (of_tile >= 0), of_tile * BN + tl.arange(0, BN)[None, :], 2147483647)
    lowest = tl.min(column, 1)
    inside = at_rows < rows
    tl.store(values + share * rows + at_rows, most, mask=inside)
    tl.store(indices + share * rows + at_rows, lowest, mask=inside)


@triton.jit
def finish(values, indices, self_index, index, rows, columns, shares, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """The best of all shares, in their order; -1 for a row whose self index is out of range."""
    at, i = block_offsets(tl.program_id(0), BLOCK, rows)
    best = tl.full((BLOCK,), float("-inf"), DTYPE)
    best_index = tl.full((BLOCK,), -1, tl.int32)
    for share in range(shares):
        value, column = tl.load(values + share * rows + i), tl.load(indices + share * rows + i)
        better = value > best
        best = tl.where(better, value, best)
        best_index = tl.where(better, column, best_index)
    if self_index is not None:
        invalid = index_status(tl.load(self_index + i), columns, IGNORED) == INVALID
        best_index = tl.where(invalid, -1, best_index)
    tl.store(index + at, best_index.to(tl.int64), mask=at < rows)
