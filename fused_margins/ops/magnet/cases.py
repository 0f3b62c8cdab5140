"""Cases, error terms and costs of `magnet`; see `fused_margins.ops.cases`."""

from functools import partial
from typing import Any

import torch
from torch import Generator

from ...core.enums import Reduction
from ...core.similarity import accumulation_dtype
from .. import cases as common
from ..cases import Case, Inputs, Shape, largest, randn, variants
from .op import magnet

DIFFERENTIABLE = ("x",)
run, observed = common.run_by_name(magnet), common.as_they_are


def _batch(
    g: Generator, clusters: int = 6, members: int = 5, width: int = 19, classes: int = 3, **options: Any
) -> Inputs:
    """Clusters around points of their own; samples of a cluster lie apart in the batch."""
    centres = randn(g, clusters, width)
    index = torch.arange(clusters * members) % max(clusters, 1)
    x = 0.7 * randn(g, len(index), width)
    if clusters:
        x = x + centres[index]
    return {"x": x, "clusters": index, "cluster_labels": torch.arange(clusters) % classes, "alpha": 3.0} | options


def _strided(g: Generator) -> Inputs:
    inputs = _batch(g, width=38)
    return inputs | {"x": inputs["x"][:, ::2]}


def _ragged(g: Generator) -> Inputs:
    inputs = _batch(g)
    return inputs | {"clusters": torch.tensor([0] * 11 + [1] + [2] * 3 + [3] * 9 + [4] + [5] * 5)}


CASES = (
    *variants("batch-{reduction}", _batch, "every reduction", reduction=Reduction.names()),
    Case("one-class", partial(_batch, classes=1), "no other class: the loss is 0"),
    Case("every-class-one-cluster", partial(_batch, classes=6), "no clusters of the same class"),
    Case("ragged", _ragged, "clusters of all sizes, down to one sample"),
    Case("closed", partial(_batch, alpha=-50.0), "no row counts", smooth=False),
    Case("floor", partial(_batch, variance_floor=1e3), "a variance at its floor"),
    Case("far-away", lambda g: common.moved(_batch(g), 1000.0), "an expanded distance would cancel"),
    Case("strided", _strided, "a view with gaps"),
    Case("int32", lambda g: common.of_32_bits(_batch(g)), "32-bit labels"),
    Case("wide", partial(_batch, members=20, width=131), "several blocks of rows and of the width"),
    Case("no-rows", partial(_batch, clusters=0, members=0), "an empty batch"),
)

SHAPES = (
    Shape("magnet_128", 48, 12, 128),
    Shape("magnet_1024", 192, 12, 1024),
    Shape("magnet_1024_64", 768, 12, 1024),
)


def make_benchmark(shape: Shape, dtype: torch.dtype, generator: Generator) -> Inputs:
    inputs = _batch(generator, shape.columns, shape.rows // shape.columns, shape.width, classes=4, alpha=1.0)
    return inputs | {"x": inputs["x"].to(dtype)}


def multiply_adds(shape: Shape) -> int:
    return 4 * shape.rows * shape.columns * shape.width


def small_term(name: str, inputs: Inputs, dtype: torch.dtype, of_weights: float = 0.0) -> float:
    """Four roundings of the largest logit, and for gradients of what the largest difference is multiplied by."""
    x, clusters = inputs["x"], inputs["clusters"].long()
    rows, num_clusters = x.shape[0], len(inputs["cluster_labels"])
    eps = torch.finfo(accumulation_dtype(dtype)).eps
    if not rows:
        return eps
    means = torch.stack([x[clusters == m].mean(0) for m in range(num_clusters)])
    # A mean, and with it a difference, carries roundings of the coordinates as they are.
    coordinate = largest(x)
    distances = torch.cdist(x, means).square()
    own = distances.gather(1, clusters[:, None])
    variance = max(float(own.sum()) / max(rows - 1, 1), inputs.get("variance_floor", 1e-4))
    difference = largest(x[:, None] - means)
    logit = 1 + abs(inputs["alpha"]) + largest(distances) / variance * (1 + coordinate / max(difference, 1e-30))
    total = rows if inputs.get("reduction", "mean") == "sum" else 1
    each = 1 if inputs.get("reduction", "mean") != "mean" else 1 / rows
    if name == "loss":
        return 4 * eps * logit * total
    return 4 * eps * logit * each * (difference + coordinate) / variance
