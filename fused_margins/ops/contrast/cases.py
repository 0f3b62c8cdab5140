"""Cases, error terms and costs of `contrast`; see `fused_margins.ops.cases`."""

from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor

from ...core.enums import Relation, Similarity
from ...core.indices import ABSENT, UNADMITTED
from ...core.similarity import accumulation_dtype, admitted, best_of_groups, similarity_matrix
from ..cases import Case, Inputs, Shape, largest, reach, relation_of, similarity_of
from . import cases_of_epilogues as of_epilogues
from .op import contrast

SIMILARITIES, RELATIONS = Similarity.names(), Relation.names()
OUTPUTS = ("positive", "negative_lse", "loss")
DIFFERENTIABLE = ("x", "y", "scale", "bias", "margin")


def run(inputs: Inputs, backend: str) -> dict[str, Tensor]:
    results = contrast(**inputs, backend=backend)
    return {"loss": results} if isinstance(results, Tensor) else dict(zip(OUTPUTS, results))


def observed(outputs: dict[str, Tensor], inputs: Inputs, exact: bool) -> dict[str, Tensor]:
    return outputs


def _randn(g: Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def _randint(g: Generator, high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=g)


def _softmax(g: Generator, rows: int = 37, columns: int = 53, width: int = 19, **options: Any) -> Inputs:
    """A classifier: the column of a row's class is its positive, all others are admitted. Sizes are prime."""
    inputs = {
        "x": _randn(g, rows, width),
        "y": _randn(g, columns, width),
        "target": _randint(g, columns, rows) if columns else torch.full((rows,), -1),
        "scale": 16.0,
    }
    return inputs | options


def _batch(
    g: Generator, rows: int = 37, columns: int = 53, width: int = 19, classes: int = 5, **options: Any
) -> Inputs:
    """A batch against another one, both labelled."""
    labels = {"row_labels": _randint(g, classes, rows), "column_labels": _randint(g, classes, columns)}
    return _softmax(g, rows, columns, width, scale=2.0) | labels | options


def _with_itself(g: Generator, rows: int = 41, width: int = 17, **options: Any) -> Inputs:
    """One batch on both sides; a row is not its own column."""
    x, labels = _randn(g, rows, width), _randint(g, 6, rows)
    shared = {"x": x, "y": x, "self_index": torch.arange(rows), "row_labels": labels, "column_labels": labels}
    return shared | {"target": (torch.arange(rows) + 3) % rows, "scale": 10.0} | options


def _poles(g: Generator) -> Inputs:
    """Rows and columns on the axes, of lengths 1, 2 and 4: every cosine is exactly -1, 0 or 1."""
    axes = torch.cat([torch.eye(7), -torch.eye(7)]).double()
    lengths = 2.0 ** _randint(g, 3, 14, 1)
    return {"x": axes * lengths, "y": axes.flip(0) * lengths, "target": torch.arange(14).flip(0), "scale": 64.0}


def _pointing_away(g: Generator) -> Inputs:
    axis = torch.ones(1, 16, dtype=torch.float64)
    return {"x": axis.repeat(5, 1), "y": -axis.repeat(9, 1), "target": torch.arange(5), "scale": 64.0}


def _zero_rows(g: Generator, **options: Any) -> Inputs:
    inputs = _batch(g, **options)
    inputs["x"][::3] = 0
    inputs["y"][::4] = 0
    return inputs


def _duplicates(g: Generator, **options: Any) -> Inputs:
    inputs = _batch(g, columns=37, **options)
    inputs["y"][::2] = inputs["x"][::2]  # distances of exactly 0
    inputs["y"][1] = inputs["y"][0]
    return inputs | {"target": torch.arange(37)}


def _ignored(g: Generator, every: int, ignore_index: int) -> Inputs:
    inputs = _softmax(g, ignore_index=ignore_index)
    inputs["target"][::every] = ignore_index
    return inputs


def _absent(g: Generator) -> Inputs:
    inputs = _softmax(g)
    inputs["target"][::3] = ABSENT
    inputs["target"][1] = -1
    return inputs


def _unadmitted(g: Generator, relation: str) -> Inputs:
    inputs = _batch(g, relation=relation)
    inputs["column_labels"][::3] = UNADMITTED
    inputs["row_labels"][::7] = UNADMITTED
    return inputs


def _grouped(g: Generator, groups: int, size: int, **options: Any) -> Inputs:
    """Classes of several centers: the columns of a class are a group."""
    inputs = _softmax(g, columns=groups * size, scale=4.0)
    of_classes = {"row_labels": inputs["target"] // size, "column_labels": torch.arange(groups * size) // size}
    return inputs | of_classes | {"group_size": size} | options


def _strided(g: Generator, similarity: str) -> Inputs:
    x, y = _randn(g, 37, 40)[:, 1::2], _randn(g, 20, 60).T[5:58]  # every second number; transposed with an offset
    return _softmax(g, scale=2.0) | {"x": x, "y": y, "bias": _randn(g, 106)[::2], "similarity": similarity}


def _moved(inputs: Inputs, offset: float) -> Inputs:
    return inputs | {"x": inputs["x"] + offset, "y": inputs["y"] + offset}


CASES = (
    Case("softmax", _softmax, "the common use; sizes that no tile divides"),
    *(
        Case(f"{s}-{r}", partial(_batch, similarity=s, relation=r), "every similarity with every relation")
        for s in SIMILARITIES
        for r in RELATIONS
    ),
    Case("no-rows", lambda g: _softmax(g, rows=0), "an empty batch"),
    Case("no-columns", lambda g: _softmax(g, columns=0), "nothing to compare with"),
    Case("no-width", lambda g: _softmax(g, width=0), "vectors of no components: every cosine is 0"),
    Case("one-row", lambda g: _softmax(g, rows=1), "one row"),
    Case("one-column", lambda g: _softmax(g, columns=1), "the positive alone: nothing admitted"),
    Case("one-by-one", lambda g: _batch(g, 1, 1, 1, similarity="dot", relation="any"), "the smallest problem"),
    Case("one-class", lambda g: _batch(g, classes=1), "nothing admitted in any row: -inf and no gradient"),
    Case("many-classes", lambda g: _batch(g, classes=40, relation="same"), "some rows admit nothing, some one column"),
    Case("some-ignored", lambda g: _ignored(g, 3, -100), "ignored rows give 0, -inf and no gradient"),
    Case("all-ignored", lambda g: _ignored(g, 1, -1), "nothing but ignored rows"),
    Case("itself", _with_itself, "a batch against itself: both gradients land in one tensor"),
    Case("itself-any", lambda g: _with_itself(g, relation="any"), "InfoNCE: only self_index keeps a row from itself"),
    Case(
        "itself-euclidean",
        lambda g: _with_itself(g, similarity="negative_squared_euclidean", scale=0.5),
        "distances to itself are 0",
    ),
    Case("duplicates", _duplicates, "equal columns"),
    Case(
        "duplicates-euclidean",
        lambda g: _duplicates(g, similarity="negative_squared_euclidean", relation="any"),
        "the gradient of a distance of 0 is 0",
    ),
    Case("zero-rows", _zero_rows, "zero vectors have cosine 0 and no gradient", smooth=False),
    Case("zero-rows-dot", lambda g: _zero_rows(g, similarity="dot"), "zero vectors that do have a gradient"),
    Case("poles", _poles, "cosines of exactly -1, 0 and 1"),
    Case(
        "pointing-away",
        _pointing_away,
        "all cosines -1 at scale 64: exp(-128) would be lost under a shift by the scale",
    ),
    *(
        Case(f"scale-{s}", partial(_softmax, scale=float(s)), "without and with a running maximum")
        for s in (1, 64, 82, 128, 512)
    ),
    Case("scale-0d", lambda g: _softmax(g, scale=torch.tensor(30.0).double()), "a scale that may learn"),
    Case("scale-rows", lambda g: _softmax(g, scale=torch.logspace(0, 9, 37, 2).double()), "1 to 512, one a row"),
    Case("bias", lambda g: _softmax(g, bias=20 * _randn(g, 53)), "a bias needs the running maximum"),
    Case("large-dot", lambda g: _softmax(g, similarity="dot", scale=30.0), "logits of hundreds: the running maximum"),
    Case("strided", lambda g: _strided(g, "cosine"), "neither side contiguous"),
    Case("strided-euclidean", lambda g: _strided(g, "negative_squared_euclidean"), "likewise, with a centre"),
    Case("expanded", lambda g: _softmax(g) | {"y": _randn(g, 1, 19).expand(53, 19)}, "a stride of 0"),
    Case(
        "int32",
        lambda g: {n: t.int() if n.endswith(("target", "labels")) else t for n, t in _batch(g).items()},
        "32-bit labels",
    ),
    Case(
        "narrow-labels",
        lambda g: _batch(g, target=_randint(g, 53, 37).to(torch.uint8), row_labels=_randint(g, 5, 37).to(torch.int8)),
        "labels of 8 bits, of two kinds, and an ignore_index of -1 beside them",
    ),
    Case(
        "column-labels",
        lambda g: _softmax(g, column_labels=_randint(g, 53, 53)),
        "targets stand for the labels of the rows",
    ),
    Case(
        "large-labels",
        lambda g: {n: t * 2**40 - 2**41 if n.endswith("labels") else t for n, t in _batch(g).items()},
        "labels that 32 bits do not hold, some negative",
    ),
    Case("far-away", lambda g: _moved(_batch(g, similarity=SIMILARITIES[2]), 1000.0), "the expanded distance cancels"),
    Case("strips", lambda g: _softmax(g, 13, 521, 67), "more columns than one strip of 256"),
    Case("chunks", lambda g: _softmax(g, 29, 2311, 5, bias=_randn(g, 2311)), "more columns than one chunk of 2048"),
    Case(
        "aligned",
        lambda g: _softmax(g, rows=70, columns=300, width=72),
        "16-bit vectors at multiples of 16 bytes, which a GPU's copy engine fetches",
    ),
    Case("wide", lambda g: _batch(g, 5, 7, 307, similarity="dot", scale=0.1), "wider than any tile, few rows"),
    Case("absent", _absent, "rows whose class lives elsewhere: negatives and no positive"),
    Case("absent-no-columns", lambda g: _softmax(g, columns=0, target=torch.full((37,), ABSENT)), "an empty shard"),
    Case("groups", lambda g: _grouped(g, 17, 3), "classes of three centers, of which the most similar one counts"),
    Case(
        "groups-euclidean",
        lambda g: _grouped(g, 40, 7, similarity="negative_squared_euclidean", bias=_randn(g, 280)),
        "groups that end where no tile and no strip does; a bias chooses nobody",
    ),
    Case(
        "groups-itself",
        lambda g: _with_itself(g, 42, relation="same", group_size=2),
        "groups across labels, some of whose columns are not admitted",
    ),
    Case("groups-all", lambda g: _grouped(g, 1, 53, relation="any"), "one group of all columns"),
    Case("groups-large", lambda g: _grouped(g, 2, 200), "groups of more columns than a kernel takes"),
    *(Case(f"unadmitted-{r}", partial(_unadmitted, relation=r), "columns that no relation admits") for r in RELATIONS),
    *of_epilogues.CASES,
)

SHAPES = (
    Shape("tiny", 32, 16, 32),
    Shape("few_shot_64", 256, 64, 64),
    Shape("few_shot_512", 256, 64, 512),
    Shape("few_shot_200", 256, 200, 1600),
    Shape("classes_10000", 128, 10_000, 512),
)


def make_benchmark(shape: Shape, dtype: torch.dtype, generator: Generator) -> Inputs:
    def randn(rows: int) -> Tensor:
        return torch.randn(rows, shape.width, generator=generator, device=generator.device).to(dtype)

    target = torch.randint(shape.columns, (shape.rows,), generator=generator, device=generator.device)
    return {"x": randn(shape.rows), "y": randn(shape.columns), "target": target, "scale": 30.0}


def multiply_adds(shape: Shape) -> int:
    return 3 * shape.rows * shape.columns * shape.width


def small_term(name: str, inputs: Inputs, dtype: torch.dtype, of_weights: float = 0.0) -> float:
    """Four roundings of the sum of absolute values behind an entry; a logit's error is a weight's relative one."""
    if inputs.get("epilogue", "none") != "none":
        return of_epilogues.small_term(name, inputs, dtype, of_weights)
    x, y, target = inputs["x"], inputs["y"], inputs["target"].long()
    similarity, relation = similarity_of(inputs), relation_of(inputs, "different")
    scale = torch.as_tensor(inputs["scale"], dtype=torch.float64, device=x.device).reshape(-1, 1).expand(x.shape[0], 1)
    columns = torch.arange(y.shape[0], device=y.device)
    row_labels, column_labels = inputs.get("row_labels", target), inputs.get("column_labels", columns)
    valid = (target != inputs.get("ignore_index", -1))[:, None]
    mask = admitted(row_labels, column_labels, relation, inputs.get("self_index")) & valid
    mask = best_of_groups(similarity_matrix(x, y, similarity), mask, inputs.get("group_size", 1))

    u, u_largest, (factor_x, factor_y) = similarity_matrix(x, y, similarity), *reach(x, y, similarity)
    z = scale * u + inputs.get("bias", 0.0)
    q = torch.where(mask, z, -torch.inf).softmax(1).nan_to_num(0.0) if y.shape[0] else z  # (B, N), sums to 1 or 0
    weights = scale * q + ((target[:, None] == columns) & valid)  # |dL/du| at most
    logit = 1 + largest(scale) * u_largest + largest(torch.as_tensor(inputs.get("bias", 0.0)))
    along = (q * u.abs()).sum(1)
    eps = torch.finfo(accumulation_dtype(dtype)).eps
    sums = {
        "positive": u_largest,
        "negative_lse": logit,
        "grad_x": (logit + of_weights / (4 * eps)) * factor_x * largest(weights.sum(1)),
        "grad_y": (logit + of_weights / (4 * eps)) * factor_y * largest(weights.sum(0)),
        "grad_scale": logit * largest(along if torch.as_tensor(inputs["scale"]).dim() else along.sum()),
        "grad_bias": logit * largest(q.sum(0)),
    }
    return 4 * eps * sums[name]
