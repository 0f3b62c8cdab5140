"""Cases, error terms and costs of `sample`; see `fused_margins.ops.cases`."""

import torch
from torch import Generator, Tensor

from ...core.enums import Relation
from ...core.similarity import accumulation_dtype, admitted, unit_rows
from .. import cases as common
from ..cases import Case, Inputs, Shape, randn, relation_of, variants
from .op import sample
from .reference import exponentials, log_weight

DIFFERENTIABLE = ()
run = common.run_by_name(sample)


def observed(outputs: dict[str, Tensor], inputs: Inputs, exact: bool) -> dict[str, Tensor]:
    """A drawn column counts by the number that it was drawn for, -inf for none; NaN where it was not open to a row."""
    index, columns = outputs["index"], inputs["y"].shape[0]
    if exact or not columns:
        return outputs
    cosine = unit_rows(inputs["x"]) @ unit_rows(inputs["y"]).T
    relation = relation_of(inputs, "different")
    open_to_row = admitted(inputs["row_labels"], inputs["column_labels"], relation, inputs.get("self_index"))
    open_to_row &= ~cosine.isnan()
    weight = log_weight(2 - 2 * cosine, inputs["x"].shape[1])
    exponential = exponentials(0, len(index), columns, inputs["seed"].to(index.device), cosine.dtype)
    near = open_to_row & (weight > -torch.inf)
    by_weight = torch.where(near, weight - exponential.log(), torch.nan)
    evenly = torch.where(open_to_row, -exponential, torch.nan)
    column = index.clamp(0, columns - 1)
    number = torch.where(near.any(1, keepdim=True), by_weight, evenly).gather(1, column[:, None])[:, 0]
    number = torch.where(index == column, number, torch.nan)
    return {"index": torch.where(index == -1, -torch.inf, number)}


def _points(
    g: Generator, rows: int = 37, columns: int = 53, width: int = 19, classes: int = 5, **options: object
) -> Inputs:
    """Two labelled sets of points; sizes are prime, and half of the points lie about as near as trained ones do."""
    x, y = randn(g, rows, width), randn(g, columns, width)
    y[::2] += 1
    x += 1
    labels = common.labels(g, rows, columns, classes)
    return {"x": x, "y": y, "seed": torch.randint(2**32, (), generator=g)} | labels | options


def _far(g: Generator) -> Inputs:
    """Every second row looks away from half of the columns, and stands at a right angle to the others."""
    inputs = _points(g, width=18, relation="any")
    y = 1 + randn(g, 53, 18) / 50
    y[::2, ::2] *= -1
    inputs["x"][::2] = -1
    return inputs | {"y": y}


def _strided(g: Generator) -> Inputs:
    x, y = common.strided(g)
    return _points(g) | {"x": 1 + x, "y": 1 + y}


CASES = (
    *variants("{relation}", _points, "every relation", relation=Relation.names()),
    Case("no-rows", lambda g: _points(g, rows=0), "an empty batch"),
    Case("no-columns", lambda g: _points(g, columns=0), "nothing to draw from"),
    Case("no-width", lambda g: _points(g, width=0), "vectors of no components: all beyond the cut-off"),
    Case("one-row", lambda g: _points(g, rows=1), "one row"),
    Case("one-column", lambda g: _points(g, columns=1), "one column, whatever its random number"),
    Case("one-class", lambda g: _points(g, classes=1), "nothing admitted"),
    Case("itself", lambda g: common.with_itself(_points(g)), "negatives of a batch"),
    Case("itself-any", lambda g: common.with_itself(_points(g, relation="any")), "only self excluded"),
    Case("some-self", lambda g: _points(g, self_index=torch.arange(37) % 5 - 1), "self_index of -1 excludes nothing"),
    Case("far", _far, "rows without a column within the cut-off, and rows with some"),
    Case("orthogonal", lambda g: _points(g) | {"x": torch.zeros(37, 19).double()}, "cosine 0 with everything"),
    Case("near", lambda g: _points(g) | {"y": 1 + torch.randn(53, 19, generator=g).double() / 9}, "weights all equal"),
    Case("nan", lambda g: common.not_numbers(_points(g)), "NaN is never drawn"),
    Case("strided", _strided, "neither side contiguous"),
    Case("expanded", lambda g: _points(g) | {"y": torch.ones(1, 19).double().expand(53, 19)}, "a stride of 0"),
    Case("int32", lambda g: common.of_32_bits(_points(g)), "32-bit labels"),
    Case("large-labels", lambda g: common.of_64_bits(_points(g)), "labels that 32 bits do not hold, some negative"),
    Case("large-seed", lambda g: _points(g, seed=torch.tensor(-3)), "a seed that 32 bits do not hold"),
    Case("plane", lambda g: _points(g, width=2), "two dimensions: the logarithm of the distance has no weight"),
    Case("line", lambda g: _points(g, width=1), "one dimension"),
    Case("many-rows", lambda g: _points(g, 149, 521, 67), "several blocks of rows and tiles"),
    Case("many-columns", lambda g: _points(g, 13, 2311, 5), "many tiles, and more than one chunk of 2048"),
    Case("aligned", lambda g: _points(g, 70, 300, 72), common.ALIGNED),
    Case("wide", lambda g: _points(g, 5, 7, 307), "wider than any tile, few rows"),
    Case("unadmitted", lambda g: common.unadmitted(_points(g, relation="any")), "columns that no relation admits"),
)

SHAPES = (
    Shape("batch_512", 512, 512, 128),
    Shape("batch_2048", 2048, 2048, 512),
)


def make_benchmark(shape: Shape, dtype: torch.dtype, generator: Generator) -> Inputs:
    inputs = common.batch_benchmark(shape, dtype, generator)
    return inputs | {"seed": torch.randint(2**32, (), generator=generator, device=generator.device)}


def multiply_adds(shape: Shape) -> int:
    return shape.rows * shape.columns * shape.width


def small_term(name: str, inputs: Inputs, dtype: torch.dtype, of_weights: float = 0.0) -> float:
    """Of two numbers that are compared: four roundings of the cosine, which the weight makes up to 4 D times as large,
    and of logarithms."""
    return (32 * inputs["x"].shape[1] + 64) * torch.finfo(accumulation_dtype(dtype)).eps
