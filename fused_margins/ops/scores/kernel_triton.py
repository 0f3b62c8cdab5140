"""`scores` in Triton: one product with scale, margin and bias applied while its tiles are in registers."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...backends.cpu import int64, row_factor, vector
from ...backends.registry import MaybeTensors
from ...backends.triton import launch
from ...backends.triton.constants import BN
from ...backends.triton.gradients import Gradients, gradient_scale
from ...backends.triton.launch import cdiv
from ...backends.triton.tiles import TILES, TMA_TILES, Tiles, sides, store_factors, tile_options
from ...core import indices
from ...core.enums import Similarity
from ...core.similarity import accumulation_dtype
from . import triton_kernels as kernels
from .op import Scores

# With a tile of incoming gradients in registers, too, float32 has room for fewer rows and float64 needs more warps.
BACKWARD_TILES = TILES | {torch.float32: Tiles(32, 16, 4, 3), torch.float64: Tiles(16, 16, 8, 1)}


def saved_size(a: Scores, plan: Any) -> int:
    """Its backward needs the inputs alone."""
    return 0


class _Inputs(NamedTuple):
    """A call as the kernels read it, and what they are compiled for."""

    x_factor: Tensor
    y_factor: Tensor
    scale: Tensor
    bias: Tensor | None
    margin: Tensor
    target: Tensor | None
    sizes: tuple[int, ...]  # and strides
    options: dict[str, Any]


def _inputs(a: Scores, table: dict[torch.dtype, Tiles], with_tma: Tiles | None = None) -> _Inputs:
    dtype, device = accumulation_dtype(a.x.dtype), a.x.device
    cosine = a.similarity == Similarity.COSINE
    x_factor, y_factor = (torch.empty(t.shape[0] if cosine else 0, dtype=dtype, device=device) for t in (a.x, a.y))
    if cosine:
        store_factors(a.x, a.y, x_factor, y_factor)
    scale, margin = row_factor(a.scale, dtype, device), row_factor(a.margin, dtype, device)
    (rows, width), columns = a.x.shape, a.y.shape[0]
    strides = (*a.x.stride(), *a.y.stride(), int(scale.dim() > 0), int(margin.dim() > 0))
    options = tile_options(table, a.x, a.y, a.similarity, with_tma) | {"NEGATED": a.sign < 0}
    others = scale, vector(a.bias), margin, int64(a.target)
    return _Inputs(x_factor, y_factor, *others, (rows, columns, width, *strides), options)


def forward(a: Scores, plan: Any) -> tuple[Tensor, Tensor]:
    """(B, N) in the dtype of x, and nothing saved."""
    if a.target is not None and indices.raises_everywhere():
        target = indices.check_index(a.target, a.y.shape[0], a.ignore_index, "target")
        a = a._replace(target=target, ignore_index=indices.IGNORED)
    rows, columns = a.x.shape[0], a.y.shape[0]
    scores, saved = a.x.new_empty(rows, columns), a.x.new_empty(0, dtype=accumulation_dtype(a.x.dtype))
    if not scores.numel():
        return scores, saved
    with launch.on(a.x):
        inputs = _inputs(a, TILES, TMA_TILES)
        row_blocks = cdiv(rows, inputs.options["BM"])
        launch.launch(
            kernels.scores, (row_blocks * cdiv(columns, BN),),
            *sides(a.x, a.y, inputs.options), inputs.x_factor, inputs.y_factor, inputs.scale, inputs.bias,
            inputs.margin, inputs.target, scores, *inputs.sizes, a.ignore_index, row_blocks, **inputs.options,
        )  # fmt: skip
    return scores, saved


def backward(grads: MaybeTensors, a: Scores, saved: Tensor, plan: Any, needs: Sequence[bool]) -> list[Tensor | None]:
    """Gradients of x, y, scale, bias and margin, of those that are needed."""
    x, y, (grad_scores,) = a.x, a.y, grads
    assert grad_scores is not None
    rows, columns = x.shape[0], y.shape[0]
    variables = (x, y, a.scale, a.bias, a.margin)
    wanted = [t if need and isinstance(t, Tensor) else None for need, t in zip(needs, variables)]
    of_x, of_y, of_scale, of_bias, of_margin = (t is not None for t in wanted)
    if not (rows and columns):
        return [None if t is None else torch.zeros_like(t) for t in wanted]

    def new(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=accumulation_dtype(x.dtype), device=x.device)

    grad_scale, grad_bias, grad_margin = (None if t is None else new(*t.shape) for t in wanted[2:])
    with launch.on(x):
        inputs = _inputs(a, BACKWARD_TILES)
        row_blocks = cdiv(rows, inputs.options["BM"])
        of_w = gradient_scale(x, lambda: _largest_weight(grad_scores, inputs, a.similarity))
        both = Gradients(a, (of_x, of_y), (inputs.x_factor, inputs.y_factor), of_w, row_blocks)
        bias_sums = new(row_blocks, both.chunk) if of_bias else new(0)
        scale_sums, margin_sums = (new(both.chunk_tiles, rows) if need else new(0) for need in (of_scale, of_margin))
        for first in range(0, both.tiles, both.chunk_tiles):
            count = min(both.chunk_tiles, both.tiles - first)
            launch.launch(
                kernels.weights, (row_blocks, count),
                grad_scores, x, y, inputs.x_factor, inputs.y_factor, inputs.scale, inputs.margin, inputs.target,
                both.gradient_scale, both.weights, both.column_sums, both.row_sums, scale_sums, margin_sums, bias_sums,
                *inputs.sizes, a.ignore_index, first, both.chunk,
                OF_Y=of_y, OF_SCALE=of_scale, OF_MARGIN=of_margin, OF_BIAS=of_bias, **inputs.options,
            )  # fmt: skip
            both.add(first, count)
            if grad_bias is not None:
                inside = slice(first * BN, min((first + count) * BN, columns))
                grad_bias[inside] = bias_sums.sum(0)[: inside.stop - inside.start]
            for total, sums in ((grad_scale, scale_sums), (grad_margin, margin_sums)):
                if total is not None:
                    total += sums[:count].sum(0) if total.dim() else sums[:count].sum()
        grad_x, grad_y = both.finish()
    return [grad_x, grad_y, grad_scale, grad_bias, grad_margin]


def _largest_weight(grad_scores: Tensor, inputs: _Inputs, similarity: Similarity) -> Tensor:
    """A bound of |W|."""
    largest = grad_scores.abs().amax().to(inputs.scale.dtype) * inputs.scale.amax()
    return largest * inputs.x_factor.amax() * inputs.y_factor.amax() if similarity == Similarity.COSINE else largest
