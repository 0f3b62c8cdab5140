"""Cases and error terms of `contrast` with an epilogue; part of `fused_margins.ops.contrast.cases`."""

import math
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor

from ...core.enums import Reduction, Similarity
from ...core.indices import ABSENT
from ...core.margins import apply_margin
from ...core.similarity import accumulation_dtype, admitted, best_of_groups, similarity_matrix
from ..cases import Case, Inputs, largest, reach, relation_of, similarity_of
from .epilogues import EPILOGUES

EPILOGUE_NAMES = tuple(e.name.lower() for e in EPILOGUES)


def _classifier(g: Generator, rows: int = 37, columns: int = 53, width: int = 19, **options: Any) -> Inputs:
    """Rows, a column for each class, and the class of each row; sizes are prime."""
    inputs = {
        "x": torch.randn(rows, width, generator=g, dtype=torch.float64),
        "y": torch.randn(columns, width, generator=g, dtype=torch.float64),
        "target": torch.randint(columns, (rows,), generator=g) if columns else torch.full((rows,), -1),
        "scale": 16.0,
        "margin": -0.2,
        "epilogue": "margin_softmax",
    }
    return inputs | options


def _centers(g: Generator, classes: int = 71, centers: int = 3) -> Inputs:
    inputs = _classifier(g, columns=classes * centers, angle_rad=0.4)
    of_classes = {
        "row_labels": inputs["target"] // centers,
        "column_labels": torch.arange(classes * centers) // centers,
    }
    return inputs | of_classes | {"group_size": centers}


def _numbers(g: Generator, rows: int = 37) -> Tensor:
    return torch.rand(rows, generator=g, dtype=torch.float64)


def _some_ignored(g: Generator, **options: Any) -> Inputs:
    inputs = _classifier(g, **options)
    inputs["target"][::3] = -100
    return inputs | {"ignore_index": -100}


def _strided(g: Generator) -> Inputs:
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
    return {"x": eye, "y": eye, "target": torch.arange(13), "scale": 64.0, "margin": 0.35, "epilogue": "margin_softmax"}


def _at_poles(g: Generator, scale: float, width: int = 8) -> Inputs:
    """Rows at one pole, one class there, the last, and one at the other: logits lie 2 scale apart."""
    x, y = torch.zeros(3, width, dtype=torch.float64), torch.zeros(2, width, dtype=torch.float64)
    x[:, 0], y[0, 0], y[1, 0] = 1, -1, 1
    return {
        "x": x,
        "y": y,
        "target": torch.tensor([1, 1, 0]),
        "scale": scale,
        "margin": 0.0,
        "epilogue": "margin_softmax",
    }


def _turned_away(g: Generator) -> Inputs:
    """All rows point away from all classes, so far that exp(-logsumexp) leaves the range of float32."""
    x, y = torch.ones(5, 16, dtype=torch.float64), -torch.ones(9, 16, dtype=torch.float64)
    return {"x": x, "y": y, "target": torch.arange(5), "scale": 128.0, "margin": 0.0, "epilogue": "margin_softmax"}


def _classes(g: Generator, **options: Any) -> Inputs:
    return _classifier(g) | {"margin": 0.0} | options


def _of_a_batch(g: Generator, rows: int = 41, width: int = 17, classes: int = 6, **options: Any) -> Inputs:
    """A batch against itself; every fifth row has no positive."""
    x, labels = torch.randn(rows, width, generator=g, dtype=torch.float64), torch.randint(classes, (rows,), generator=g)
    target = (torch.arange(rows) + 3) % rows
    target[::5] = -1
    shared = {"x": x, "y": x, "self_index": torch.arange(rows), "row_labels": labels, "column_labels": labels}
    return shared | {"target": target, "scale": 10.0} | options


def _with_absent(g: Generator, **options: Any) -> Inputs:
    inputs = _classes(g)
    inputs["target"][::3] = ABSENT
    return inputs | options


def _with_bias(g: Generator, **options: Any) -> Inputs:
    inputs = _classes(g)
    learnt = {"bias": torch.randn(53, generator=g, dtype=torch.float64), "scale": 8 + _numbers(g)[0]}
    return inputs | learnt | options


CASES = (
    *(
        Case(
            f"margin_softmax-{s}-{r}",
            partial(_classifier, similarity=s, reduction=r, scale=16.0 if s == "cosine" else 1.0),
            "every similarity with every reduction",
        )
        for s in Similarity.names()
        for r in Reduction.names()
    ),
    Case("margin_softmax-groups", _centers, "sub-center ArcFace: the target is the most similar center of the class"),
    Case(
        "margin_softmax-scale-0d",
        lambda g: _classifier(g, scale=8 + _numbers(g)[0], margin=_numbers(g)[1]),
        "one scale that learns",
    ),
    Case(
        "margin_softmax-scale-rows",
        lambda g: _classifier(g, scale=1 + 20 * _numbers(g), margin=_numbers(g) - 0.5),
        "a scale and a margin for each row",
    ),
    *(
        Case(
            f"margin_softmax-angle{angle:+g}-{beyond}",
            partial(_along_classes, angle_rad=angle, beyond_pi=beyond, margin=0.1),
            "a margin on the angle, with both its pieces, and one on the similarity",
        )
        for angle, beyond in ((0.5, "standard"), (2.0, "standard"), (2.0, "continuous"), (0.5, "easy"), (-0.7, "easy"))
    ),
    Case(
        "margin_softmax-angle-straight-through",
        partial(_along_classes, angle_rad=0.5, straight_through=True, reduction="sum"),
        "its derivative taken as 1",
        smooth=False,
    ),
    Case(
        "margin_softmax-angle-poles",
        lambda g: _at_poles(g, 8.0) | {"angle_rad": 0.5},
        "no gradient is infinite",
        smooth=False,
    ),
    Case("margin_softmax-some-ignored", _some_ignored, "ignored rows count for nothing"),
    Case("margin_softmax-none-mean-ignored", partial(_some_ignored, reduction="none"), "ignored rows have loss 0"),
    Case(
        "margin_softmax-all-ignored",
        lambda g: _classifier(g, target=torch.full((37,), -1)),
        "the mean over no row is 0",
    ),
    Case("margin_softmax-strided", _strided, "views with gaps in both directions"),
    Case("margin_softmax-certain", _certain, "losses far below the rounding of the logits"),
    Case("margin_softmax-large-scale", partial(_classifier, scale=512.0), "a running maximum is needed"),
    Case("margin_softmax-one-class", partial(_classifier, columns=1), "no other class: the loss is 0"),
    Case("margin_softmax-no-rows", partial(_classifier, rows=0), "an empty batch"),
    Case("margin_softmax-one-row", partial(_classifier, rows=1), "a batch of one"),
    *(
        Case(
            f"margin_softmax-poles-{scale:g}",
            partial(_at_poles, scale=scale),
            "a row's own class is the last, far above the others",
        )
        for scale in (64.0, 400.0)
    ),
    Case(
        "margin_softmax-turned-away", _turned_away, "columns beyond the last must not count, whatever exp makes of them"
    ),
    Case("margin_softmax-blocks", partial(_classifier, rows=13, columns=521, width=67), "more columns than two blocks"),
    Case(
        "margin_softmax-aligned",
        partial(_classifier, rows=70, columns=300, width=72),
        "16-bit vectors at multiples of 16 bytes, which a GPU's copy engine fetches",
    ),
    Case("margin_softmax-wide", partial(_classifier, rows=70, columns=7, width=307), "wider than any tile"),
    # What every epilogue does, also one that this file does not know.
    *(
        Case(f"{e}-{name}", partial(make, epilogue=e), reason)
        for e in EPILOGUE_NAMES
        for name, make, reason in (
            ("classes", _classes, "a column for each class"),
            ("batch", _of_a_batch, "a batch against itself: labels, no row its own column, rows without a positive"),
            ("absent", _with_absent, "rows whose class lives elsewhere have no loss"),
            ("bias", _with_bias, "a bias, and a scale that learns"),
            ("each", partial(_of_a_batch, reduction="none"), "the losses of the rows"),
            ("alone", partial(_of_a_batch, classes=1, reduction="sum"), "no negatives: no loss"),
        )
    ),
)


def small_term(name: str, inputs: Inputs, dtype: torch.dtype, of_weights: float = 0.0) -> float:
    """Four roundings of the sum of absolute values behind an entry; a logit's error is a weight's relative one."""
    x, y, target = inputs["x"], inputs["y"], inputs["target"].long()
    similarity, reduction = similarity_of(inputs), inputs.get("reduction", "mean")
    rows, columns = x.shape[0], torch.arange(y.shape[0], device=x.device)

    def of_rows(value: float | Tensor) -> Tensor:
        return torch.as_tensor(value, dtype=torch.float64, device=x.device).reshape(-1, 1).expand(rows, 1)

    scale, margin = of_rows(inputs["scale"]), of_rows(inputs.get("margin", 0.0))
    counted = ((target != inputs.get("ignore_index", -1)) & (target != ABSENT))[:, None]
    own = (target[:, None] == columns) & counted  # (B, N)
    labels = inputs.get("row_labels", target), inputs.get("column_labels", columns)
    mask = admitted(*labels, relation_of(inputs, "different"), inputs.get("self_index")) & counted
    mask = best_of_groups(similarity_matrix(x, y, similarity), mask, inputs.get("group_size", 1))
    u, u_largest, (factor_x, factor_y) = similarity_matrix(x, y, similarity), *reach(x, y, similarity)
    share = 1 / max(1, int((counted & mask.any(1, keepdim=True)).sum())) if reduction == "mean" else 1.0
    angle, beyond_pi = inputs.get("angle_rad", 0.0), inputs.get("beyond_pi", "standard")
    turned = torch.where(own, apply_margin(u, angle, "angular", beyond_pi=beyond_pi), u)
    inverse_sine = (1 - u.square()).clamp(min=0).rsqrt()
    inverse_sine = torch.where(inverse_sine > 1e6, 0.0, inverse_sine)  # at the poles the derivative of the sine is 0
    slope = own * (1 + abs(math.sin(angle)) * inverse_sine)  # |psi'| at most
    bend = own * abs(math.sin(angle)) * inverse_sine**3  # |psi''|: an error of u moves psi'
    bias = inputs.get("bias", torch.zeros((), dtype=torch.float64, device=x.device))
    z = torch.where(mask | own, scale * (turned - margin * own) + bias * mask, -torch.inf)
    q = z.softmax(1).nan_to_num(0.0) * counted if y.shape[0] else u
    weights = share * scale * (q + (1 - q) * (slope + bend * u_largest))  # |dL/du| at most
    logit = 1 + largest(scale) * (u_largest * max(1.0, largest(slope)) + largest(margin)) + largest(bias)
    of_scale = share * (q * (u.abs() + margin.abs()) + own * (turned.abs() + margin.abs())).sum(1)
    of_margin = share * (scale * own).sum(1)
    per_row = {n: torch.as_tensor(inputs.get(n, 0.0)).dim() == 1 for n in ("scale", "margin")}
    eps = torch.finfo(accumulation_dtype(dtype)).eps
    sums = {
        "loss": logit * (1.0 if reduction != "sum" else rows),
        "grad_x": (logit + of_weights / (4 * eps)) * factor_x * largest(weights.sum(1)),
        "grad_y": (logit + of_weights / (4 * eps)) * factor_y * largest(weights.sum(0)),
        "grad_scale": logit * largest(of_scale if per_row["scale"] else of_scale.sum()),
        "grad_bias": logit * share * largest(q.sum(0)),
        "grad_margin": logit * largest(of_margin if per_row["margin"] else of_margin.sum()),
    }
    return 4 * eps * sums[name]
