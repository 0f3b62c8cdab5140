"""`contrast` in Triton: the large problems on a GPU.

Forward: tiles of similarities, each row's running maximum and sum over a share of the columns (`reduce`), then the
shares in their order (`finish`), and the losses where there is an epilogue (``triton_epilogue.py``). Backward: chunk by
chunk of columns the derivatives of the similarities (`weights`), and of them both gradients
(`fused_margins.backends.triton.gradients`); or both gradients of exponentials that the forward kept
(``triton_exponentials.py``). What a forward saves: ``triton_saved.py``. Losses of targets alone whose columns fit one
tile: ``triton_few.py``.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...backends.cpu import int64, row_factor, vector
from ...backends.registry import MaybeTensors, Problem
from ...backends.triton import launch
from ...backends.triton.constants import ABSENT, BN, IGNORED, INVALID, TMA
from ...backends.triton.gradients import Gradients, gradient_scale
from ...backends.triton.launch import Part, cdiv
from ...backends.triton.tiles import TILES, TMA_TILES, Tiles, factor_block, sides, tile_options, vector_block
from ...core import indices
from ...core.enums import Reduction, Relation, Similarity
from ...core.similarity import accumulation_dtype
from . import triton_epilogue, triton_exponentials, triton_few
from . import triton_kernels as kernels
from . import triton_saved as saved_parts
from .epilogues import Epilogue
from .op import Contrast
from .triton_saved import Plan, Saved, Vectors

# Where a kernel holds little beside the similarities.
LARGE_TILES = TILES | {torch.bfloat16: Tiles(128, 64, 8, 3), torch.float16: Tiles(128, 64, 8, 3)}
# Of 1024 rows x 50,048 columns of width 512 on an H200: 130 us, with eight warps 193.
TMA_WEIGHTS = Tiles(128, 64, 4, 3)
# Up to here the sum of a row's exp(logit) needs no maximum: the logarithm of the largest number, and a little less.
_PLAIN_LOGIT = {torch.float64: 700.0, torch.float32: 86.0}
_EPILOGUES = (Epilogue.NONE, Epilogue.MARGIN_SOFTMAX, Epilogue.INFO_NCE)
force_running_maximum = False  # a test may ask for the path that no logit overflows


def can_run(problem: Problem) -> str | None:
    """It knows the epilogues that are written in ``triton_epilogue.py``, of columns that stand alone."""
    a = problem.arguments
    if a.group_size != 1:
        return f"takes no groups of columns, got group_size {a.group_size}"
    return None if a.epilogue in _EPILOGUES else f"has no epilogue {a.epilogue.name.lower()!r}"


def plan(a: Contrast, needs: Sequence[bool]) -> Plan:
    """What a forward saves."""
    if force_running_maximum and not saved_parts.saves_similarities(a):
        return plan_of(a, 0)
    return plan_of(a, saved_parts.most_blocks(a, needs))


def plan_of(a: Contrast, blocks: int) -> Plan:
    """Of so many blocks of columns."""
    return saved_parts.plan(a, blocks, triton_few.options(a) if saved_parts.fits_one_tile(a) else None)


def saved_size(a: Contrast, plan: Plan) -> int:
    """Values of the buffer that a forward hands to its backward."""
    return plan.size


def recover_plan(a: Contrast, needs: Sequence[bool], size: int) -> Plan:
    """The plan by which a forward saved so many values."""
    return plan_of(a, saved_parts.blocks_of(a, size))


def describe(problem: Problem) -> str:
    """What the budgets make of the problem."""
    return saved_parts.describe(problem.arguments, plan(problem.arguments, (True,) * 5))


class _Inputs(NamedTuple):
    """For both directions: sizes, strides, scale, bias and labels as the kernels read them, compile-time options."""

    sizes: tuple[int, int, int]
    strides: tuple[int, ...]
    scale: Tensor
    scale_stride: int
    bias: Tensor | None
    row_labels: Tensor | None
    column_labels: Tensor | None
    options: dict[str, Any]


def _inputs(a: Contrast, target: Tensor, table: dict[torch.dtype, Tiles], with_tma: Tiles | None) -> _Inputs:
    (rows, width), columns = a.x.shape, a.y.shape[0]
    row_labels, column_labels = a.row_labels, a.column_labels
    if a.relation == Relation.ANY:
        row_labels = None  # of the columns those that no relation admits are marked
    elif row_labels is not None or column_labels is not None:
        row_labels = target if row_labels is None else row_labels
        column_labels = torch.arange(columns, device=a.x.device) if column_labels is None else column_labels
    scale = row_factor(a.scale, accumulation_dtype(a.x.dtype), a.x.device)
    options = tile_options(table, a.x, a.y, a.similarity, with_tma) | {"RELATION": int(a.relation)}
    factors = scale, int(scale.dim() > 0), vector(a.bias)
    labels = int64(row_labels), int64(column_labels)
    return _Inputs((rows, columns, width), (*a.x.stride(), *a.y.stride()), *factors, *labels, options)


def forward(a: Contrast, plan: Plan) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """positive and negative_lse (B,), or the loss; and what the backward needs; the accumulation dtype throughout."""
    rows, dtype = a.x.shape[0], accumulation_dtype(a.x.dtype)
    saved = a.x.new_empty(saved_size(a, plan), dtype=dtype)
    parts = saved_parts.parts(saved, plan)
    if a.epilogue == Epilogue.NONE:
        positive, negative_lse = (a.x.new_empty(rows, dtype=dtype) for _ in range(2))
        _reduce(a, plan.blocks, parts, positive, negative_lse, None)
        return positive, negative_lse, None, saved
    losses = a.x.new_empty(rows, dtype=dtype) if a.reduction == Reduction.NONE else parts.losses
    if plan.few is not None:
        triton_few.forward(a, *_checked_target(a), parts, plan, losses)
    else:
        _reduce(a, plan.blocks, parts, parts.positive, None, losses)
    loss = losses if isinstance(losses, Tensor) else triton_epilogue.reduced(a, losses, parts, saved)
    return None, None, loss, saved


def _checked_target(a: Contrast) -> tuple[Tensor, int]:
    """The targets, and which is ignored; checked where that raises on every device."""
    if not indices.raises_everywhere():
        return a.target, a.ignore_index
    return indices.check_index(a.target, a.y.shape[0], a.ignore_index, "target", absent=True), indices.IGNORED


def _reduce(
    a: Contrast,
    saved_blocks: int,
    parts: Saved,
    positive: Tensor | Part,
    negative_lse: Tensor | None,
    losses: Tensor | Part | None,
) -> None:
    """Write both vectors, negative_lse into `parts` and, where it is an output, a second time; and where there is an
    epilogue the losses of rows, and their derivatives."""
    x, y, (rows, width), columns = a.x, a.y, a.x.shape, a.y.shape[0]
    target, ignore_index = _checked_target(a)
    self_index = a.self_index
    if indices.raises_everywhere() and self_index is not None:
        self_index = indices.check_index(self_index, columns, indices.IGNORED, "self_index")
    if not rows:
        return
    target, self_index = int64(target), int64(self_index)
    new = functools.partial(torch.empty, dtype=positive.dtype, device=x.device)
    plain = saved_parts.is_plain(a)
    inputs = _inputs(a, target, LARGE_TILES if plain else TILES, TMA_TILES if plain else None)
    options, depth = inputs.options, vector_block(width)
    row_blocks, tiles = cdiv(rows, options["BM"]), cdiv(columns, BN)
    each = max(1, cdiv(tiles * row_blocks, launch.num_persistent_programs(x.device)))
    shares = cdiv(tiles, each)
    maxima, sums = new(shares, rows), new(shares, rows)
    totals = new(shares, rows) if a.smoothing else None
    plain_logit = -1.0 if force_running_maximum else _PLAIN_LOGIT[sums.dtype] - math.log(max(1, columns))
    saves = (kernels.SIMILARITIES if saved_blocks else kernels.NOTHING).value
    to_save = parts.similarities
    if parts.exponentials is not None:
        saves, to_save = kernels.EXPONENTIALS.value, parts.exponentials
        if options["LOADS"] == TMA.value:
            to_save = launch.tma_descriptor(to_save.tensor().view(rows, -1), options["BM"], BN // 2)
    margin = angle = None
    smoothing = triton_epilogue.smoothing(a)
    if losses is not None:
        margin, angle = triton_epilogue.margin_and_angle(a, positive.dtype)
    with launch.on(x):
        if columns:
            block = factor_block(depth)
            column_blocks = cdiv(columns, block) if a.similarity == Similarity.COSINE else 0
            launch.launch(
                kernels.prepare, (cdiv(rows, 4) + column_blocks,),
                x, y, target, self_index, parts.x_factor, parts.y_factor, positive, parts.target, parts.self_index,
                parts.units, *inputs.sizes, *inputs.strides, ignore_index, saved_blocks * BN, BLOCK=4,
                COLUMN_BLOCK=block, BK=depth, SIMILARITY=options["SIMILARITY"], NORMALIZE=options["NORMALIZE"],
                DTYPE=options["DTYPE"], num_warps=4,
            )  # fmt: skip
            launch.launch(
                kernels.reduce, (row_blocks, shares),
                *sides(x, y, options), parts.x_factor, parts.y_factor, inputs.scale, inputs.bias, parts.target,
                inputs.row_labels, inputs.column_labels, parts.self_index, maxima, sums, totals, to_save,
                *inputs.sizes, *inputs.strides, inputs.scale_stride, plain_logit, each, saved_blocks,
                SAVES=saves, **options,
            )  # fmt: skip
        else:  # no target exists
            none = (target == ignore_index) | (target == indices.ABSENT)
            launch.as_tensor(positive)[:rows] = torch.where(none, 0.0, torch.nan)
            absent = torch.where(target == indices.ABSENT, ABSENT.value, INVALID.value)
            parts.target.tensor()[:rows] = torch.where(target == ignore_index, IGNORED.value, absent)
        launch.launch(
            kernels.finish, (cdiv(rows, 128),),
            maxima, sums, totals, positive, inputs.scale, margin, angle, smoothing, parts.target, parts.negative_lse,
            negative_lse, losses, parts.derivatives, parts.exponentials if losses is not None else None, rows, columns,
            shares, inputs.scale_stride, 0 if margin is None else int(margin.dim() > 0), saved_blocks * BN,
            BLOCK=128, ANGULAR=a.angle_rad != 0, STRAIGHT=a.straight_through, DTYPE=options["DTYPE"], num_warps=4,
        )  # fmt: skip


def backward(grads: MaybeTensors, a: Contrast, saved: Tensor, plan: Plan, needs: Sequence[bool]) -> list[Tensor | None]:
    """Gradients of x, y, scale, bias and margin, of those that are needed."""
    variables = (a.x, a.y, a.scale, a.bias, a.margin)
    needs = [need and isinstance(t, Tensor) for need, t in zip(needs, variables)]
    parts = saved_parts.parts(saved, plan)
    grad_positive, grad_negative_lse, grad_loss = grads
    if plan.few is not None and grad_loss is not None:
        of_few = needs[0], needs[1], needs[2], needs[4]
        grad_x, grad_y, of_scale, of_margin = triton_few.backward(grad_loss, a, parts, plan, of_few)
        by_scale = None if of_scale is None else _of_factor(of_scale, a.scale)
        return [grad_x, grad_y, by_scale, None, None if of_margin is None else _of_factor(of_margin, a.margin)]
    kept = parts.exponentials is not None
    whole = kept and plan.blocks * BN >= a.y.shape[0]
    if grad_loss is not None:
        vectors = Vectors(*triton_epilogue.of_each_loss(a, parts), grad_loss)
    else:
        assert grad_positive is not None
        assert grad_negative_lse is not None
        vectors = Vectors(grad_negative_lse, grad_positive, None)
    gradients: list[Tensor | None] = [None] * 4
    if not whole:
        blocks = (0, plan.blocks) if kept else (plan.blocks, 0)
        gradients = _gradients(a, *blocks, parts, vectors, needs[:4])
    if kept:
        gradients[:2] = triton_exponentials.add_gradients(gradients[:2], vectors, a, parts, needs[:2])
    grad_margin = None
    if grad_loss is not None and gradients[2] is not None:
        (of_scale,) = triton_epilogue.derivatives(grad_loss, a, parts, 2)
        gradients[2] = gradients[2] + _of_factor(of_scale, a.scale)
    if grad_loss is not None and needs[4]:
        (of_margin,) = triton_epilogue.derivatives(grad_loss, a, parts, 3)
        grad_margin = _of_factor(of_margin, a.margin)
    return [*gradients, grad_margin]


def _of_factor(of_rows: Tensor, factor: float | Tensor) -> Tensor:
    """The gradient of a factor, of what each row contributes to it."""
    return of_rows if isinstance(factor, Tensor) and factor.dim() else of_rows.sum()


def _gradients(
    a: Contrast, saved_blocks: int, first_block: int, parts: Saved, vectors: Vectors, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Of x, y, scale and bias, from one block of columns on."""
    x, y, rows, columns = a.x, a.y, a.x.shape[0], a.y.shape[0]
    _, of_y, of_scale, of_bias = needs
    new = functools.partial(torch.empty, dtype=accumulation_dtype(x.dtype), device=x.device)
    if not (rows and columns and any(needs)):
        variables = (x, y, a.scale, a.bias)
        return [torch.zeros_like(t) if need else None for t, need in zip(variables, needs)]  # type: ignore[arg-type]
    # The copy engine leaves room for tiles of 128 rows, but not beside labels, biases and their sums.
    inputs = _inputs(a, a.target, TILES, TMA_WEIGHTS if saved_parts.is_plain(a) and not of_scale else None)
    scale, options = inputs.scale, inputs.options
    row_blocks = cdiv(rows, options["BM"])
    grad_scale = torch.zeros_like(scale) if of_scale else None
    grad_bias = new(columns) if of_bias else None
    of_w = gradient_scale(x, lambda: _largest_weight(a, scale, parts, vectors))
    uses_tma = options["LOADS"] == TMA.value
    both = Gradients(a, needs[:2], (parts.x_factor, parts.y_factor), of_w, row_blocks)
    x_tiles, y_tiles = sides(x, y, options)
    w_tiles = launch.tma_descriptor(both.weights, options["BM"], BN // 2) if uses_tma else both.weights
    bias_sums = new(row_blocks, both.chunk) if of_bias else new(0)
    scale_sums = new(both.chunk_tiles, rows) if of_scale else new(0)
    saved_tiles = min(saved_blocks, both.tiles)
    made_again = max(saved_tiles, first_block)
    for first in (*range(0, saved_tiles, both.chunk_tiles), *range(made_again, both.tiles, both.chunk_tiles)):
        is_saved = first < saved_tiles
        count = min(both.chunk_tiles, (saved_tiles if is_saved else both.tiles) - first)
        each = cdiv(count * row_blocks, launch.num_persistent_programs(x.device)) if uses_tma else 1
        with launch.on(x):
            launch.launch(
                kernels.weights, (row_blocks, cdiv(count, each)),
                x_tiles, y_tiles, parts.x_factor, parts.y_factor, scale, inputs.bias, triton_epilogue.smoothing(a),
                parts.target, inputs.row_labels, inputs.column_labels, parts.self_index, parts.negative_lse, *vectors,
                parts.counted, both.gradient_scale, parts.similarities, w_tiles, both.column_sums, bias_sums,
                both.row_sums, scale_sums, *inputs.sizes, *inputs.strides, inputs.scale_stride, first, count, each,
                both.chunk, SAVED=is_saved, OF_Y=of_y, OF_SCALE=of_scale, OF_BIAS=of_bias, REDUCTION=int(a.reduction),
                **options,
            )  # fmt: skip
            both.add(first, count)
        if grad_bias is not None:
            inside = slice(first * BN, min((first + count) * BN, columns))
            grad_bias[inside] = bias_sums.sum(0)[: inside.stop - inside.start]
        if grad_scale is not None:
            sums = scale_sums[:count].sum(0)
            grad_scale += sums if scale.dim() else sums.sum()
    with launch.on(x):
        grad_x, grad_y = both.finish()
    return [grad_x, grad_y, grad_scale, grad_bias]


def _largest_weight(a: Contrast, scale: Tensor, parts: Saved, vectors: Vectors) -> Tensor:
    """A bound of |W|."""
    if vectors.of_loss is None:
        of_lse, of_positive = map(launch.as_tensor, vectors[:2])
    else:
        of_lse, of_positive = triton_epilogue.derivatives(vectors.of_loss, a, parts, 0, 1)
    largest = torch.maximum((of_lse * scale).abs().amax(), of_positive.abs().amax())
    if a.smoothing and vectors.of_loss is not None:  # at most its part of one logit, were there but one
        largest = largest + (a.smoothing * scale * triton_epilogue.of_each_row(vectors.of_loss, a, parts)).abs().amax()
    if a.similarity != Similarity.COSINE:
        return largest
    rows, columns = a.x.shape[0], a.y.shape[0]
    return largest * parts.x_factor.tensor()[:rows].amax() * parts.y_factor.tensor()[:columns].amax()
