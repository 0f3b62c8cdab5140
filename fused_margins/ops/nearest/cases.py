"""Cases, error terms and costs of `nearest`; see `fused_margins.ops.cases`."""

from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor

from ...core.enums import Relation, Similarity
from ...core.similarity import accumulation_dtype, admitted, pair_similarity
from .. import cases as common
from ..cases import Case, Inputs, Shape, randn, reach, relation_of, similarity_of, variants, with_itself
from .op import nearest

DIFFERENTIABLE = ()
EUCLIDEAN = "negative_squared_euclidean"
SIMILARITIES, RELATIONS = Similarity.names(), Relation.names()
run = common.run_by_name(nearest)


def observed(outputs: dict[str, Tensor], inputs: Inputs, exact: bool) -> dict[str, Tensor]:
    """A choice counts by its true similarity, NaN where it was not open to the row; where `exact`, by its column."""
    if exact or not inputs["y"].shape[0]:
        return outputs
    index, k = outputs["index"], outputs["index"].shape[1]
    column = index.clamp(0, inputs["y"].shape[0] - 1)
    chosen = pair_similarity(inputs["x"][:, None], inputs["y"][column], similarity_of(inputs))
    relation = relation_of(inputs, "same")
    mask = admitted(inputs["row_labels"], inputs["column_labels"], relation, inputs.get("self_index"))
    repeated = torch.ones(k, k, dtype=torch.bool, device=index.device).tril(-1) & (index[:, :, None] == index[:, None])
    open_to_row = mask.gather(1, column) & ~repeated.any(2) & (index == column)
    chosen = torch.where(open_to_row, chosen, torch.nan)
    return {"similarity": outputs["similarity"], "index": torch.where(index == -1, -torch.inf, chosen)}


def _labelled(g: Generator, x: Tensor, y: Tensor, classes: int, **options: Any) -> Inputs:
    return {"x": x, "y": y} | common.labels(g, len(x), len(y), classes) | options


def _points(
    g: Generator, rows: int = 37, columns: int = 53, width: int = 19, classes: int = 5, **options: Any
) -> Inputs:
    """Two labelled sets of points; sizes are prime."""
    return _labelled(g, randn(g, rows, width), randn(g, columns, width), classes, **options)


def _itself(g: Generator, **options: Any) -> Inputs:
    return with_itself(_points(g, **options))


def _far_away(g: Generator, **options: Any) -> Inputs:
    return common.moved(_points(g, similarity=EUCLIDEAN, **options), 1000.0)


def _unadmitted(g: Generator, **options: Any) -> Inputs:
    return common.unadmitted(_points(g, k=3, **options))


def _strided(g: Generator, **options: Any) -> Inputs:
    return _labelled(g, *common.strided(g), 5, k=3, **options)


def _grid(g: Generator, **options: Any) -> Inputs:
    """Small integers: products and distances are exact in every dtype, and many are equal."""
    x, y = (torch.randint(-2, 3, (n, 4), generator=g).double() for n in (37, 53))
    return _labelled(g, x, y, 3, **options)


def _below(g: Generator, **options: Any) -> Inputs:
    return _grid(g, k=2, below=torch.arange(-9.0, 28.0).double() // 2, **options)


def _not_a_number(g: Generator, **options: Any) -> Inputs:
    return common.not_numbers(_grid(g, relation="any", k=10, **options))


def _signs(g: Generator, **options: Any) -> Inputs:
    """Vectors of length 4 made of -1 and 1: cosines are exact multiples of 1/8."""
    x, y = (2 * torch.randint(2, (n, 16), generator=g).double() - 1 for n in (37, 53))
    return _labelled(g, x, y, 3, **options)


EXACT: dict[str, Any] = {"exact": True, "similarity": SIMILARITIES[1:]}  # of whole numbers, in every dtype
ONES = torch.ones(1, 4).double().expand(53, 4)
SOME_SELF: Inputs = {"similarity": "dot", "relation": "any", "self_index": torch.arange(37) % 5 - 1}

CASES = (
    *variants("{similarity}-{relation}", _points, "every similarity with every relation", **common.EVERY),
    *variants(
        "ties-{similarity}-{relation}", partial(_grid, k=4), "the lowest column wins", **EXACT, relation=RELATIONS
    ),
    Case("ties-cosine", lambda g: _signs(g, k=4), "equal cosines", True),
    *variants("k-{k}", _points, "how many", k=(2, 3, 5, 7, 10), relation=("any",)),
    Case("k-beyond-class", lambda g: _points(g, classes=20, k=10), "fewer than k admitted: -1 and -inf"),
    Case("k-beyond-columns", lambda g: _points(g, columns=3, relation="any", k=10), "fewer than k columns"),
    Case("no-rows", lambda g: _points(g, rows=0, k=2), "an empty batch"),
    Case("no-columns", lambda g: _points(g, columns=0, k=2), "nothing to choose from"),
    Case("no-width", lambda g: _points(g, width=0, k=2), "vectors of no components: all equal", True),
    Case("one-row", lambda g: _points(g, rows=1), "one row"),
    Case("one-column", lambda g: _points(g, columns=1, k=2), "one column"),
    Case("one-class-same", lambda g: _points(g, classes=1), "one group holds everything"),
    Case("one-class-different", lambda g: _points(g, classes=1, relation="different"), "nothing admitted"),
    Case("itself", _itself, "easy positives of a batch"),
    Case("itself-any", partial(_itself, similarity=EUCLIDEAN, relation="any", k=3), "only self excluded"),
    Case("itself-ties", lambda g: with_itself(_grid(g, similarity=EUCLIDEAN, k=5)), "duplicates are not itself", True),
    Case("alone", partial(_itself, classes=10**6), "every row alone in its class"),
    Case("some-self", partial(_grid, **SOME_SELF), "self_index of -1 excludes nothing", True),
    *variants("below-{similarity}-{relation}", _below, "semi-hard; equal is not below", **EXACT, relation=RELATIONS),
    Case("below-cosine", lambda g: _signs(g, below=torch.arange(-18.0, 19.0).double() / 16), "semi-hard", True),
    Case("below-all", lambda g: _points(g, below=torch.full((37,), -2.0).double()), "nothing is below"),
    Case("zero-rows", lambda g: _signs(g) | {"x": torch.zeros(37, 16).double()}, "cosines of 0 all tie", True),
    Case("poles", lambda g: _labelled(g, 2 * torch.eye(9).double(), -torch.eye(9).double(), 1, k=9), "-1 and 0", True),
    *variants("nan-{similarity}", _not_a_number, "NaN is never chosen", **EXACT),
    Case("strided", _strided, "neither side contiguous"),
    Case("strided-euclidean", partial(_strided, similarity=EUCLIDEAN), "likewise, with a centre"),
    Case("expanded", lambda g: _grid(g, similarity="dot") | {"y": ONES}, "a stride of 0; all tie", True),
    Case("int32", lambda g: common.of_32_bits(_points(g)), "32-bit labels"),
    Case("large-labels", lambda g: common.of_64_bits(_points(g)), "labels that 32 bits do not hold, some negative"),
    Case("far-away", partial(_far_away, k=3), "the expanded distance cancels"),
    Case("many-rows", lambda g: _points(g, 149, 521, 67, classes=3, k=3), "groups of several blocks of rows and tiles"),
    Case("many-columns", lambda g: _points(g, 13, 2311, 5, similarity=EUCLIDEAN, relation="different"), "many tiles"),
    *(
        Case(f"aligned-{s}", partial(_points, rows=70, columns=300, width=72, similarity=s, relation=r), common.ALIGNED)
        for s, r in zip(SIMILARITIES, RELATIONS)
    ),
    Case("wide", lambda g: _points(g, 5, 7, 307, similarity=EUCLIDEAN), "wider than any tile, few rows"),
    *variants("least-{similarity}-{relation}", partial(_points, largest=False), "the least similar", **common.EVERY),
    *variants("least-ties-{similarity}", partial(_grid, k=4, largest=False), "the lowest column wins", **EXACT),
    Case("least-itself", partial(_itself, similarity=EUCLIDEAN, largest=False), "hard positives of a batch"),
    Case("least-far-away", partial(_far_away, largest=False), "the expanded distance cancels"),
    Case(
        "least-many-rows",
        lambda g: _points(g, 149, 521, 67, classes=3, similarity=EUCLIDEAN, largest=False),
        "groups of several blocks of rows and tiles",
    ),
    *variants("unadmitted-{relation}", _unadmitted, "columns that no relation admits", relation=RELATIONS),
)

SHAPES = (
    Shape("positives_512", 512, 512, 128),
    Shape("positives_8192", 8192, 8192, 128),
    Shape("negatives_512", 512, 512, 128),
    Shape("negatives_2048", 2048, 2048, 512),
)


def make_benchmark(shape: Shape, dtype: torch.dtype, generator: Generator) -> Inputs:
    """A batch against itself: the nearest of the same class, or of the others."""
    relation = "same" if shape.name.startswith("positives") else "different"
    return common.batch_benchmark(shape, dtype, generator) | {"relation": relation}


def multiply_adds(shape: Shape) -> int:
    columns = common.SAMPLES_PER_CLASS if shape.name.startswith("positives") else shape.columns
    return shape.rows * columns * shape.width


def small_term(name: str, inputs: Inputs, dtype: torch.dtype, of_weights: float = 0.0) -> float:
    """Four roundings of the largest similarity; twice that for a choice, which compares two."""
    similarity_largest, _ = reach(inputs["x"].nan_to_num(), inputs["y"].nan_to_num(), similarity_of(inputs))
    return (8 if name == "index" else 4) * torch.finfo(accumulation_dtype(dtype)).eps * similarity_largest
