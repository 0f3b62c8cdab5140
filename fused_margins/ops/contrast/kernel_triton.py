"""`contrast` in Triton: the large problems on a GPU.

Forward: tiles of similarities, each row's running maximum and sum over a share of the columns (`reduce`), then the
shares in their order (`finish`). Backward: chunk by chunk of columns the derivatives of the similarities (`weights`),
and of them both gradients (`fused_margins.ops.triton_gradients`).
"""

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import gpu, kept, labels
from ..gpu import cdiv
from ..native import int64
from ..similarity import RELATIONS, accumulation_dtype
from ..triton_gradients import Gradients, unit
from ..triton_tiles import (
    BN,
    DESCRIBED,
    DESCRIBED_TILES,
    LARGE_TILES,
    TILES,
    Tiles,
    sides,
    store_factors,
    tile_options,
    vector_block,
)
from . import triton_kernels as kernels

# Of 1024 rows x 50,048 columns of width 512 on an H200: 130 us, with eight warps 193.
DESCRIBED_WEIGHTS = Tiles(128, 64, 4, 3)
# Up to here the sum of a row's exp(logit) needs no maximum: the logarithm of the largest number, and a little less.
_PLAIN_LOGIT = {torch.float64: 700.0, torch.float32: 86.0}


class _Problem(NamedTuple):
    """Of the inputs, for both directions: sizes, strides, labels as the kernels read them, compile-time options."""

    sizes: tuple[int, int, int]
    strides: tuple[int, ...]
    row_labels: Tensor | None
    column_labels: Tensor | None
    options: dict[str, Any]


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
    with_descriptors: Tiles | None,
) -> _Problem:
    (rows, width), columns = x.shape, y.shape[0]
    if relation == "any":
        row_labels = column_labels = None
    has_labels = row_labels is not None or column_labels is not None
    if has_labels:
        row_labels = target if row_labels is None else row_labels
        column_labels = torch.arange(columns, device=x.device) if column_labels is None else column_labels
    options = tile_options(table, x, y, similarity, with_descriptors) | {
        "RELATION": RELATIONS.index(relation),
        "HAS_BIAS": bias is not None,
        "HAS_LABELS": has_labels,
        "HAS_SELF": self_index is not None,
    }
    labels_of_both = int64(row_labels), int64(column_labels)
    return _Problem((rows, columns, width), (*x.stride(), *y.stride()), *labels_of_both, options)


class _Rows(NamedTuple):
    """What the forward finds out of rows and columns, as views of the buffer that it hands over."""

    x_factor: Tensor
    target: Tensor  # int32: a column, IGNORED or INVALID
    self_index: Tensor  # int32
    y_factor: Tensor


def _views(mean: Tensor, rows: int) -> _Rows:
    # Each a little longer than it need be, so that all begin at 16 bytes.
    step = (rows + 3) // 4 * 4
    x_factor, target, self_index, y_factor = mean.split((step, step, step, mean.shape[0] - 3 * step))
    return _Rows(x_factor, target.view(torch.int32), self_index.view(torch.int32), y_factor)


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
        positive[:rows] = torch.where(ignored, 0.0, torch.nan)
        negative_lse[:rows] = torch.where(ignored, -torch.inf, torch.nan)
        return
    new = functools.partial(torch.empty, dtype=accumulation_dtype(x.dtype), device=x.device)
    scale, bias = scale.contiguous(), None if bias is None else bias.contiguous()
    target, self_index = target.to(torch.int64).contiguous(), int64(self_index)
    unlabelled = relation == "different" and all(t is None for t in (bias, row_labels, column_labels, self_index))
    problem = _problem(
        LARGE_TILES if unlabelled else TILES, x, y, bias, target, row_labels, column_labels, self_index, similarity,
        relation, DESCRIBED_TILES if unlabelled else None,
    )  # fmt: skip
    found = _views(mean, rows)
    options, scale_stride, depth = problem.options, int(scale.dim() > 0), vector_block(width)
    row_blocks, tiles = cdiv(rows, problem.options["BM"]), cdiv(columns, BN)
    each = cdiv(tiles * row_blocks, gpu.programs(x.device))
    shares = cdiv(tiles, each)
    maxima, sums = new(shares, rows), new(shares, rows)
    plain = -1.0 if force_running_maximum else _PLAIN_LOGIT[sums.dtype] - math.log(columns)
    with gpu.on(x):
        gpu.launch(
            kernels.prepare_rows, (cdiv(rows, 4),),
            x, y, target, self_index, found.x_factor, positive, found.target, found.self_index,
            *problem.sizes, *problem.strides, ignore_index, BLOCK=4, BK=depth, SIMILARITY=options["SIMILARITY"],
            NORMALIZE=options["NORMALIZE"], DTYPE=options["DTYPE"], num_warps=4,
        )  # fmt: skip
        if similarity == "cosine":
            store_factors(y, found.y_factor)
        gpu.launch(
            kernels.reduce, (row_blocks, shares),
            *sides(x, y, options), found.x_factor, found.y_factor, scale, bias, found.target, problem.row_labels,
            problem.column_labels, found.self_index, maxima, sums, weights,
            *problem.sizes, *problem.strides, scale_stride, plain, each, kept_blocks,
            HAS_KEPT=kept_blocks > 0, **options,
        )  # fmt: skip
        gpu.launch(
            kernels.finish, (cdiv(rows, 128),),
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
    # Descriptors leave room for tiles of 128 rows, but not beside labels, biases and their sums.
    plain = (
        relation == "different"
        and not of_scale
        and all(t is None for t in (bias, row_labels, column_labels, self_index))
    )
    problem = _problem(
        TILES, x, y, bias, target, row_labels, column_labels, self_index, similarity, relation,
        DESCRIBED_WEIGHTS if plain else None,
    )  # fmt: skip
    found = _views(mean, rows)
    row_blocks, scale_stride = cdiv(rows, problem.options["BM"]), int(scale.dim() > 0)
    of_w = unit(x, lambda: _largest_weight(scale, found, grad_positive, grad_negative_lse, similarity, columns))
    described = problem.options["LOADS"] == DESCRIBED.value
    both = Gradients(x, y, similarity, of_x, of_y, found.x_factor, found.y_factor, of_w, row_blocks)
    x_tiles, y_tiles = sides(x, y, problem.options)
    w_tiles = gpu.describe(both.weights, problem.options["BM"], BN // 2) if described else both.weights
    bias_sums = new(row_blocks, both.chunk) if of_bias else new(0)
    scale_sums = new(both.chunk_tiles, rows) if of_scale else new(0)
    kept_values = kept_values.contiguous()
    kept_tiles = min(kept_blocks, both.tiles)
    for first in (*range(0, kept_tiles, both.chunk_tiles), *range(kept_tiles, both.tiles, both.chunk_tiles)):
        is_kept = first < kept_tiles
        count = min(both.chunk_tiles, (kept_tiles if is_kept else both.tiles) - first)
        each = cdiv(count * row_blocks, gpu.programs(x.device)) if described else 1
        with gpu.on(x):
            gpu.launch(
                kernels.weights, (row_blocks, cdiv(count, each)),
                x_tiles, y_tiles, found.x_factor, found.y_factor, scale, bias, found.target, problem.row_labels,
                problem.column_labels, found.self_index, negative_lse, grad_positive, grad_negative_lse,
                both.unit, kept_values, w_tiles, both.column_sums, bias_sums, both.row_sums, scale_sums,
                *problem.sizes, *problem.strides, scale_stride, first, count, each, both.chunk,
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


def _largest_weight(
    scale: Tensor, found: _Rows, grad_positive: Tensor, grad_negative_lse: Tensor, similarity: str, columns: int
) -> Tensor:
    """A bound of |W|."""
    largest = torch.maximum((grad_negative_lse * scale).abs().amax(), grad_positive.abs().amax())
    if similarity != "cosine":
        return largest
    return largest * found.x_factor[: grad_positive.shape[0]].amax() * found.y_factor[:columns].amax()


def describe(problem: Any) -> str:
    """What the memory budget makes of the problem."""
    return kept.describe(problem, "triton")
