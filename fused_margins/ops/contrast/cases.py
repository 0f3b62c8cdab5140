"""Cases, error terms and costs of `contrast`; see `fused_margins.ops.cases`."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor

from ...core.enums import Reduction, Relation, Similarity
from ...core.indices import ABSENT
from ...core.margins import apply_margin
from ...core.similarity import accumulation_dtype, admitted, best_of_groups, similarity_matrix
from .. import cases as common
from ..cases import Case, Inputs, Shape, ignored, largest, poles, randint, randn, variants, zero_rows
from .epilogues import EPILOGUES
from .op import contrast

EUCLIDEAN = "negative_squared_euclidean"
EPILOGUE_NAMES = tuple(e.name.lower() for e in EPILOGUES)
DIFFERENTIABLE = ("x", "y", "scale", "bias", "margin")
run, observed = common.run_by_name(contrast), common.as_they_are


def _softmax(g: Generator, rows: int = 37, columns: int = 53, width: int = 19, **options: Any) -> Inputs:
    """A classifier: the column of a row's class is its positive, all others are admitted. Sizes are prime."""
    inputs = {
        "x": randn(g, rows, width),
        "y": randn(g, columns, width),
        "target": randint(g, columns, rows) if columns else torch.full((rows,), -1),
        "scale": 16.0,
    }
    return inputs | options


def _batch(
    g: Generator, rows: int = 37, columns: int = 53, width: int = 19, classes: int = 5, **options: Any
) -> Inputs:
    """A batch against another one, both labelled."""
    labels = common.labels(g, rows, columns, classes)
    return _softmax(g, rows, columns, width, scale=2.0) | labels | options


def _with_itself(g: Generator, classes: int = 6, **options: Any) -> Inputs:
    """One batch on both sides; a row is not its own column."""
    x, labels, rows = randn(g, 41, 17), randint(g, classes, 41), torch.arange(41)
    shared = {"x": x, "y": x, "self_index": rows, "row_labels": labels, "column_labels": labels}
    return shared | {"target": (rows + 3) % 41, "scale": 10.0} | options


def _some_positives(g: Generator, **options: Any) -> Inputs:
    """A batch against itself; every fifth row has no positive."""
    inputs = _with_itself(g, **options)
    inputs["target"][::5] = -1
    return inputs


def _away(g: Generator, scale: float, **options: Any) -> Inputs:
    axis = torch.ones(1, 16, dtype=torch.float64)
    return {"x": axis.repeat(5, 1), "y": -axis.repeat(9, 1), "target": torch.arange(5), "scale": scale} | options


def _duplicates(g: Generator, **options: Any) -> Inputs:
    inputs = _batch(g, columns=37, **options)
    inputs["y"][::2] = inputs["x"][::2]  # distances of exactly 0
    inputs["y"][1] = inputs["y"][0]
    return inputs | {"target": torch.arange(37)}


def _absent(g: Generator, **options: Any) -> Inputs:
    inputs = _softmax(g, **options)
    inputs["target"][::3] = ABSENT
    inputs["target"][1] = -1
    return inputs


def _unadmitted(g: Generator, **options: Any) -> Inputs:
    return common.unadmitted(_batch(g, **options))


def _grouped(g: Generator, groups: int, size: int, **options: Any) -> Inputs:
    """Classes of several centers: the columns of a class are a group."""
    inputs = _softmax(g, columns=groups * size, scale=4.0)
    of_classes = {"row_labels": inputs["target"] // size, "column_labels": torch.arange(groups * size) // size}
    return inputs | of_classes | {"group_size": size} | options


def _strided(g: Generator, similarity: str) -> Inputs:
    x, y = common.strided(g)
    return _softmax(g, scale=2.0) | {"x": x, "y": y, "bias": randn(g, 106)[::2], "similarity": similarity}


def _narrow_labels(g: Generator) -> Inputs:
    inputs = _batch(g)
    return inputs | {"target": inputs["target"].to(torch.uint8), "row_labels": inputs["row_labels"].to(torch.int8)}


_MARGIN: Inputs = {"margin": -0.2, "epilogue": "margin_softmax"}


def _classifier(g: Generator, *sizes: int, **options: Any) -> Inputs:
    return _softmax(g, *sizes, **_MARGIN | options)


def _numbers(g: Generator) -> Tensor:
    return torch.rand(37, generator=g, dtype=torch.float64)


def _some_ignored(g: Generator, **options: Any) -> Inputs:
    return ignored(_classifier(g, ignore_index=-100, **options), 3)


def _with_gaps(g: Generator) -> Inputs:
    inputs = _classifier(g, 2 * 37, 53, 2 * 19)
    return inputs | {"x": inputs["x"][::2, ::2], "y": inputs["y"][:, ::2], "target": inputs["target"][::2]}


def _along_classes(g: Generator, **options: Any) -> Inputs:
    """Rows near their class, and near its opposite: angles next to 0 and pi, where psi has its other piece."""
    inputs = _classifier(g, **options)
    x, own = inputs["x"], inputs["y"][inputs["target"]]
    x[::3] = own[::3] + 0.3 * x[::3]
    x[1::3] = -own[1::3] + 0.3 * x[1::3]
    return inputs


def _certain(g: Generator) -> Inputs:
    """Every row on its class, all classes orthogonal."""
    eye = torch.eye(13, dtype=torch.float64)
    return {"x": eye, "y": eye, "target": torch.arange(13), "scale": 64.0, **_MARGIN, "margin": 0.35}


def _at_poles(g: Generator, scale: float, **options: Any) -> Inputs:
    """Rows at one pole, one class there, the last, and one at the other: logits lie 2 scale apart."""
    x, y = torch.zeros(3, 8, dtype=torch.float64), torch.zeros(2, 8, dtype=torch.float64)
    x[:, 0], y[0, 0], y[1, 0] = 1, -1, 1
    return {"x": x, "y": y, "target": torch.tensor([1, 1, 0]), "scale": scale, "epilogue": "margin_softmax"} | options


def _with_bias(g: Generator, **options: Any) -> Inputs:
    return _softmax(g, bias=randn(g, 53), scale=8 + _numbers(g)[0], **options)


OF_MARGIN_SOFTMAX = (
    *(
        Case(
            f"{s}-{r}",
            partial(_classifier, similarity=s, reduction=r, scale=16.0 if s == "cosine" else 1.0),
            "every similarity with every reduction",
        )
        for s in Similarity.names()
        for r in Reduction.names()
    ),
    Case(
        "groups",
        lambda g: _grouped(g, 71, 3, scale=16.0, angle_rad=0.4, **_MARGIN),
        "sub-center ArcFace: the target is the most similar center of the class",
    ),
    Case("scale-0d", lambda g: _classifier(g, scale=8 + _numbers(g)[0], margin=_numbers(g)[1]), "a scale that learns"),
    Case("scale-rows", lambda g: _classifier(g, scale=1 + 20 * _numbers(g), margin=_numbers(g) - 0.5), "each of a row"),
    *(
        Case(
            f"angle{angle:+g}-{beyond}",
            partial(_along_classes, angle_rad=angle, beyond_pi=beyond, margin=0.1),
            "a margin on the angle, with both its pieces, and one on the similarity",
        )
        for angle, beyond in ((0.5, "standard"), (2.0, "standard"), (2.0, "continuous"), (0.5, "easy"), (-0.7, "easy"))
    ),
    Case(
        "angle-straight-through",
        partial(_along_classes, angle_rad=0.5, straight_through=True, reduction="sum"),
        "its derivative taken as 1",
        smooth=False,
    ),
    Case("angle-poles", partial(_at_poles, scale=8.0, angle_rad=0.5), "no gradient is infinite", smooth=False),
    Case("smoothing", partial(_classifier, smoothing=0.1), "a share of the loss over all classes"),
    Case(
        "smoothing-angle",
        lambda g: _along_classes(g, smoothing=0.4, angle_rad=0.5, scale=1 + 20 * _numbers(g), margin=_numbers(g) - 0.5),
        "likewise, of every margin, and a scale of each row",
    ),
    Case(
        "smoothing-learnt",
        lambda g: _classifier(g, smoothing=0.2, scale=8 + _numbers(g)[0], margin=_numbers(g)[1], reduction="sum"),
        "a scale and a margin that learn",
    ),
    Case("smoothing-none", partial(_some_ignored, smoothing=0.3, reduction="none"), "ignored rows stay without a loss"),
    Case("smoothing-absent", lambda g: _absent(g, smoothing=0.3, **_MARGIN), "and so do those of classes elsewhere"),
    Case("smoothing-one-class", partial(_classifier, columns=1, smoothing=0.5), "the mean is the own logit"),
    Case("smoothing-no-rows", partial(_classifier, rows=0, smoothing=0.1), "an empty batch"),
    Case(
        "smoothing-blocks",
        partial(_classifier, rows=141, columns=521, width=67, smoothing=1.0),
        "more rows and columns than a piece of their sum; nothing but the mean over classes",
    ),
    Case("smoothing-scale", partial(_classifier, scale=512.0, smoothing=0.1), "with a running maximum"),
    Case("smoothing-zero-rows", lambda g: zero_rows(_classifier(g, smoothing=0.1)), "no part in any sum", smooth=False),
    Case("some-ignored", _some_ignored, "ignored rows count for nothing"),
    Case("none-mean-ignored", partial(_some_ignored, reduction="none"), "ignored rows have loss 0"),
    Case("all-ignored", lambda g: _classifier(g, target=torch.full((37,), -1)), "the mean over no row is 0"),
    Case("strided", _with_gaps, "views with gaps in both directions"),
    Case("certain", _certain, "losses far below the rounding of the logits"),
    Case("large-scale", partial(_classifier, scale=512.0), "a running maximum is needed"),
    Case("one-class", partial(_classifier, columns=1), "no other class: the loss is 0"),
    Case("no-rows", partial(_classifier, rows=0), "an empty batch"),
    Case("one-row", partial(_classifier, rows=1), "a batch of one"),
    *variants("poles-{scale:g}", _at_poles, "a row's own class is the last, far above the others", scale=(64.0, 400.0)),
    Case(
        "turned-away",
        partial(_away, scale=128.0, epilogue="margin_softmax"),
        "columns beyond the last must not count, whatever exp makes of them",
    ),
    Case("blocks", partial(_classifier, rows=13, columns=521, width=67), "more columns than two blocks"),
    Case("aligned", partial(_classifier, rows=70, columns=300, width=72), common.ALIGNED),
    Case("wide", partial(_classifier, rows=70, columns=7, width=307), "wider than any tile"),
)

CASES = (
    Case("softmax", _softmax, "the common use; sizes that no tile divides"),
    *variants("{similarity}-{relation}", _batch, "every similarity with every relation", **common.EVERY),
    Case("no-rows", lambda g: _softmax(g, rows=0), "an empty batch"),
    Case("no-columns", lambda g: _softmax(g, columns=0), "nothing to compare with"),
    Case("no-width", lambda g: _softmax(g, width=0), "vectors of no components: every cosine is 0"),
    Case("one-row", lambda g: _softmax(g, rows=1), "one row"),
    Case("one-column", lambda g: _softmax(g, columns=1), "the positive alone: nothing admitted"),
    Case("one-by-one", lambda g: _batch(g, 1, 1, 1, similarity="dot", relation="any"), "the smallest problem"),
    Case("one-class", lambda g: _batch(g, classes=1), "nothing admitted in any row: -inf and no gradient"),
    Case("many-classes", lambda g: _batch(g, classes=40, relation="same"), "some rows admit nothing, some one column"),
    Case("some-ignored", lambda g: ignored(_softmax(g, ignore_index=-100), 3), "they give 0, -inf and no gradient"),
    Case("all-ignored", lambda g: ignored(_softmax(g, ignore_index=-1), 1), "nothing but ignored rows"),
    Case("itself", _with_itself, "a batch against itself: both gradients land in one tensor"),
    Case("itself-any", lambda g: _with_itself(g, relation="any"), "InfoNCE: only self_index keeps a row from itself"),
    Case("itself-euclidean", partial(_with_itself, similarity=EUCLIDEAN, scale=0.5), "distances to itself are 0"),
    Case("duplicates", _duplicates, "equal columns"),
    Case("duplicates-euclidean", partial(_duplicates, similarity=EUCLIDEAN, relation="any"), "no gradient of 0"),
    Case("zero-rows", lambda g: zero_rows(_batch(g)), "zero vectors have cosine 0 and no gradient", smooth=False),
    Case("zero-rows-dot", lambda g: zero_rows(_batch(g, similarity="dot")), "zero vectors that do have a gradient"),
    Case("poles", lambda g: poles(g) | {"target": torch.arange(14).flip(0), "scale": 64.0}, "cosines of -1, 0 and 1"),
    Case(
        "pointing-away", partial(_away, scale=64.0), "cosines of -1: exp(-128) would be lost under a shift by the scale"
    ),
    *variants("scale-{scale:g}", _softmax, "without and with a running maximum", scale=(1.0, 64.0, 82.0, 128.0, 512.0)),
    Case("scale-0d", lambda g: _softmax(g, scale=torch.tensor(30.0).double()), "a scale that may learn"),
    Case("scale-rows", lambda g: _softmax(g, scale=torch.logspace(0, 9, 37, 2).double()), "1 to 512, one a row"),
    Case("bias", lambda g: _softmax(g, bias=20 * randn(g, 53)), "a bias needs the running maximum"),
    Case("large-dot", lambda g: _softmax(g, similarity="dot", scale=30.0), "logits of hundreds: the running maximum"),
    Case("strided", lambda g: _strided(g, "cosine"), "neither side contiguous"),
    Case("strided-euclidean", lambda g: _strided(g, EUCLIDEAN), "likewise, with a centre"),
    Case("expanded", lambda g: _softmax(g) | {"y": randn(g, 1, 19).expand(53, 19)}, "a stride of 0"),
    Case("int32", lambda g: common.of_32_bits(_batch(g)), "32-bit labels"),
    Case("narrow-labels", _narrow_labels, "labels of 8 bits, of two kinds, and an ignore_index of -1 beside them"),
    Case("column-labels", lambda g: _softmax(g, column_labels=randint(g, 53, 53)), "targets stand for labels of rows"),
    Case("large-labels", lambda g: common.of_64_bits(_batch(g)), "labels that 32 bits do not hold, some negative"),
    Case("far-away", lambda g: common.moved(_batch(g, similarity=EUCLIDEAN), 1000.0), "the expanded distance cancels"),
    Case("strips", lambda g: _softmax(g, 13, 521, 67), "more columns than one strip of 256"),
    Case("chunks", lambda g: _softmax(g, 29, 2311, 5, bias=randn(g, 2311)), "more columns than one chunk of 2048"),
    Case("aligned", lambda g: _softmax(g, rows=70, columns=300, width=72), common.ALIGNED),
    Case("wide", lambda g: _batch(g, 5, 7, 307, similarity="dot", scale=0.1), "wider than any tile, few rows"),
    Case("absent", _absent, "rows whose class lives elsewhere: negatives and no positive"),
    Case("absent-no-columns", lambda g: _softmax(g, columns=0, target=torch.full((37,), ABSENT)), "an empty shard"),
    Case("groups", lambda g: _grouped(g, 17, 3), "classes of three centers, of which the most similar one counts"),
    Case(
        "groups-euclidean",
        lambda g: _grouped(g, 40, 7, similarity=EUCLIDEAN, bias=randn(g, 280)),
        "groups that end where no tile and no strip does; a bias chooses nobody",
    ),
    Case(
        "groups-itself",
        lambda g: _batch(g, 37, 54, relation="same", group_size=2, self_index=torch.arange(37)),
        "groups across labels, some of whose columns are not admitted",
    ),
    Case("groups-all", lambda g: _grouped(g, 1, 53, relation="any"), "one group of all columns"),
    Case("groups-large", lambda g: _grouped(g, 2, 200), "groups of more columns than a kernel takes"),
    *variants("unadmitted-{relation}", _unadmitted, "columns that no relation admits", relation=Relation.names()),
    *(replace(case, name=f"margin_softmax-{case.name}") for case in OF_MARGIN_SOFTMAX),
    # What every epilogue does, also one that this file does not know.
    *(
        Case(f"{e}-{name}", partial(make, epilogue=e), reason)
        for e in EPILOGUE_NAMES
        for name, make, reason in (
            ("classes", _softmax, "a column for each class"),
            (
                "batch",
                _some_positives,
                "a batch against itself, with labels; no row its own column, some without a positive",
            ),
            ("absent", _absent, "rows whose class lives elsewhere have no loss"),
            ("no-columns", partial(_softmax, columns=0, target=torch.full((37,), ABSENT)), "an empty shard"),
            ("bias", _with_bias, "a bias, and a scale that learns"),
            ("each", partial(_some_positives, reduction="none"), "the losses of the rows"),
            ("alone", partial(_some_positives, classes=1, reduction="sum"), "no negatives: no loss"),
        )
    ),
)

SHAPES = (Shape("tiny", 32, 16, 32), *common.CLASSIFIERS)
make_benchmark = common.classifier_benchmark


def multiply_adds(shape: Shape) -> int:
    return 3 * shape.rows * shape.columns * shape.width


def small_term(name: str, inputs: Inputs, dtype: torch.dtype, of_weights: float = 0.0) -> float:
    """Four roundings of the sum of absolute values behind an entry; a logit's error is a weight's relative one."""
    x, y, target = inputs["x"], inputs["y"], inputs["target"].long()
    similarity, reduction = common.similarity_of(inputs), inputs.get("reduction", "mean")
    rows, columns = x.shape[0], torch.arange(y.shape[0], device=x.device)

    def of_rows(value: float | Tensor) -> Tensor:
        return torch.as_tensor(value, dtype=torch.float64, device=x.device).reshape(-1, 1).expand(rows, 1)

    scale, margin = of_rows(inputs["scale"]), of_rows(inputs.get("margin", 0.0))
    bias = inputs.get("bias", torch.zeros((), dtype=torch.float64, device=x.device))
    has_loss = inputs.get("epilogue", "none") != "none"
    counted = (target != inputs.get("ignore_index", -1))[:, None]
    if has_loss:
        counted = counted & (target != ABSENT)[:, None]
    own = (target[:, None] == columns) & counted  # (B, N)
    labels = inputs.get("row_labels", target), inputs.get("column_labels", columns)
    mask = admitted(*labels, common.relation_of(inputs, "different"), inputs.get("self_index")) & counted
    mask = best_of_groups(similarity_matrix(x, y, similarity), mask, inputs.get("group_size", 1))
    u, u_largest, (factor_x, factor_y) = similarity_matrix(x, y, similarity), *common.reach(x, y, similarity)
    share = 1 / max(1, int((counted & mask.any(1, keepdim=True)).sum())) if has_loss and reduction == "mean" else 1.0
    angle, beyond_pi = inputs.get("angle_rad", 0.0), inputs.get("beyond_pi", "standard")
    turned = torch.where(own, apply_margin(u, angle, "angular", beyond_pi=beyond_pi), u)
    inverse_sine = (1 - u.square()).clamp(min=0).rsqrt()
    inverse_sine = torch.where(inverse_sine > 1e6, 0.0, inverse_sine)  # at the poles the derivative of the sine is 0
    slope = own * (1 + abs(math.sin(angle)) * inverse_sine)  # |psi'| at most
    bend = own * abs(math.sin(angle)) * inverse_sine**3  # |psi''|: an error of u moves psi'
    summed = mask | own if has_loss else mask
    z = torch.where(summed, scale * (turned - margin * own) + bias * mask, -torch.inf)
    q = z.softmax(1).nan_to_num(0.0) * counted if y.shape[0] else u  # (B, N), sums to 1 or 0
    of_own = (1 - q) * (slope + bend * u_largest)
    smoothing = inputs.get("smoothing", 0.0)
    of_own = of_own + smoothing * (own * slope + counted / max(1, y.shape[0]))
    weights = share * scale * (q + of_own) if has_loss else scale * q + own  # |dL/du| at most
    logit = 1 + largest(scale) * (u_largest * max(1.0, largest(slope)) + largest(margin)) + largest(bias)
    of_scale = share * (q * (u.abs() + margin.abs()) + has_loss * own * (turned.abs() + margin.abs())).sum(1)
    of_scale = of_scale + share * smoothing * u_largest
    of_margin = share * (scale * own).sum(1)
    per_row = {n: torch.as_tensor(inputs.get(n, 0.0)).dim() == 1 for n in ("scale", "margin")}
    eps = torch.finfo(accumulation_dtype(dtype)).eps
    sums = {
        "positive": u_largest,
        "negative_lse": logit,
        "loss": logit * (1.0 if reduction != "sum" else rows),
        "grad_x": (logit + of_weights / (4 * eps)) * factor_x * largest(weights.sum(1)),
        "grad_y": (logit + of_weights / (4 * eps)) * factor_y * largest(weights.sum(0)),
        "grad_scale": logit * largest(of_scale if per_row["scale"] else of_scale.sum()),
        "grad_bias": logit * share * largest(q.sum(0)),
        "grad_margin": logit * largest(of_margin if per_row["margin"] else of_margin.sum()),
    }
    return 4 * eps * sums[name]
