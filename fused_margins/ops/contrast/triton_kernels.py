"""What runs on the GPU of `contrast`: see ``kernel_triton.py``, which launches it."""

import triton
import triton.language as tl

from ...backends.triton.constants import ABSENT, ANY, COSINE, DIFFERENT, EUCLIDEAN, IGNORED, INVALID, TMA, UNADMITTED
from ...backends.triton.gradients import store_weights, weight_factor
from ...backends.triton.tiles import (
    block_offsets,
    factors,
    half_similarities,
    index_status,
    inverse_lengths,
    pair_similarities,
    row_factor,
    store_column_factors,
    store_units,
    target_status,
)
from .triton_epilogue import of_losses, store_losses

LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
# What a forward saves of a tile.
NOTHING, SIMILARITIES, EXPONENTIALS = (tl.constexpr(i) for i in range(3))


@triton.jit
def prepare(
    x, y, target, self_index, x_factor, y_factor, positive, row_target, row_self, units,
    rows, columns, width, x_row, x_column, y_row, y_column, ignore_index, kept,
    BLOCK: tl.constexpr, COLUMN_BLOCK: tl.constexpr, BK: tl.constexpr, SIMILARITY: tl.constexpr,
    NORMALIZE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Of each row: its factor, its positive's similarity, its target and own column checked (INVALID: a NaN row). Of
    each column, by further programs: its factor and, of the first `kept` ones, the unit column."""
    block, blocks = tl.program_id(0), tl.cdiv(rows, BLOCK)
    if block < blocks:
        _prepare_rows(
            x, y, target, self_index, x_factor, positive, row_target, row_self, block, rows, columns, width,
            x_row, x_column, y_row, y_column, ignore_index, BLOCK, BK, SIMILARITY, NORMALIZE, DTYPE,
        )  # fmt: skip
    else:
        block -= blocks
        of_y = store_column_factors(y, y_factor, block, columns, width, y_row, y_column, COLUMN_BLOCK, BK, DTYPE)
        if units is not None:
            at, j = block_offsets(block, COLUMN_BLOCK, columns)
            store_units(y, of_y, None, units, at, j, kept, width, y_row, y_column, COLUMN_BLOCK, BK, DTYPE)


@triton.jit
def _prepare_rows(
    x, y, target, self_index, x_factor, positive, row_target, row_self, block, rows, columns, width,
    x_row, x_column, y_row, y_column, ignore_index, BLOCK: tl.constexpr, BK: tl.constexpr, SIMILARITY: tl.constexpr,
    NORMALIZE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    at, i = block_offsets(block, BLOCK, rows)
    inside = at < rows
    status = target_status(tl.load(target + i), columns, ignore_index)
    if self_index is not None:
        own = index_status(tl.load(self_index + i), columns, IGNORED)
        tl.store(row_self + at, own, mask=inside)
        status = tl.where(own == INVALID, INVALID, status)
    tl.store(row_target + at, status, mask=inside)
    j = tl.maximum(status, 0).to(tl.int64)
    of_x = tl.full((BLOCK,), 1.0, DTYPE)
    of_y = of_x
    if SIMILARITY == COSINE:
        of_x = inverse_lengths(x, i, width, x_row, x_column, BLOCK, BK, DTYPE)
        of_y = inverse_lengths(y, j, width, y_row, y_column, BLOCK, BK, DTYPE)
        tl.store(x_factor + at, of_x, mask=inside)
    u = pair_similarities(
        x, y, i, j, width, x_row, x_column, y_row, y_column, of_x, of_y, BLOCK, BK, DTYPE, SIMILARITY, NORMALIZE
    )
    u = tl.where((status == IGNORED) | (status == ABSENT), 0.0, tl.where(status == INVALID, float("nan"), u))
    tl.store(positive + at, u, mask=inside)


@triton.jit
def _labels_of_rows(row_target, row_labels, row_self, i, RELATION: tl.constexpr):
    """Of rows i their targets, and where there are such their labels and own columns, else the targets again."""
    own = tl.load(row_target + i)
    label, self = own, own
    if row_labels is not None and RELATION != ANY:
        label = tl.load(row_labels + i)
    if row_self is not None:
        self = tl.load(row_self + i)
    return own, label, self


@triton.jit
def _admitted(at_columns, j, columns, label, self, column_labels, row_self, RELATION: tl.constexpr):
    """(BM, BN): the columns that each row may use. Without labels a row's is its target, a column's its number."""
    inside = at_columns < columns
    of_columns = at_columns
    if column_labels is not None:
        of_columns = tl.load(column_labels + j)
        inside = inside & (of_columns != UNADMITTED)
    if RELATION == ANY:
        mask = inside[None, :]
    else:
        same = label[:, None] == of_columns[None, :]
        mask = (same != (RELATION == DIFFERENT)) & inside[None, :]
    if row_self is not None:
        mask = mask & (self[:, None] != at_columns[None, :])
    return mask


@triton.jit
def _first(tile, rows, BN: tl.constexpr):
    """Where a tile's saved similarities begin."""
    return (tl.full((), 0, tl.int64) + tile) * rows * BN


@triton.jit
def halves(t, BM: tl.constexpr, BN: tl.constexpr):
    """A tile's left and right half, (BM, BN / 2)."""
    return tl.split(tl.permute(tl.reshape(t, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def reduce(
    x, y, x_factor, y_factor, scale, bias, row_target, row_labels, column_labels, row_self,
    maxima, sums, totals, saved,
    rows, columns, width, x_row, x_column, y_row, y_column, scale_stride, largest_plain_scale, tiles_each, saved_tiles,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, LOADS: tl.constexpr, SIMILARITY: tl.constexpr,
    RELATION: tl.constexpr, SAVES: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Of each row over this program's tiles: the maximum of its logits and the sum of exp(logit - maximum).

    In units of log 2. Into totals, where there are such, the sum of its similarities. Programs that share columns are
    neighbours, so that a tile of y comes from the L2 cache. The first tiles are saved: their similarities, or of plain
    logits exp(logit), which is summed before it is rounded.
    """
    block, share = tl.program_id(0), tl.program_id(1)
    at_rows, i = block_offsets(block, BM, rows)
    of_x = factors(x_factor, i, BM, SIMILARITY, DTYPE)
    factor = tl.load(scale + i * scale_stride)
    # Without a maximum nothing overflows up to here: |cosine| <= 1. A scale that is not positive is a NaN in the end.
    running = True
    if SIMILARITY == COSINE and bias is None:
        running = tl.max(factor, 0) > largest_plain_scale
    slope = factor * LOG2E * row_factor(of_x, SIMILARITY, NORMALIZE)
    own, label, self = _labels_of_rows(row_target, row_labels, row_self, i, RELATION)
    maximum = tl.full((BM,), float("-inf"), DTYPE)
    total = tl.zeros((BM,), DTYPE)
    of_all = total
    if not running:
        maximum = tl.zeros((BM,), DTYPE)
    first = share * tiles_each
    for tile in range(first, tl.minimum(first + tiles_each, tl.cdiv(columns, BN))):
        at_columns, j = block_offsets(tile, BN, columns)
        of_y = factors(y_factor, j, BN, SIMILARITY, DTYPE)
        t = half_similarities(
            x, y, block, tile, i, j, of_x, of_y, width, x_row, x_column, y_row, y_column,
            BM, BN, BK, LOADS, SIMILARITY, NORMALIZE, PRECISION, DTYPE,
        )  # fmt: skip
        if SAVES == SIMILARITIES:  # noqa: SIM102 - decided when compiled, the second while running
            if tile < saved_tiles:
                within = i[:, None] * BN + tl.arange(0, BN)[None, :]
                tl.store(saved + _first(tile, rows, BN) + within, t, mask=(at_rows < rows)[:, None])
        if totals is not None:
            of_all += tl.sum(tl.where((at_columns < columns)[None, :], t, 0.0), 1)
        z = t * slope[:, None]
        if bias is not None:
            z += tl.load(bias + j)[None, :] * LOG2E
        masked = True
        if RELATION == DIFFERENT and column_labels is None and row_self is None:
            # Where targets are labels, only tiles that hold a row's target or columns beyond the last.
            held = (own >= tile * BN) & (own < tile * BN + BN)
            masked = (tl.max(held.to(tl.int32), 0) > 0) | (tile * BN + BN > columns)
        if masked:
            mask = _admitted(at_columns, j, columns, label, self, column_labels, row_self, RELATION)
            z = tl.where(mask, z, float("-inf"))
        if running:
            higher = tl.maximum(maximum, tl.max(z, 1))
            total *= tl.where(maximum == higher, 1.0, tl.exp2(maximum - higher))
            maximum = higher
        shift = tl.where(maximum == float("-inf"), 0.0, maximum)
        weight = tl.exp2(z - shift[:, None])
        total += tl.sum(weight, 1)
        if SAVES == EXPONENTIALS:  # noqa: SIM102
            if tile < saved_tiles:
                has_gradient = (own != IGNORED) & (own != INVALID)
                kept = tl.where(has_gradient[:, None], weight, 0.0).to(tl.bfloat16)
                if LOADS == TMA:  # in halves: two blocks then find room on a multiprocessor
                    left, right = halves(kept, BM, BN)
                    saved.store([block * BM, tile * BN], left)
                    saved.store([block * BM, tile * BN + BN // 2], right)
                else:
                    to = saved + i[:, None] * (saved_tiles * BN) + at_columns[None, :]
                    tl.store(to, kept, mask=(at_rows < rows)[:, None])
    tl.store(maxima + share * rows + at_rows, maximum, mask=at_rows < rows)
    tl.store(sums + share * rows + at_rows, total, mask=at_rows < rows)
    if totals is not None:
        of_all *= row_factor(of_x, SIMILARITY, NORMALIZE)
        tl.store(totals + share * rows + at_rows, of_all, mask=at_rows < rows)


@triton.jit
def finish(
    maxima, sums, totals, positive, scale, margin, angle, smoothing, row_target, saved_lse, negative_lse, losses,
    derivatives, exponentials, rows, columns, shares, scale_stride, margin_stride, kept,
    BLOCK: tl.constexpr, ANGULAR: tl.constexpr, STRAIGHT: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """negative_lse of the shares, added in their order: for the backward, and as an output where it is one; and where
    there is an epilogue what `store_losses` stores.

    Where exponentials are kept, the positive's gets what makes its derivative that of the others times the same factor
    of the row, s p / S: minus S psi', S the row's sum.
    """
    at, i = block_offsets(tl.program_id(0), BLOCK, rows)
    maximum = tl.full((BLOCK,), float("-inf"), DTYPE)
    for share in range(shares):
        maximum = tl.maximum(maximum, tl.load(maxima + share * rows + i))
    shift = tl.where(maximum == float("-inf"), 0.0, maximum)
    total = tl.zeros((BLOCK,), DTYPE)
    for share in range(shares):
        total += tl.load(sums + share * rows + i) * tl.exp2(tl.load(maxima + share * rows + i) - shift)
    target = tl.load(row_target + i)
    lse = tl.where(total == 0, float("-inf"), (shift + tl.log2(total)) * LN2)
    lse = tl.where(target == IGNORED, float("-inf"), lse)
    s = tl.load(scale + i * scale_stride)
    lse = tl.where((target != INVALID) & (s > 0), lse, float("nan"))
    tl.store(saved_lse + at, lse, mask=at < rows)
    if negative_lse is not None:
        tl.store(negative_lse + at, lse, mask=at < rows)
    if losses is not None:
        u = tl.load(positive + i)
        of_all = u
        if totals is not None:
            of_all = tl.zeros((BLOCK,), DTYPE)
            for share in range(shares):
                of_all += tl.load(totals + share * rows + i)
        derivative = store_losses(
            u, of_all, lse, target, s, margin, angle, smoothing, losses, derivatives, at, i, rows, columns,
            margin_stride, ANGULAR, STRAIGHT,
        )  # fmt: skip
        if exponentials is not None:
            here = (at < rows) & (target >= 0) & (target < kept)
            to = exponentials + i * kept + target
            # In float32: of a row that its positive dominates all but the rounding of the two cancels.
            among = tl.load(to, mask=here, other=0.0) != 0
            entry = tl.where(among, tl.exp(s * u), 0.0) - tl.exp(lse) * derivative
            tl.store(to, entry.to(tl.bfloat16), mask=here)


@triton.jit
def _weights_of_part(
    t, y_factor, bias, column_labels, row_self, weights, column_sums, bias_sums, own, label, self, nothing, slope,
    shift, outer, by_scale, of_each, each_by_scale, of_positive, of_x, at_rows, rows, columns, block, part, first_part,
    chunk,
    BM: tl.constexpr, BN: tl.constexpr, LOADS: tl.constexpr, SIMILARITY: tl.constexpr, RELATION: tl.constexpr,
    OF_Y: tl.constexpr, OF_SCALE: tl.constexpr, OF_BIAS: tl.constexpr, NORMALIZE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """W of a tile, or of half of it, from its `half_similarities` (BM, BN); sums over columns of exponentials times
    them, and of W."""
    at_columns, j = block_offsets(first_part + part, BN, columns)
    inside = at_columns < columns
    of_y = tl.full((BN,), 1.0, DTYPE)
    if SIMILARITY == COSINE:
        of_y = tl.load(y_factor + j, mask=inside, other=0.0)
    z = t * slope[:, None] - shift[:, None]
    if bias is not None:
        z += tl.load(bias + j)[None, :] * LOG2E
    q = tl.exp2(z)
    chosen = own[:, None] == at_columns[None, :]
    if RELATION == DIFFERENT and column_labels is None and row_self is None:
        w = q * by_scale[:, None]
        if of_each is not None:
            w -= each_by_scale[:, None]
        w = tl.where(chosen, of_positive[:, None], tl.where(inside[None, :], w, 0.0))
        if OF_SCALE or OF_BIAS:
            q = tl.where(chosen | ~inside[None, :], 0.0, q)
    else:
        mask = _admitted(at_columns, j, columns, label, self, column_labels, row_self, RELATION)
        q = tl.where(mask & (~nothing)[:, None], q, 0.0)
        w = tl.where(chosen, of_positive[:, None], 0.0) + q * by_scale[:, None]
    if LOADS != TMA:  # the last column again, where the copy engine gives zeros
        t = tl.where(inside[None, :], t, 0.0)
    along = outer
    if OF_SCALE:
        along = outer * tl.sum(q * t, 1)
        if of_each is not None:
            along -= of_each * tl.sum(tl.where(chosen | ~inside[None, :], 0.0, t), 1)
    if OF_BIAS:
        tl.store(bias_sums + block * chunk + part * BN + tl.arange(0, BN), tl.sum(q * outer[:, None], 0))
    _, sums = store_weights(
        w, t, of_x, of_y, weights, column_sums, at_rows, rows, block, part, chunk,
        BM, BN, LOADS, SIMILARITY, NORMALIZE, OF_Y, DTYPE,
    )  # fmt: skip
    return along, sums


@triton.jit
def _weights_of_tile(
    x, y, y_factor, bias, column_labels, row_self, saved, weights, column_sums, bias_sums, row_sums, scale_sums,
    own, label, self, nothing, slope, shift, outer, by_scale, of_each, each_by_scale, of_positive, of_x, of_row,
    at_rows, i, rows, columns, width, x_row, x_column, y_row, y_column, block, tile, first_tile, chunk,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, LOADS: tl.constexpr, SIMILARITY: tl.constexpr,
    RELATION: tl.constexpr, SAVED: tl.constexpr, OF_Y: tl.constexpr, OF_SCALE: tl.constexpr, OF_BIAS: tl.constexpr,
    NORMALIZE: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """A tile of W, in halves where the copy engine leaves room for 128 rows: that takes half the registers."""
    inside = at_rows < rows
    _, j = block_offsets(first_tile + tile, BN, columns)
    if SAVED:
        t = tl.load(saved + _first(first_tile + tile, rows, BN) + i[:, None] * BN + tl.arange(0, BN)[None, :])
    else:
        of_y = factors(y_factor, j, BN, SIMILARITY, DTYPE)
        t = half_similarities(
            x, y, block, first_tile + tile, i, j, of_x, of_y, width, x_row, x_column, y_row, y_column,
            BM, BN, BK, LOADS, SIMILARITY, NORMALIZE, PRECISION, DTYPE,
        )  # fmt: skip
    parts: tl.constexpr = 2 if LOADS == TMA else 1
    left, right = t, t
    if LOADS == TMA:
        left, right = halves(t, BM, BN)
    along, sums = outer, outer
    for n in tl.static_range(parts):
        more, more_sums = _weights_of_part(
            left if n == 0 else right, y_factor, bias, column_labels, row_self, weights, column_sums, bias_sums, own,
            label, self, nothing, slope, shift, outer, by_scale, of_each, each_by_scale, of_positive, of_x, at_rows,
            rows, columns, block, parts * tile + n, parts * first_tile, chunk, BM, BN // parts, LOADS, SIMILARITY,
            RELATION, OF_Y, OF_SCALE, OF_BIAS, NORMALIZE, DTYPE,
        )  # fmt: skip
        along, sums = (more, more_sums) if n == 0 else (along + more, sums + more_sums)
    if OF_SCALE:
        tl.store(scale_sums + tile * rows + at_rows, along * of_row, mask=inside)
    if SIMILARITY == EUCLIDEAN:
        tl.store(row_sums + tile * rows + at_rows, sums, mask=inside)


@triton.jit
def weights(
    x, y, x_factor, y_factor, scale, bias, smoothing, row_target, row_labels, column_labels, row_self,
    negative_lse, grad_negative_lse, grad_positive, grad_loss, counted, gradient_scale, saved, weights, column_sums,
    bias_sums, row_sums, scale_sums,
    rows, columns, width, x_row, x_column, y_row, y_column, scale_stride, first_tile, tiles, tiles_each, chunk,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, LOADS: tl.constexpr, SIMILARITY: tl.constexpr,
    RELATION: tl.constexpr, SAVED: tl.constexpr, OF_Y: tl.constexpr, OF_SCALE: tl.constexpr, OF_BIAS: tl.constexpr,
    REDUCTION: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Some tiles of W, and what the gradients of bias and scale are made of: sums over a tile's rows for each column,
    (row block, chunk), and over its columns for each row, (tile of the chunk, rows).

    What multiplies a whole row is made once. grad_positive, grad_negative_lse: (B,), each times the gradient of the
    row's loss where there is one.
    """
    block, share = tl.program_id(0), tl.program_id(1)
    at_rows, i = block_offsets(block, BM, rows)
    inside = at_rows < rows
    of_x = factors(x_factor, i, BM, SIMILARITY, DTYPE)
    factor = tl.load(scale + i * scale_stride)
    own, label, self = _labels_of_rows(row_target, row_labels, row_self, i, RELATION)
    lse = tl.load(negative_lse + i)
    # An invalid row has a loss of NaN, no gradient.
    nothing = (lse == float("-inf")) | (~inside) | (own == IGNORED) | (own == INVALID)
    shift = tl.where(nothing, float("inf"), lse * LOG2E)  # exp of minus infinity: such a row has no weights
    of_lse, of_own = tl.load(grad_negative_lse + i), tl.load(grad_positive + i)
    if grad_loss is not None:
        g = of_losses(grad_loss, counted, i, REDUCTION)
        of_lse, of_own = g * of_lse, g * of_own
    outer = tl.where(nothing, 0.0, of_lse)
    of_w = weight_factor(of_x, gradient_scale, SIMILARITY)
    of_positive = tl.where((own >= 0) & inside, of_own, 0.0) * of_w
    by_scale = outer * factor * of_w
    of_each, each_by_scale = None, None
    if smoothing is not None:  # g e / C
        of_each = tl.where((own >= 0) & inside, g, 0.0)
        of_each *= tl.load(smoothing) / columns
        each_by_scale = of_each * factor * of_w
    of_row = row_factor(of_x, SIMILARITY, NORMALIZE)
    slope = factor * LOG2E * of_row
    if LOADS == TMA:
        first = share * tiles_each
        for tile in range(first, tl.minimum(first + tiles_each, tiles)):
            _weights_of_tile(
                x, y, y_factor, bias, column_labels, row_self, saved, weights, column_sums, bias_sums, row_sums,
                scale_sums, own, label, self, nothing, slope, shift, outer, by_scale, of_each, each_by_scale,
                of_positive, of_x, of_row, at_rows, i, rows, columns, width, x_row, x_column, y_row, y_column, block,
                tile, first_tile, chunk,
                BM, BN, BK, LOADS, SIMILARITY, RELATION, SAVED, OF_Y, OF_SCALE, OF_BIAS, NORMALIZE, PRECISION, DTYPE,
            )  # fmt: skip
    else:  # the addresses of tiles leave no registers for a loop
        tile = share
        _weights_of_tile(
            x, y, y_factor, bias, column_labels, row_self, saved, weights, column_sums, bias_sums, row_sums,
            scale_sums, own, label, self, nothing, slope, shift, outer, by_scale, of_each, each_by_scale, of_positive,
            of_x, of_row, at_rows, i, rows, columns, width, x_row, x_column, y_row, y_column, block, tile, first_tile,
            chunk,
            BM, BN, BK, LOADS, SIMILARITY, RELATION, SAVED, OF_Y, OF_SCALE, OF_BIAS, NORMALIZE, PRECISION, DTYPE,
        )  # fmt: skip
