"""Cases, error terms and costs of `nearest`; see `fused_margins.ops.cases`."""

from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor

from ...core.enums import Relation, Similarity
from ...core.indices import UNADMITTED
from ...core.similarity import accumulation_dtype, admitted, pair_similarity
from ..cases import Case, Inputs, Shape, reach, relation_of, similarity_of
from .op import nearest

OUTPUTS = ("similarity", "index")
DIFFERENTIABLE = ()
EUCLIDEAN = "negative_squared_euclidean"
SIMILARITIES, RELATIONS = Similarity.names(), Relation.names()


def run(inputs: Inputs, backend: str) -> dict[str, Tensor]:
    return dict(zip(OUTPUTS, nearest(**inputs, backend=backend)))


def observed(outputs: dict[str, Tensor], inputs: Inputs, exact: bool) -> dict[str, Tensor]:
    """A choice counts by its true similarity, NaN where it was not open to the row; where `exact`, by its column."""
    if exact:
        return outputs
    if not inputs["y"].shape[0]:
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
    labels = {
        "row_labels": torch.randint(classes, x.shape[:1], generator=g),
        "column_labels": torch.randint(classes, y.shape[:1], generator=g),
    }
    return {"x": x, "y": y} | labels | options


def _points(
    g: Generator, rows: int = 37, columns: int = 53, width: int = 19, classes: int = 5, **options: Any
) -> Inputs:
    """Two labelled sets of points; sizes are prime."""
    x, y = (torch.randn(n, width, generator=g, dtype=torch.float64) for n in (rows, columns))
    return _labelled(g, x, y, classes, **options)


def _grid(g: Generator, rows: int = 37, columns: int = 53, classes: int = 3, **options: Any) -> Inputs:
    """Small integers: products and distances are exact in every dtype, and many are equal."""
    x, y = (torch.randint(-2, 3, (n, 4), generator=g).double() for n in (rows, columns))
    return _labelled(g, x, y, classes, **options)


def _signs(g: Generator, **options: Any) -> Inputs:
    """Vectors of length 4 made of -1 and 1: cosines are exact multiples of 1/8."""
    x, y = (2 * torch.randint(2, (n, 16), generator=g).double() - 1 for n in (37, 53))
    return _labelled(g, x, y, 3, **options)


def _with_itself(inputs: Inputs) -> Inputs:
    """The rows on both sides; a row is not its own nearest."""
    rows = torch.arange(inputs["x"].shape[0])
    return inputs | {"y": inputs["x"], "column_labels": inputs["row_labels"], "self_index": rows}


def _not_a_number(g: Generator, similarity: str) -> Inputs:
    inputs = _grid(g, similarity=similarity, relation="any", k=10)
    inputs["x"][3] = torch.nan
    inputs["y"][5, 0] = torch.nan
    inputs["y"][7, 1] = torch.inf
    return inputs


def _strided(g: Generator, similarity: str) -> Inputs:
    x = torch.randn(37, 40, generator=g, dtype=torch.float64)[:, 1::2]  # every second number
    y = torch.randn(20, 60, generator=g, dtype=torch.float64).T[5:58]  # transposed with an offset
    return _labelled(g, x, y, 5, similarity=similarity, k=3)


def _some_unadmitted(g: Generator, relation: str) -> Inputs:
    inputs = _points(g, relation=relation, k=3)
    inputs["column_labels"][::3] = UNADMITTED
    inputs["row_labels"][::7] = UNADMITTED
    return inputs


def _far_away(g: Generator) -> Inputs:
    inputs = _points(g, similarity=EUCLIDEAN, k=3)
    return inputs | {"x": inputs["x"] + 1000, "y": inputs["y"] + 1000}


CASES = (
    *(
        Case(f"{s}-{r}", partial(_points, similarity=s, relation=r), "every similarity with every relation")
        for s in SIMILARITIES
        for r in RELATIONS
    ),
    *(
        Case(f"ties-{s}-{r}", partial(_grid, similarity=s, relation=r, k=4), "the lowest column wins", True)
        for s in SIMILARITIES[1:]
        for r in RELATIONS
    ),
    Case("ties-cosine", lambda g: _signs(g, k=4), "equal cosines", True),
    *(Case(f"k-{k}", partial(_points, relation="any", k=k), "how many") for k in (2, 3, 5, 7, 10)),
    Case("k-beyond-class", lambda g: _points(g, classes=20, k=10), "fewer than k admitted: -1 and -inf"),
    Case("k-beyond-columns", lambda g: _points(g, columns=3, relation="any", k=10), "fewer than k columns"),
    Case("no-rows", lambda g: _points(g, rows=0, k=2), "an empty batch"),
    Case("no-columns", lambda g: _points(g, columns=0, k=2), "nothing to choose from"),
    Case("no-width", lambda g: _points(g, width=0, k=2), "vectors of no components: all equal", True),
    Case("one-row", lambda g: _points(g, rows=1), "one row"),
    Case("one-column", lambda g: _points(g, columns=1, k=2), "one column"),
    Case("one-class-same", lambda g: _points(g, classes=1), "one group holds everything"),
    Case("one-class-different", lambda g: _points(g, classes=1, relation="different"), "nothing admitted"),
    Case("itself", lambda g: _with_itself(_points(g)), "easy positives of a batch"),
    Case(
        "itself-any",
        lambda g: _with_itself(_points(g, similarity=EUCLIDEAN, relation="any", k=3)),
        "only self excluded",
    ),
    Case(
        "itself-ties",
        lambda g: _with_itself(_grid(g, similarity=EUCLIDEAN, k=5)),
        "duplicates of a row are not itself",
        True,
    ),
    Case("alone", lambda g: _with_itself(_points(g, classes=10**6)), "every row alone in its class"),
    Case(
        "some-self",
        lambda g: _grid(g, similarity="dot", relation="any", self_index=torch.arange(37) % 5 - 1),
        "self_index of -1 excludes nothing",
        True,
    ),
    *(
        Case(
            f"below-{s}-{r}",
            partial(_grid, similarity=s, relation=r, k=2, below=torch.arange(-9.0, 28.0).double() // 2),
            "semi-hard; an equal similarity is not below",
            True,
        )
        for s in SIMILARITIES[1:]
        for r in RELATIONS
    ),
    Case(
        "below-cosine", lambda g: _signs(g, below=torch.arange(-18.0, 19.0).double() / 16), "semi-hard on cosines", True
    ),
    Case("below-all", lambda g: _points(g, below=torch.full((37,), -2.0).double()), "nothing is below"),
    Case(
        "zero-rows",
        lambda g: _signs(g) | {"x": torch.zeros(37, 16).double()},
        "cosine 0 with everything: all tie",
        True,
    ),
    Case("poles", lambda g: _labelled(g, 2 * torch.eye(9).double(), -torch.eye(9).double(), 1, k=9), "-1 and 0", True),
    *(Case(f"nan-{s}", partial(_not_a_number, similarity=s), "NaN is never chosen", True) for s in SIMILARITIES[1:]),
    Case("strided", lambda g: _strided(g, "cosine"), "neither side contiguous"),
    Case("strided-euclidean", lambda g: _strided(g, EUCLIDEAN), "likewise, with a centre"),
    Case(
        "expanded",
        lambda g: _grid(g, similarity="dot") | {"y": torch.ones(1, 4).double().expand(53, 4)},
        "a stride of 0; all tie",
        True,
    ),
    Case(
        "int32", lambda g: {n: t.int() if n.endswith("labels") else t for n, t in _points(g).items()}, "32-bit labels"
    ),
    Case(
        "large-labels",
        lambda g: {n: t * 2**40 - 2**41 if n.endswith("labels") else t for n, t in _points(g).items()},
        "labels that 32 bits do not hold, some negative",
    ),
    Case("far-away", _far_away, "the expanded distance cancels"),
    Case("many-rows", lambda g: _points(g, 149, 521, 67, classes=3, k=3), "groups of several blocks of rows and tiles"),
    Case("many-columns", lambda g: _points(g, 13, 2311, 5, similarity=EUCLIDEAN, relation="different"), "many tiles"),
    *(
        Case(
            f"aligned-{s}",
            partial(_points, rows=70, columns=300, width=72, similarity=s, relation=r),
            "16-bit vectors at multiples of 16 bytes, which a GPU's copy engine fetches",
        )
        for s, r in zip(SIMILARITIES, RELATIONS)
    ),
    Case("wide", lambda g: _points(g, 5, 7, 307, similarity=EUCLIDEAN), "wider than any tile, few rows"),
    *(
        Case(f"least-{s}-{r}", partial(_points, similarity=s, relation=r, largest=False), "the least similar one")
        for s in SIMILARITIES
        for r in RELATIONS
    ),
    *(
        Case(f"least-ties-{s}", partial(_grid, similarity=s, k=4, largest=False), "the lowest column wins", True)
        for s in SIMILARITIES[1:]
    ),
    Case(
        "least-itself",
        lambda g: _with_itself(_points(g, similarity=EUCLIDEAN, largest=False)),
        "hard positives of a batch",
    ),
    Case("least-far-away", lambda g: _far_away(g) | {"largest": False, "k": 1}, "the expanded distance cancels"),
    Case(
        "least-many-rows",
        lambda g: _points(g, 149, 521, 67, classes=3, similarity=EUCLIDEAN, largest=False),
        "groups of several blocks of rows and tiles",
    ),
    *(
        Case(
            f"unadmitted-{r}",
            partial(_some_unadmitted, relation=r),
            "columns that no relation admits",
        )
        for r in RELATIONS
    ),
)

SHAPES = (
    Shape("positives_512", 512, 512, 128),  # 4 samples a class, as in a metric-learning batch
    Shape("positives_8192", 8192, 8192, 128),
    Shape("negatives_512", 512, 512, 128),
    Shape("negatives_2048", 2048, 2048, 512),
)
SAMPLES_PER_CLASS = 4


def make_benchmark(shape: Shape, dtype: torch.dtype, generator: Generator) -> Inputs:
    """A batch against itself: the nearest of the same class, or of the others."""
    device = generator.device
    x = torch.randn(shape.rows, shape.width, generator=generator, device=device).to(dtype)
    labels = torch.arange(shape.rows, device=device) // SAMPLES_PER_CLASS
    relation = "same" if shape.name.startswith("positives") else "different"
    self_index = torch.arange(shape.rows, device=device)
    return {
        "x": x,
        "y": x,
        "row_labels": labels,
        "column_labels": labels,
        "relation": relation,
        "self_index": self_index,
    }


def multiply_adds(shape: Shape) -> int:
    return shape.rows * (SAMPLES_PER_CLASS if shape.name.startswith("positives") else shape.columns) * shape.width


def small_term(name: str, inputs: Inputs, dtype: torch.dtype, of_weights: float = 0.0) -> float:
    """Four roundings of the largest similarity; twice that for a choice, which compares two."""
    similarity_largest, _ = reach(inputs["x"].nan_to_num(), inputs["y"].nan_to_num(), similarity_of(inputs))
    return (8 if name == "index" else 4) * torch.finfo(accumulation_dtype(dtype)).eps * similarity_largest
