"""Cases, error terms and costs of `scores`; see `fused_margins.ops.cases`."""

from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor

from ...core.enums import Similarity
from ...core.similarity import accumulation_dtype, similarity_matrix
from .. import cases as common
from ..cases import Case, Inputs, Shape, ignored, largest, poles, randn, reach, similarity_of, variants, zero_rows
from .op import scores

SIMILARITIES = Similarity.names()
DIFFERENTIABLE = ("x", "y", "scale", "bias", "margin")
run, observed = common.run_by_name(scores), common.as_they_are


def _logits(g: Generator, rows: int = 37, columns: int = 53, width: int = 19, **options: Any) -> Inputs:
    """Margin and scale on a classifier's cosines; sizes are prime."""
    target = torch.randint(columns, (rows,), generator=g) if columns else torch.full((rows,), -1)
    inputs = {"x": randn(g, rows, width), "y": randn(g, columns, width), "target": target}
    return inputs | {"scale": 16.0, "margin": 0.35} | options


def _plain(g: Generator, rows: int = 37, columns: int = 53, width: int = 19, **options: Any) -> Inputs:
    return {"x": randn(g, rows, width), "y": randn(g, columns, width)} | options


def _itself(g: Generator, similarity: str) -> Inputs:
    x = randn(g, 23, 11)
    return {"x": x, "y": x, "similarity": similarity}


def _learnable(g: Generator, rows: int = 37, columns: int = 53, **options: Any) -> Inputs:
    """Scale and margin of every row, and a bias: everything that has a gradient."""
    of_rows = {"scale": torch.logspace(0, 9, rows, 2).double(), "margin": randn(g, rows)}
    return _logits(g, rows, columns, bias=randn(g, columns)) | of_rows | options


def _single(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _duplicates(g: Generator, offset: float = 0.0) -> Inputs:
    x = randn(g, 37, 19) + offset
    return {"x": x, "y": x.clone(), "similarity": "negative_squared_euclidean", "scale": _single(0.5)}


def _strided(g: Generator, similarity: str) -> Inputs:
    x, y = common.strided(g)
    of_rows = {"scale": 1 + randn(g, 74)[::2].abs(), "margin": randn(g, 74)[1::2], "bias": randn(g, 106)[::2]}
    return _logits(g) | {"x": x, "y": y, "similarity": similarity} | of_rows


CASES = (
    Case("logits", _logits, "the common use; sizes that no tile divides"),
    *variants("plain-{similarity}", _plain, "similarities as they are", similarity=SIMILARITIES),
    *variants("learnable-{similarity}", _learnable, "every gradient; scales of 1 to 512", similarity=SIMILARITIES),
    Case(
        "learnable-single",
        lambda g: _logits(g, scale=_single(30.0), margin=_single(-0.3), bias=randn(g, 53)),
        "one scale and one negative margin that learn",
    ),
    Case("no-rows", lambda g: _learnable(g, rows=0), "an empty batch"),
    Case("no-columns", lambda g: _learnable(g, columns=0), "no classes"),
    Case("no-width", lambda g: _logits(g, width=0), "vectors of no components"),
    Case("one-row", lambda g: _learnable(g, rows=1), "one row"),
    Case("one-column", lambda g: _learnable(g, columns=1), "one class"),
    Case("one-by-one", lambda g: _logits(g, 1, 1, 1, similarity="dot"), "the smallest problem"),
    Case("some-ignored", lambda g: ignored(_learnable(g, ignore_index=-100), 3), "rows without a target get no margin"),
    Case("all-ignored", lambda g: ignored(_learnable(g, ignore_index=-1), 1), "no margin anywhere"),
    Case("zero-rows", lambda g: zero_rows(_learnable(g)), "zero vectors have cosine 0 and no gradient", smooth=False),
    Case("zero-rows-dot", lambda g: zero_rows(_learnable(g, similarity="dot")), "zero vectors that do have a gradient"),
    Case("poles", lambda g: _logits(g, 14, 14) | poles(g) | {"scale": _single(64.0)}, "cosines of exactly -1, 0 and 1"),
    Case("duplicates", _duplicates, "distances of 0"),
    Case("far-away", lambda g: _duplicates(g, 1000.0), "the expanded distance cancels"),
    *variants("itself-{similarity}", _itself, "one tensor", similarity=SIMILARITIES),
    Case("strided", lambda g: _strided(g, "cosine"), "nothing contiguous"),
    Case("strided-euclidean", lambda g: _strided(g, "negative_squared_euclidean"), "likewise, with a centre"),
    Case("expanded", lambda g: _logits(g) | {"y": randn(g, 1, 19).expand(53, 19)}, "a stride of 0"),
    Case("int32", lambda g: _logits(g) | {"target": torch.arange(37, dtype=torch.int32)}, "32-bit labels"),
    Case("strips", lambda g: _logits(g, 13, 521, 67, scale=_single(8.0)), "more columns than one strip of 256"),
    Case("chunks", lambda g: _learnable(g, rows=29, columns=2311), "more columns than one chunk of 2048"),
    Case("aligned", lambda g: _plain(g, 70, 300, 72), common.ALIGNED),
    *variants("negated-{similarity}", partial(_learnable, sign=-1), "all with the other sign", similarity=SIMILARITIES),
    Case("wide", lambda g: _plain(g, 5, 7, 307, similarity="dot", scale=_single(0.1)), "wider than any tile, few rows"),
)

SHAPES = common.CLASSIFIERS


def make_benchmark(shape: Shape, dtype: torch.dtype, generator: Generator) -> Inputs:
    return common.classifier_benchmark(shape, dtype, generator) | {"margin": 0.35}


def multiply_adds(shape: Shape) -> int:
    return 3 * shape.rows * shape.columns * shape.width


def small_term(name: str, inputs: Inputs, dtype: torch.dtype, of_weights: float = 0.0) -> float:
    """Four roundings of the sum of absolute values that makes an entry."""
    x, y, similarity = inputs["x"], inputs["y"], similarity_of(inputs)
    rows, columns = x.shape[0], y.shape[0]
    scale = torch.as_tensor(inputs.get("scale", 1.0), dtype=torch.float64, device=x.device)
    margin = torch.as_tensor(inputs.get("margin", 0.0), dtype=torch.float64, device=x.device)
    bias = torch.as_tensor(inputs.get("bias", 0.0))
    u_largest, (factor_x, factor_y) = reach(x, y, similarity)
    along = (similarity_matrix(x, y, similarity).abs().sum(1) + margin.abs()).expand(rows)
    of_rows = scale.expand(rows)
    eps = torch.finfo(accumulation_dtype(dtype)).eps
    sums = {
        "scores": largest(scale) * (u_largest + largest(margin)) + largest(bias),
        "grad_x": (1 + of_weights / (4 * eps)) * factor_x * columns * largest(scale),
        "grad_y": (1 + of_weights / (4 * eps)) * factor_y * float(of_rows.sum()),
        "grad_scale": largest(along if scale.dim() else along.sum()),
        "grad_bias": rows,
        "grad_margin": largest(scale if margin.dim() else of_rows.sum()),
    }
    return 4 * eps * sums[name]
