"""Cases, error terms and costs of `kmeans`; see `fused_margins.ops.cases`."""

from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor

from ...core.similarity import accumulation_dtype
from .. import cases as common
from ..cases import Case, Inputs, Shape, largest, randn
from .op import kmeans

DIFFERENTIABLE = ()
run, observed = common.run_by_name(kmeans), common.as_they_are


def _heaps(
    g: Generator, sizes: tuple[int, ...] = (23, 5, 17), slots: int = 3, width: int = 7, iterations: int = 10,
    **options: Any,
) -> Inputs:  # fmt: skip
    """Classes of three heaps each, their samples in no order: far enough apart that rounding moves no sample."""
    rows = sum(sizes)
    of_class = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    heap = torch.arange(rows) % 3
    x = randn(g, rows, width) + 16 * torch.eye(max(width, 3)).double()[heap, :width]
    shuffled = torch.randperm(rows, generator=g)
    counts = torch.tensor(sizes)
    of_slots = counts.clamp(max=slots)
    waiting = torch.empty(int(of_slots.max()) if len(sizes) else 0, rows, dtype=torch.float64)
    inputs = {
        "x": x[shuffled],
        "members": of_class[shuffled].argsort(stable=True),
        "sizes": counts,
        "slots": of_slots,
        "waiting": waiting.exponential_(generator=g),
        "num_clusters": int(of_slots.sum()),
        "num_iterations": iterations,
        "largest_class": max(sizes, default=0),
    }
    return inputs | options


def _equal(g: Generator) -> Inputs:
    """Every sample the same: one cluster takes all, the others stay empty."""
    inputs = _heaps(g)
    return inputs | {"x": inputs["x"][:1].expand(45, 7)}


CASES = (
    Case("heaps", _heaps, "the common use; sizes that no vector divides"),
    Case("one-cluster", partial(_heaps, slots=1), "the mean of every class"),
    Case("small-classes", partial(_heaps, sizes=(1, 2, 1, 30), slots=4), "classes with fewer samples than clusters"),
    Case("one-class", partial(_heaps, sizes=(31,)), "k-means of everything"),
    Case("one-sample", partial(_heaps, sizes=(1,)), "the smallest problem"),
    Case("seeds-alone", partial(_heaps, iterations=0), "no update: clusters are where they were seeded"),
    Case("equal", _equal, "more clusters than distinct samples"),
    Case("narrow", partial(_heaps, width=3), "less than a vector wide"),
    Case("wide", partial(_heaps, width=131), "wider than any tile"),
    Case("far-away", lambda g: common.moved(_heaps(g), 1000.0), "means of differences do not cancel"),
    Case("many", partial(_heaps, sizes=(211, 307), width=16), "several blocks of samples"),
    Case("strided", lambda g: _heaps(g, width=14) | {"x": _heaps(g, width=14)["x"][:, ::2]}, "every second number"),
)

SHAPES = (
    Shape("digits", 1000, 10, 64),
    Shape("classes_64", 6400, 64, 128),
)


def make_benchmark(shape: Shape, dtype: torch.dtype, generator: Generator) -> Inputs:
    """As many classes as the shape has columns, five clusters each."""
    on_cpu = Generator().manual_seed(0)
    inputs = _heaps(on_cpu, (shape.rows // shape.columns,) * shape.columns, 5, shape.width)
    moved = {n: v.to(generator.device) if isinstance(v, Tensor) else v for n, v in inputs.items()}
    return moved | {"x": moved["x"].to(accumulation_dtype(dtype))}


def multiply_adds(shape: Shape) -> int:
    return 20 * 5 * shape.rows * shape.width


def small_term(name: str, inputs: Inputs, dtype: torch.dtype, of_weights: float = 0.0) -> float:
    """A few roundings of a coordinate each time that a centroid moves; for distances, what the square makes of them."""
    x, eps = inputs["x"], torch.finfo(accumulation_dtype(dtype)).eps
    moved = 8 * eps * (1 + inputs["num_iterations"]) * largest(x)
    if name == "centroids":
        return moved
    width, distance = x.shape[1], largest(kmeans(**inputs, backend="reference")[2]) ** 0.5
    return 2 * width**0.5 * distance * moved + width * moved**2 + 4 * width * eps * distance**2
