"""What runs on the GPU of `nearest`: see ``kernel_triton.py``, which launches it."""

import triton
import triton.language as tl

from ...backends.triton.constants import ANY, DIFFERENT, DOT, IGNORED, INVALID, TMA, UNADMITTED
from ...backends.triton.tiles import (
    block_offsets,
    dot,
    factors,
    factors_of,
    half_similarities,
    index_status,
    load,
    open_to_rows,
    pair_similarities,
    similarities,
    vectors,
)


@triton.jit
def search(
    x, y, x_factor, y_factor, row_labels, column_labels, self_index, below, values, indices, similarity, index,
    rows, columns, width, x_row, x_column, y_row, y_column, tiles_each,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, LOADS: tl.constexpr, SIMILARITY: tl.constexpr,
    RELATION: tl.constexpr, K: tl.constexpr, LARGEST: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """The K best columns of each row among this program's tiles, -inf where there are fewer: (share, rows, K).

    LARGEST: the most similar columns, else those with the largest -u. With `similarity` and `index` for K = 1 the
    program has all tiles, makes the factors, and writes there what `merge` would.
    """
    block, share = tl.program_id(0), tl.program_id(1)
    at_rows, i = block_offsets(block, BM, rows)
    if similarity is not None:
        of_x = factors_of(x, i, width, x_row, x_column, BM, BK, SIMILARITY, DTYPE)
    else:
        of_x = factors(x_factor, i, BM, SIMILARITY, DTYPE)
    label = tl.load(row_labels + i)
    slots = tl.arange(0, K)
    best = tl.full((BM, K), float("-inf"), DTYPE)
    best_index = tl.full((BM, K), -1, tl.int32)
    worst = tl.full((BM,), float("-inf"), DTYPE)
    first = share * tiles_each
    for tile in range(first, tl.minimum(first + tiles_each, tl.cdiv(columns, BN))):
        at_columns, j = block_offsets(tile, BN, columns)
        if similarity is not None:
            of_y = factors_of(y, j, width, y_row, y_column, BN, BK, SIMILARITY, DTYPE)
        else:
            of_y = factors(y_factor, j, BN, SIMILARITY, DTYPE)
        u = similarities(
            x, y, block, tile, i, j, of_x, of_y, width, x_row, x_column, y_row, y_column,
            BM, BN, BK, LOADS, SIMILARITY, NORMALIZE, PRECISION, DTYPE,
        )  # fmt: skip
        mask = open_to_rows(u, i, label, self_index, at_columns, j, columns, column_labels, RELATION)
        if below is not None:
            mask = mask & (u < tl.load(below + i)[:, None])
        if not LARGEST:
            u = -u
        u = tl.where(mask, u, float("-inf"))
        if K == 1 and LOADS == TMA:  # few operations count beside products that wait for no address
            value = tl.max(u, 1)
            better = value > worst  # a later column must be better, not equal
            if tl.max(better.to(tl.int32), 0) > 0:
                place = tl.min(tl.where(u == value[:, None], tl.arange(0, BN)[None, :], BN), 1)
                worst = tl.where(better, value, worst)
                best_index = tl.where(better[:, None], (tile * BN + place)[:, None], best_index)
        elif K == 1:
            value, place = tl.max(u, 1, return_indices=True, return_indices_tie_break_left=True)
            better = value > worst
            worst = tl.where(better, value, worst)
            best_index = tl.where(better[:, None], (tile * BN + place)[:, None], best_index)
        else:
            # One at a time, as long as any row's tile still holds a better one than the worst that it has.
            value, place = tl.max(u, 1, return_indices=True, return_indices_tie_break_left=True)
            while tl.max((value > worst).to(tl.int32), 0) > 0:
                better = value > worst
                # Into its place: after all that are at least as good, the others move down and the last drops out.
                rank = tl.sum((best >= value[:, None]).to(tl.int32), 1)
                source = tl.where(slots[None, :] > rank[:, None], slots[None, :] - 1, slots[None, :])
                moved, moved_index = tl.gather(best, source, 1), tl.gather(best_index, source, 1)
                here = slots[None, :] == rank[:, None]
                moved = tl.where(here, value[:, None], moved)
                moved_index = tl.where(here, (tile * BN + place)[:, None], moved_index)
                best = tl.where(better[:, None], moved, best)
                best_index = tl.where(better[:, None], moved_index, best_index)
                worst = tl.min(best, 1)
                u = tl.where(better[:, None] & (tl.arange(0, BN)[None, :] == place[:, None]), float("-inf"), u)
                value, place = tl.max(u, 1, return_indices=True, return_indices_tie_break_left=True)
    if K == 1:
        best = worst[:, None]
    inside = at_rows < rows
    if similarity is not None:
        chosen = tl.max(best_index, 1)  # the only one
        j = tl.maximum(chosen, 0).to(tl.int64)
        of_pair = factors_of(y, j, width, y_row, y_column, BM, BK, SIMILARITY, DTYPE)
        exact = of_chosen(
            x, y, i, j, width, x_row, x_column, y_row, y_column, of_x, of_pair, chosen >= 0,
            is_invalid(self_index, at_rows, i, columns), BM, BK, SIMILARITY, NORMALIZE, DTYPE,
        )  # fmt: skip
        tl.store(similarity + i, exact, mask=inside)
        tl.store(index + i, chosen.to(tl.int64), mask=inside)
    else:
        to = (share * rows + i[:, None]) * K + slots[None, :]
        tl.store(values + to, best, mask=inside[:, None])
        tl.store(indices + to, best_index, mask=inside[:, None])


@triton.jit
def is_invalid(self_index, at, i, columns):
    """(BLOCK,): rows whose own column is out of range."""
    if self_index is not None:
        return index_status(tl.load(self_index + i), columns, IGNORED) == INVALID
    else:
        return at < 0


@triton.jit
def of_chosen(
    x, y, i, j, width, x_row, x_column, y_row, y_column, of_x, of_y, found, invalid,
    BLOCK: tl.constexpr, BK: tl.constexpr, SIMILARITY: tl.constexpr, NORMALIZE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The similarity of each row with its column, exactly; -inf where none was found, NaN of an invalid row."""
    u = pair_similarities(
        x, y, i, j, width, x_row, x_column, y_row, y_column, of_x, of_y, BLOCK, BK, DTYPE, SIMILARITY, NORMALIZE
    )
    return tl.where(invalid, float("nan"), tl.where(found, u, float("-inf")))


@triton.jit
def rank(
    x, y, half_squares, row_labels, column_labels, self_index, values, indices, seconds,
    rows, columns, width, x_row, x_column, y_row, y_column, tiles_each,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, LOADS: tl.constexpr, SIMILARITY: tl.constexpr,
    RELATION: tl.constexpr, SHALLOW: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Of each row the column with the largest <x, y> - |y|^2 / 2 among this program's tiles, and an upper bound of that
    of all others: (share, rows). half_squares: infinite in columns that no relation admits.

    Every lane keeps the best that it has seen, and its tile; rows compare lanes once, at the end. SHALLOW: a step is as
    deep as the vectors, so that the rows are read once.
    """
    block, share = tl.program_id(0), tl.program_id(1)
    at_rows, i = block_offsets(block, BM, rows)
    lane = tl.arange(0, BN)
    best = tl.full((BM, BN), float("-inf"), DTYPE)
    of_tile = tl.full((BM, BN), -1, tl.int32)
    second = tl.full((BM,), float("-inf"), DTYPE)
    one_x, one_y = tl.full((BM,), 1.0, DTYPE), tl.full((BN,), 1.0, DTYPE)
    if RELATION != ANY:
        label = tl.load(row_labels + i)
    if self_index is not None:
        own = tl.load(self_index + i)
    k = tl.arange(0, BK)
    if SHALLOW:
        if LOADS == TMA:
            a = x.load([block * BM, 0])
        else:
            a = load(x + i[:, None] * x_row + k[None, :].to(tl.int64) * x_column, k[None, :] < width, LOADS)
    first = share * tiles_each
    for tile in range(first, tl.minimum(first + tiles_each, tl.cdiv(columns, BN))):
        at_columns, j = block_offsets(tile, BN, columns)
        if SHALLOW:
            if LOADS == TMA:
                b = y.load([tile * BN, 0]).T
            else:
                b = load(y + j[None, :] * y_row + k[:, None].to(tl.int64) * y_column, k[:, None] < width, LOADS)
            u = dot(a, b, tl.zeros((BM, BN), DTYPE), PRECISION, DTYPE)
        else:
            u = half_similarities(
                x, y, block, tile, i, j, one_x, one_y, width, x_row, x_column, y_row, y_column,
                BM, BN, BK, LOADS, DOT, NORMALIZE, PRECISION, DTYPE,
            )  # fmt: skip
        u -= tl.load(half_squares + j, mask=at_columns < columns, other=float("inf"))[None, :]
        if RELATION != ANY:
            same = label[:, None] == tl.load(column_labels + j)[None, :]
            u = tl.where(same != (RELATION == DIFFERENT), u, float("-inf"))
        if self_index is not None:
            u = tl.where(own[:, None] == at_columns[None, :], float("-inf"), u)
        second = tl.maximum(second, tl.max(tl.minimum(u, best), 1))
        better = u > best  # a later column must be better, not equal; NaN never is
        best = tl.where(better, u, best)
        of_tile = tl.where(better, tile, of_tile)
    most = tl.max(best, 1)
    column = tl.where((best == most[:, None]) & (of_tile >= 0), of_tile * BN + lane[None, :], 2147483647)
    lowest = tl.min(column, 1)
    others = tl.where(column == lowest[:, None], float("-inf"), best)
    to = share * rows + at_rows
    inside = at_rows < rows
    tl.store(values + to, most, mask=inside)
    tl.store(indices + to, tl.where(most > float("-inf"), lowest, -1), mask=inside)
    tl.store(seconds + to, tl.maximum(second, tl.max(others, 1)), mask=inside)


@triton.jit
def store_half_squares(
    a, labels, to, open_to, count, width, row, column, BLOCK: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """|a_i|^2 / 2 of all vectors; and once more, infinite for those that no relation admits."""
    at, i = block_offsets(tl.program_id(0), BLOCK, count)
    total = tl.zeros((BLOCK, BK), DTYPE)
    for start in range(0, width, BK):
        v = vectors(a, i, start, width, row, column, BK, DTYPE)
        total += v * v
    half_square = tl.sum(total, 1) / 2
    tl.store(to + at, half_square, mask=at < count)
    tl.store(open_to + at, tl.where(tl.load(labels + i) == UNADMITTED, float("inf"), half_square), mask=at < count)


@triton.jit
def compare(
    x, y, row_labels, column_labels, self_index, uncertain, similarity, index,
    rows, columns, width, x_row, x_column, y_row, y_column,
    BLOCK: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, RELATION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The nearest column of uncertain rows by the distances themselves, one row after the other."""
    _, i = block_offsets(tl.program_id(0), BLOCK, rows)
    flags = tl.load(uncertain + i)
    if tl.max(flags, 0) > 0:
        for n in range(BLOCK):
            row = tl.program_id(0).to(tl.int64) * BLOCK + n
            if (tl.load(uncertain + tl.minimum(row, rows - 1)) > 0) & (row < rows):
                best = tl.full((BN,), float("-inf"), DTYPE)
                of_tile = tl.full((BN,), -1, tl.int32)
                for tile in range(tl.cdiv(columns, BN)):
                    at_columns, j = block_offsets(tile, BN, columns)
                    total = tl.zeros((BN, BK), DTYPE)
                    for start in range(0, width, BK):
                        k = start + tl.arange(0, BK)
                        u = tl.load(x + row * x_row + k.to(tl.int64) * x_column, mask=k < width, other=0.0).to(DTYPE)
                        difference = u[None, :] - vectors(y, j, start, width, y_row, y_column, BK, DTYPE)
                        total += difference * difference
                    value = -tl.sum(total, 1)
                    column_label = tl.load(column_labels + j)
                    mask = (at_columns < columns) & (value == value) & (column_label != UNADMITTED)
                    if RELATION != ANY:
                        same = tl.load(row_labels + row) == column_label
                        mask = mask & (same != (RELATION == DIFFERENT))
                    if self_index is not None:
                        mask = mask & (tl.load(self_index + row) != at_columns)
                    better = mask & (value > best)
                    best = tl.where(better, value, best)
                    of_tile = tl.where(better, tile, of_tile)
                most = tl.max(best, 0)
                column = tl.where((best == most) & (of_tile >= 0), of_tile * BN + tl.arange(0, BN), 2147483647)
                found = most > float("-inf")
                tl.store(similarity + row, most)
                tl.store(index + row, tl.where(found, tl.min(column, 0), -1).to(tl.int64))


@triton.jit
def merge(
    x, y, x_factor, y_factor, self_index, values, indices, seconds, largest_half_square, similarity, index,
    uncertain, rows, columns, width, x_row, x_column, y_row, y_column, shares, k, tolerance,
    BLOCK: tl.constexpr, BK: tl.constexpr, K: tl.constexpr, SIMILARITY: tl.constexpr, NORMALIZE: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """The best of all shares, and their exact similarities; with seconds, whether a row's best is in doubt.

    largest_half_square: of all |y_j|^2 / 2. tolerance: the relative error of <x, y>, in units of |x| |y|.
    """
    at, i = block_offsets(tl.program_id(0), BLOCK, rows)
    of_x = factors(x_factor, i, BLOCK, SIMILARITY, DTYPE)
    invalid = is_invalid(self_index, at, i, columns)
    last_value = tl.full((BLOCK,), float("inf"), DTYPE)
    last_index = tl.full((BLOCK,), -1, tl.int32)
    for slot in range(k):
        chosen = tl.full((BLOCK,), float("-inf"), DTYPE)
        chosen_index = tl.full((BLOCK,), -1, tl.int32)
        for share in range(shares):
            place = (share * rows + i[:, None]) * K + tl.arange(0, K)[None, :]
            value, column = tl.load(values + place), tl.load(indices + place)
            # What comes after the last choice: less similar, or as similar in a later column.
            after = (value < last_value[:, None]) | ((value == last_value[:, None]) & (column > last_index[:, None]))
            value = tl.where(after & (column >= 0), value, float("-inf"))
            most, at_most = tl.max(value, 1, return_indices=True, return_indices_tie_break_left=True)
            better = most > chosen
            column = tl.sum(tl.where(tl.arange(0, K)[None, :] == at_most[:, None], column, 0), 1)
            chosen_index = tl.where(better, column, chosen_index)
            chosen = tl.where(better, most, chosen)
        last_value, last_index = chosen, chosen_index
        found = chosen_index >= 0
        j = tl.maximum(chosen_index, 0).to(tl.int64)
        of_y = factors(y_factor, j, BLOCK, SIMILARITY, DTYPE)
        u = of_chosen(
            x, y, i, j, width, x_row, x_column, y_row, y_column, of_x, of_y, found, invalid,
            BLOCK, BK, SIMILARITY, NORMALIZE, DTYPE,
        )  # fmt: skip
        if seconds is not None:  # of one neighbour
            runner_up = tl.full((BLOCK,), float("-inf"), DTYPE)
            for share in range(shares):
                value, column = tl.load(values + share * rows + i), tl.load(indices + share * rows + i)
                runner_up = tl.maximum(runner_up, tl.where(column == chosen_index, float("-inf"), value))
                runner_up = tl.maximum(runner_up, tl.load(seconds + share * rows + i))
            squares = tl.zeros((BLOCK, BK), DTYPE)
            for start in range(0, width, BK):
                v = vectors(x, i, start, width, x_row, x_column, BK, DTYPE)
                squares += v * v
            most = tl.load(largest_half_square)
            # Of products; and of the distance itself, within two roundings of which others tie.
            error = tolerance * (tl.sqrt(tl.sum(squares, 1)) * tl.sqrt(2 * most) + most)
            error += tl.where(found, 2 * 1.1920929e-7 * tl.abs(u), 0.0)
            # Alone, or nothing is open to the row. An error that is not finite: only the distances can tell.
            alone = runner_up == float("-inf")
            certain = ((chosen - runner_up > 2 * error) | alone) & (error < float("inf"))
            tl.store(uncertain + at, tl.where(certain | invalid, 0, 1), mask=at < rows)
        tl.store(similarity + i * k + slot, u, mask=at < rows)
        tl.store(index + i * k + slot, tl.where(found, chosen_index, -1).to(tl.int64), mask=at < rows)
