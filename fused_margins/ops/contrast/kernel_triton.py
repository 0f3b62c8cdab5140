"""`contrast` in Triton: the large problems on a GPU.

Forward: tiles of similarities, each row's running maximum and sum over a share of the columns (`_reduce`), then the
shares in their order (`_finish`). Backward: chunk by chunk of columns the derivatives of the similarities (`_weights`),
and of them both gradients (`fused_margins.ops.triton_gradients`).
"""

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import gpu, kept, labels
from ..similarity import RELATIONS, SIMILARITIES, accumulation_dtype
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
    ANY,
    COSINE,
    DIFFERENT,
    EUCLIDEAN,
    IGNORED,
    INVALID,
    LN2,
    LOG2E,
    index_status,
    inverse_lengths,
    pair_products,
    places,
    products,
    similarities,
)  # fmt: skip


@triton.jit
def _prepare_rows(
    x, y, target, self_index, x_factor, positive, row_target, row_self,
    rows, columns, width, x_row, x_column, y_row, y_column, ignore_index,
    BLOCK: tl.constexpr, BK: tl.constexpr, SIMILARITY: tl.constexpr, NORMALIZE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Of each row: its factor, its positive's similarity, its target and own column checked (INVALID: a NaN row)."""
    at, i = places(tl.program_id(0), BLOCK, rows)
    inside = at < rows
    status = index_status(tl.load(target + i), columns, ignore_index)
    if self_index is not None:
        own = index_status(tl.load(self_index + i), columns, IGNORED)
        tl.store(row_self + at, own, mask=inside)
        status = tl.where((own == INVALID) & (status != IGNORED), INVALID, status)
    tl.store(row_target + at, status, mask=inside)
    j = tl.maximum(status, 0).to(tl.int64)
    of_x = tl.full((BLOCK,), 1.0, DTYPE)
    of_y = of_x
    if SIMILARITY == COSINE:
        of_x = inverse_lengths(x, i, width, x_row, x_column, BLOCK, BK, DTYPE)
        of_y = inverse_lengths(y, j, width, y_row, y_column, BLOCK, BK, DTYPE)
        tl.store(x_factor + at, of_x, mask=inside)
    u = pair_products(
        x, y, i, j, width, x_row, x_column, y_row, y_column, of_x, of_y, BLOCK, BK, DTYPE, SIMILARITY, NORMALIZE
    )
    if SIMILARITY == EUCLIDEAN:
        u = -u
    elif SIMILARITY == COSINE and not NORMALIZE:
        u = u * of_x * of_y
    u = tl.where(status == IGNORED, 0.0, tl.where(status == INVALID, float("nan"), u))
    tl.store(positive + at, u, mask=inside)


@triton.jit
def _prepare_columns(
    y, y_factor, columns, width, y_row, y_column, BLOCK: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    at, j = places(tl.program_id(0), BLOCK, columns)
    tl.store(y_factor + at, inverse_lengths(y, j, width, y_row, y_column, BLOCK, BK, DTYPE), mask=at < columns)


@triton.jit
def _admitted(
    at_columns, columns, row_target, row_labels, of_columns, row_self, HAS_LABELS: tl.constexpr, HAS_SELF: tl.constexpr,
    RELATION: tl.constexpr,
):  # fmt: skip
    """(BM, BN): the columns that each row may use. Without labels a row's is its target, a column's its number."""
    if RELATION == ANY:
        mask = (at_columns < columns)[None, :]
    else:
        if HAS_LABELS:
            same = row_labels[:, None] == of_columns[None, :]
        else:
            same = row_target[:, None] == at_columns[None, :]
        mask = (same != (RELATION == DIFFERENT)) & (at_columns < columns)[None, :]
    if HAS_SELF:
        mask = mask & (row_self[:, None] != at_columns[None, :])
    return mask


@triton.jit
def _matters(row_target, tile, columns, BN: tl.constexpr):
    """Whether a tile holds a row's target, or columns beyond the last: others need no mask where targets are labels."""
    held = (row_target >= tile * BN) & (row_target < tile * BN + BN)
    return (tl.max(held.to(tl.int32), 0) > 0) | (tile * BN + BN > columns)


@triton.jit
def _first(tile, rows, BN: tl.constexpr):
    """Where a tile's kept similarities begin."""
    return (tl.full((), 0, tl.int64) + tile) * rows * BN


@triton.jit
def _reduce(
    x, y, x_factor, y_factor, scale, bias, row_target, row_labels, column_labels, row_self,
    maxima, sums, kept,
    rows, columns, width, x_row, x_column, y_row, y_column, scale_stride, largest_plain_scale, tiles_each, kept_tiles,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, SIMILARITY: tl.constexpr,
    RELATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LABELS: tl.constexpr, HAS_SELF: tl.constexpr,
    HAS_KEPT: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Of each row over this program's tiles: the maximum of its logits and the sum of exp(logit - maximum).

    In units of log 2. Programs that share columns are neighbours, so that a tile of y comes from the L2 cache.
    """
    block, share = tl.program_id(0), tl.program_id(1)
    at_rows, i = places(block, BM, rows)
    of_x = tl.full((BM,), 1.0, DTYPE)
    if SIMILARITY == COSINE:
        of_x = tl.load(x_factor + i)
    factor = tl.load(scale + i * scale_stride)
    # Without a maximum nothing overflows up to here: |cosine| <= 1. A scale that is not positive is a NaN in the end.
    running = True
    if SIMILARITY == COSINE and not HAS_BIAS:
        running = tl.max(factor, 0) > largest_plain_scale
    factor *= LOG2E
    own = tl.load(row_target + i)
    label, self = own, own
    if HAS_LABELS:
        label = tl.load(row_labels + i)
    if HAS_SELF:
        self = tl.load(row_self + i)
    maximum = tl.full((BM,), float("-inf"), DTYPE)
    total = tl.zeros((BM,), DTYPE)
    if not running:
        maximum = tl.zeros((BM,), DTYPE)
    first = share * tiles_each
    for tile in range(first, tl.minimum(first + tiles_each, tl.cdiv(columns, BN))):
        at_columns, j = places(tile, BN, columns)
        of_y = tl.full((BN,), 1.0, DTYPE)
        if SIMILARITY == COSINE:
            of_y = tl.load(y_factor + j)
        acc = products(
            x, y, i, j, width, x_row, x_column, y_row, y_column, of_x, of_y,
            BM, BN, BK, EVEN, SIMILARITY, NORMALIZE, PRECISION, DTYPE,
        )  # fmt: skip
        u = similarities(acc, of_x, of_y, SIMILARITY, NORMALIZE)
        if HAS_KEPT:  # noqa: SIM102 - decided when compiled, the second while running
            if tile < kept_tiles:
                within = i[:, None] * BN + tl.arange(0, BN)[None, :]
                tl.store(kept + _first(tile, rows, BN) + within, u, mask=(at_rows < rows)[:, None])
        z = u * factor[:, None]
        if HAS_BIAS:
            z += tl.load(bias + j)[None, :] * LOG2E
        masked = True
        if RELATION == DIFFERENT and not (HAS_LABELS or HAS_SELF):
            masked = _matters(own, tile, columns, BN)
        if masked:
            column_label = at_columns
            if HAS_LABELS:
                column_label = tl.load(column_labels + j)
            mask = _admitted(at_columns, columns, own, label, column_label, self, HAS_LABELS, HAS_SELF, RELATION)
            z = tl.where(mask, z, float("-inf"))
        if running:
            higher = tl.maximum(maximum, tl.max(z, 1))
            total *= tl.where(maximum == higher, 1.0, tl.exp2(maximum - higher))
            maximum = higher
        shift = tl.where(maximum == float("-inf"), 0.0, maximum)
        weight = tl.exp2(z - shift[:, None])
        total += tl.sum(weight, 1)
    tl.store(maxima + share * rows + at_rows, maximum, mask=at_rows < rows)
    tl.store(sums + share * rows + at_rows, total, mask=at_rows < rows)


@triton.jit
def _finish(
    maxima, sums, scale, row_target, negative_lse, rows, shares, scale_stride, BLOCK: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """negative_lse of the shares, added in their order."""
    at, i = places(tl.program_id(0), BLOCK, rows)
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
    good = (target != INVALID) & (tl.load(scale + i * scale_stride) > 0)
    tl.store(negative_lse + at, tl.where(good, lse, float("nan")), mask=at < rows)


@triton.jit
def _weights(
    x, y, x_factor, y_factor, scale, bias, row_target, row_labels, column_labels, row_self,
    negative_lse, grad_positive, grad_negative_lse, unit, kept, weights, column_sums, bias_sums, row_sums, scale_sums,
    rows, columns, width, x_row, x_column, y_row, y_column, scale_stride, first_tile, chunk,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, SIMILARITY: tl.constexpr,
    RELATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LABELS: tl.constexpr, HAS_SELF: tl.constexpr,
    KEPT: tl.constexpr, OF_Y: tl.constexpr, OF_SCALE: tl.constexpr, OF_BIAS: tl.constexpr, NORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """A tile of W (rows x chunk): dL/du times what makes W y and W^T x the gradients but for a multiple of x and y.

    Beside it what that multiple, and the gradients of bias and scale, are made of: sums over the tile's rows for each
    column, (row block, chunk), and over its columns for each row, (tile of the chunk, rows).
    """
    block, tile = tl.program_id(0), tl.program_id(1)
    at_rows, i = places(block, BM, rows)
    at_columns, j = places(first_tile + tile, BN, columns)
    of_x = tl.full((BM,), 1.0, DTYPE)
    of_y = tl.full((BN,), 1.0, DTYPE)
    if SIMILARITY == COSINE:
        of_x = tl.load(x_factor + i)
        of_y = tl.load(y_factor + j)
    factor = tl.load(scale + i * scale_stride)
    own = tl.load(row_target + i)
    label, column_label, self = own, at_columns, own
    if HAS_LABELS:
        label = tl.load(row_labels + i)
        column_label = tl.load(column_labels + j)
    if HAS_SELF:
        self = tl.load(row_self + i)
    lse = tl.load(negative_lse + i)
    nothing = (lse == float("-inf")) | (at_rows >= rows) | (own < 0)  # an invalid row has a loss of NaN, no gradient
    shift = tl.where(nothing, float("inf"), lse * LOG2E)  # exp of minus infinity: such a row has no weights
    outer = tl.where(nothing, 0.0, tl.load(grad_negative_lse + i))  # of a row's log-sum-exp
    if KEPT:
        u = tl.load(kept + _first(first_tile + tile, rows, BN) + i[:, None] * BN + tl.arange(0, BN)[None, :])
    else:
        acc = products(
            x, y, i, j, width, x_row, x_column, y_row, y_column, of_x, of_y,
            BM, BN, BK, EVEN, SIMILARITY, NORMALIZE, PRECISION, DTYPE,
        )  # fmt: skip
        u = similarities(acc, of_x, of_y, SIMILARITY, NORMALIZE)
    z = u * (factor * LOG2E)[:, None]
    if HAS_BIAS:
        z += tl.load(bias + j)[None, :] * LOG2E
    q = tl.exp2(z - shift[:, None])
    here = tile * BN + tl.arange(0, BN)
    special = True
    if RELATION == DIFFERENT and not (HAS_LABELS or HAS_SELF):
        special = _matters(own, first_tile + tile, columns, BN)
    if special:
        mask = _admitted(at_columns, columns, own, label, column_label, self, HAS_LABELS, HAS_SELF, RELATION)
        q = tl.where(mask & (~nothing)[:, None], q, 0.0)
        u = tl.where((at_columns < columns)[None, :], u, 0.0)
    q *= outer[:, None]
    if OF_SCALE:
        tl.store(scale_sums + tile * rows + at_rows, tl.sum(q * u, 1), mask=at_rows < rows)
    if OF_BIAS:
        tl.store(bias_sums + block * chunk + here, tl.sum(q, 0))
    g = q * factor[:, None]
    if special:
        chosen = own[:, None] == at_columns[None, :]
        of_positive = tl.where((own >= 0) & (at_rows < rows), tl.load(grad_positive + i), 0.0)
        g += tl.where(chosen, of_positive[:, None], 0.0)
    if SIMILARITY == COSINE:
        if OF_Y:
            tl.store(column_sums + block * chunk + here, tl.sum(g * u, 0))
        w = g * (of_x * tl.load(unit))[:, None] * of_y[None, :]
    elif SIMILARITY == EUCLIDEAN:
        w = g * (2 * tl.load(unit))
    else:
        w = g * tl.load(unit)
    w = w.to(weights.dtype.element_ty)
    to = weights + at_rows.to(tl.int64)[:, None] * chunk + here[None, :]
    tl.store(to, w, mask=(at_rows < rows)[:, None])
    if SIMILARITY == EUCLIDEAN:  # the rounded weights', so that differences cancel as they should
        tl.store(row_sums + tile * rows + at_rows, tl.sum(w.to(DTYPE), 1), mask=at_rows < rows)
        if OF_Y:
            tl.store(column_sums + block * chunk + here, tl.sum(w.to(DTYPE), 0))


# Up to here the sum of a row's exp(logit) needs no maximum: the logarithm of the largest number, and a little less.
_PLAIN_LOGIT = {torch.float64: 700.0, torch.float32: 86.0}


class _Problem(NamedTuple):
    """Of the inputs, for both directions: sizes, strides, labels as the kernels read them, compile-time options."""

    sizes: tuple[int, int, int]
    strides: tuple[int, ...]
    row_labels: Tensor | None
    column_labels: Tensor | None
    row_block: int
    options: dict[str, Any]


def _int64(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.to(torch.int64).contiguous()


def _problem(
    table: dict[torch.dtype, Tiles],
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_labels: Tensor | None,
    column_labels: Tensor | None,
    self_index: Tensor | None,
    similarity: str,
    relation: str,
) -> _Problem:
    (rows, width), columns = x.shape, y.shape[0]
    if relation == "any":
        row_labels = column_labels = None
    has_labels = row_labels is not None or column_labels is not None
    if has_labels:
        row_labels = target if row_labels is None else row_labels
        column_labels = torch.arange(columns, device=x.device) if column_labels is None else column_labels
    tiles = fit(EUCLIDEAN_TILES if similarity == SIMILARITIES[EUCLIDEAN.value] else table[x.dtype], rows)
    options = {
        "BM": tiles.BM,
        "BN": BN,
        "BK": tiles.BK,
        "EVEN": width > 0 and width % tiles.BK == 0,
        "SIMILARITY": SIMILARITIES.index(similarity),
        "RELATION": RELATIONS.index(relation),
        "HAS_BIAS": bias is not None,
        "HAS_LABELS": has_labels,
        "HAS_SELF": self_index is not None,
        # 32-bit cosines are of unit vectors, made as they are read; 16-bit ones are scaled when they are done.
        "NORMALIZE": similarity == "cosine" and x.dtype in (torch.float32, torch.float64),
        "PRECISION": gpu.precision(x.dtype),
        "DTYPE": numbers(x.dtype),
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }
    labels_of_both = _int64(row_labels), _int64(column_labels)
    return _Problem((rows, columns, width), (*x.stride(), *y.stride()), *labels_of_both, tiles.BM, options)


class _Rows(NamedTuple):
    """What the forward finds out of rows and columns, as views of the buffer that it hands over."""

    x_factor: Tensor
    target: Tensor  # int32: a column, IGNORED or INVALID
    self_index: Tensor  # int32
    y_factor: Tensor


def _views(mean: Tensor, rows: int, columns: int) -> _Rows:
    step = (rows + 3) // 4 * 4
    parts = [mean[n * step : n * step + rows] for n in range(3)]
    integers = [part.view(torch.int32)[:rows] for part in parts[1:]]
    return _Rows(parts[0], integers[0], integers[1], mean[3 * step : 3 * step + columns])


def forward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_labels: Tensor | None,
    column_labels: Tensor | None,
    self_index: Tensor | None,
    similarity: str,
    relation: str,
    ignore_index: int,
    with_mean: bool,
    kept_blocks: int,
    force_running_maximum: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """positive (B,), negative_lse (B,), what it found out of rows and columns, kept similarities."""
    (rows, width), columns = x.shape, y.shape[0]
    sizes = (
        rows,
        rows,
        kept.mean_size(rows, width, columns, "triton"),
        kept.kept_size(rows, columns, kept_blocks, "triton"),
    )
    outputs = tuple(torch.empty(n, dtype=accumulation_dtype(x.dtype), device=x.device) for n in sizes)
    inputs = (x, y, scale, bias, target, row_labels, column_labels, self_index)
    forward_into(outputs, inputs, (similarity, relation, ignore_index), kept_blocks, force_running_maximum)
    return outputs  # type: ignore[return-value]


def forward_into(
    outputs: tuple[Tensor, ...],
    inputs: tuple[Any, ...],
    options_of_op: tuple[str, str, int],
    kept_blocks: int,
    force_running_maximum: bool = False,
) -> None:
    """`forward` into memory that is there."""
    positive, negative_lse, mean, weights = outputs
    x, y, scale, bias, target, row_labels, column_labels, self_index = inputs
    similarity, relation, ignore_index = options_of_op
    (rows, width), columns = x.shape, y.shape[0]
    if labels.raises_everywhere():
        target = labels.check_index(target, columns, ignore_index, "target")
        ignore_index = labels.IGNORED
        if self_index is not None:
            self_index = labels.check_index(self_index, columns, labels.IGNORED, "self_index")
    if not rows:
        return
    if not columns:
        ignored = target == ignore_index
        positive.copy_(torch.where(ignored, 0.0, torch.nan))
        negative_lse.copy_(torch.where(ignored, -torch.inf, torch.nan))
        return
    new = functools.partial(torch.empty, dtype=accumulation_dtype(x.dtype), device=x.device)
    scale, bias = scale.contiguous(), None if bias is None else bias.contiguous()
    target, self_index = target.to(torch.int64).contiguous(), _int64(self_index)
    problem = _problem(
        SIMILARITY_TILES, x, y, bias, target, row_labels, column_labels, self_index, similarity, relation
    )
    found = _views(mean, rows, columns)
    options, scale_stride, depth = problem.options, int(scale.dim() > 0), vector_block(width)
    row_blocks, tiles = triton.cdiv(rows, problem.row_block), triton.cdiv(columns, BN)
    each = triton.cdiv(tiles * row_blocks, gpu.programs(x.device))
    shares = triton.cdiv(tiles, each)
    maxima, sums = new(shares, rows), new(shares, rows)
    plain = -1.0 if force_running_maximum else _PLAIN_LOGIT[sums.dtype] - math.log(columns)
    with gpu.on(x):
        gpu.launch(
            _prepare_rows, (triton.cdiv(rows, 4),),
            x, y, target, self_index, found.x_factor, positive, found.target, found.self_index,
            *problem.sizes, *problem.strides, ignore_index, BLOCK=4, BK=depth, SIMILARITY=options["SIMILARITY"],
            NORMALIZE=options["NORMALIZE"], DTYPE=options["DTYPE"], num_warps=4,
        )  # fmt: skip
        if similarity == "cosine":
            gpu.launch(
                _prepare_columns,
                (triton.cdiv(columns, 16),),
                y,
                found.y_factor,
                columns,
                width,
                *y.stride(),
                BLOCK=16,
                BK=depth,
                DTYPE=options["DTYPE"],
                num_warps=4,
            )
        gpu.launch(
            _reduce, (row_blocks, shares),
            x, y, found.x_factor, found.y_factor, scale, bias, found.target, problem.row_labels, problem.column_labels,
            found.self_index, maxima, sums, weights,
            *problem.sizes, *problem.strides, scale_stride, plain, each, kept_blocks,
            HAS_KEPT=kept_blocks > 0, **options,
        )  # fmt: skip
        gpu.launch(
            _finish, (triton.cdiv(rows, 128),),
            maxima, sums, scale, found.target, negative_lse, rows, shares, scale_stride,
            BLOCK=128, DTYPE=options["DTYPE"], num_warps=4,
        )  # fmt: skip


def backward(
    grad_positive: Tensor,
    grad_negative_lse: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_labels: Tensor | None,
    column_labels: Tensor | None,
    self_index: Tensor | None,
    negative_lse: Tensor,
    mean: Tensor,
    kept_values: Tensor,
    similarity: str,
    relation: str,
    ignore_index: int,
    kept_blocks: int,
    needs: list[bool],
    force_running_maximum: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, y, scale and bias; empty where not needed."""
    rows, columns = x.shape[0], y.shape[0]
    of_x, of_y, of_scale, of_bias = (need and not (n == 3 and bias is None) for n, need in enumerate(needs))
    new = functools.partial(torch.empty, dtype=accumulation_dtype(x.dtype), device=x.device)
    grad_scale = torch.zeros(scale.shape if of_scale else 0, dtype=scale.dtype, device=x.device)
    grad_bias = new(columns if of_bias else 0)
    if not (rows and columns):
        empty = [
            torch.zeros(t.shape if need else 0, dtype=t.dtype, device=t.device) for t, need in ((x, of_x), (y, of_y))
        ]
        return *empty, grad_scale, grad_bias.zero_()  # type: ignore[return-value]
    scale, bias = scale.contiguous(), None if bias is None else bias.contiguous()
    mean, grad_positive, grad_negative_lse = (
        mean.contiguous(),
        grad_positive.contiguous(),
        grad_negative_lse.contiguous(),
    )
    target = target.to(torch.int64).contiguous()
    problem = _problem(WEIGHT_TILES, x, y, bias, target, row_labels, column_labels, self_index, similarity, relation)
    found = _views(mean, rows, columns)
    row_blocks, scale_stride = triton.cdiv(rows, problem.row_block), int(scale.dim() > 0)
    unit = _unit(x.dtype, scale, found, grad_positive, grad_negative_lse, similarity)
    both = Gradients(x, y, similarity, of_x, of_y, found.x_factor, found.y_factor, unit, row_blocks)
    bias_sums = new(row_blocks, both.chunk) if of_bias else new(0)
    scale_sums = new(both.chunk_tiles, rows) if of_scale else new(0)
    kept_values = kept_values.contiguous()
    kept_tiles = min(kept_blocks, both.tiles)
    for first in (*range(0, kept_tiles, both.chunk_tiles), *range(kept_tiles, both.tiles, both.chunk_tiles)):
        is_kept = first < kept_tiles
        count = min(both.chunk_tiles, (kept_tiles if is_kept else both.tiles) - first)
        with gpu.on(x):
            gpu.launch(
                _weights, (row_blocks, count),
                x, y, found.x_factor, found.y_factor, scale, bias, found.target, problem.row_labels,
                problem.column_labels, found.self_index, negative_lse, grad_positive, grad_negative_lse,
                unit, kept_values, both.weights, both.column_sums, bias_sums, both.row_sums, scale_sums,
                *problem.sizes, *problem.strides, scale_stride, first, both.chunk,
                KEPT=is_kept, OF_Y=of_y, OF_SCALE=of_scale, OF_BIAS=of_bias, **problem.options,
            )  # fmt: skip
            both.add(first, count)
        if of_bias:
            inside = slice(first * BN, min((first + count) * BN, columns))
            grad_bias[inside] = bias_sums.sum(0)[: inside.stop - inside.start]
        if of_scale:
            sums = scale_sums[:count].sum(0)
            grad_scale += sums if scale.dim() else sums.sum()
    with gpu.on(x):
        grad_x, grad_y = both.finish()
    return grad_x, grad_y, grad_scale, grad_bias


def _unit(
    dtype: torch.dtype, scale: Tensor, found: _Rows, grad_positive: Tensor, grad_negative_lse: Tensor, similarity: str
) -> Tensor:
    """What W is multiplied by before it is rounded: for float16 the power of two that makes its largest entry fit."""
    one = torch.ones((), dtype=scale.dtype, device=scale.device)
    if dtype != torch.float16:
        return one
    largest = torch.maximum((grad_negative_lse * scale).abs().amax(), grad_positive.abs().amax())
    if similarity == "cosine":
        largest = largest * found.x_factor.amax() * found.y_factor.amax()
    exponent = torch.floor(torch.log2(2.0**13 / largest)).clamp(-100, 100)
    return torch.where(largest > 0, torch.exp2(exponent), one)


def describe(problem: Any) -> str:
    """What the memory budget makes of the problem."""
    return kept.describe(problem, "triton")
