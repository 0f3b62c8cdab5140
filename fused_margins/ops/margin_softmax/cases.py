"""Cases, error terms and costs of `margin_softmax`; see `fused_margins.ops.cases`."""

import math
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor

from ...margins import apply_margin
from ..cases import Case, Inputs, Shape, largest, reach
from ..similarity import SIMILARITIES, accumulation_dtype, similarity_matrix
from .op import margin_softmax

OUTPUTS = ("loss",)
DIFFERENTIABLE = ("x", "y", "scale", "margin")


def run(inputs: Inputs, backend: str) -> dict[str, Tensor]:
    return {"loss": margin_softmax(**inputs, backend=backend)}


def observed(outputs: dict[str, Tensor], inputs: Inputs, exact: bool) -> dict[str, Tensor]:
    return outputs


def _classifier(g: Generator, rows: int = 37, columns: int = 53, width: int = 19, **options: Any) -> Inputs:
    """Rows, a column for each class, and the class of each row; sizes are prime."""
    inputs = {
        "x": torch.randn(rows, width, generator=g, dtype=torch.float64),
        "y": torch.randn(columns, width, generator=g, dtype=torch.float64),
        "target": torch.randint(columns, (rows,), generator=g) if columns else torch.full((rows,), -1),
        "scale": 16.0,
        "margin": -0.2,
    }
    return inputs | options


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
    return {"x": eye, "y": eye, "target": torch.arange(13), "scale": 64.0, "margin": 0.35}


def _at_poles(g: Generator, scale: float, width: int = 8) -> Inputs:
    """Rows at one pole, one class there, the last, and one at the other: logits lie 2 scale apart."""
    x, y = torch.zeros(3, width, dtype=torch.float64), torch.zeros(2, width, dtype=torch.float64)
    x[:, 0], y[0, 0], y[1, 0] = 1, -1, 1
    return {"x": x, "y": y, "target": torch.tensor([1, 1, 0]), "scale": scale, "margin": 0.0}


def _turned_away(g: Generator) -> Inputs:
    """All rows point away from all classes, so far that exp(-logsumexp) leaves the range of float32."""
    x, y = torch.ones(5, 16, dtype=torch.float64), -torch.ones(9, 16, dtype=torch.float64)
    return {"x": x, "y": y, "target": torch.arange(5), "scale": 128.0, "margin": 0.0}


CASES = (
    *(
        Case(
            f"{s}-{r}",
            partial(_classifier, similarity=s, reduction=r, scale=16.0 if s == "cosine" else 1.0),
            "every similarity with every reduction",
        )
        for s in SIMILARITIES
        for r in ("mean", "sum", "none")
    ),
    Case(
        "scale-0d", lambda g: _classifier(g, scale=8 + _numbers(g)[0], margin=_numbers(g)[1]), "one scale that learns"
    ),
    Case(
        "scale-rows",
        lambda g: _classifier(g, scale=1 + 20 * _numbers(g), margin=_numbers(g) - 0.5),
        "a scale and a margin for each row",
    ),
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
    Case("angle-poles", lambda g: _at_poles(g, 8.0) | {"angle_rad": 0.5}, "no gradient is infinite", smooth=False),
    Case("some-ignored", _some_ignored, "ignored rows count for nothing"),
    Case("none-mean-ignored", partial(_some_ignored, reduction="none"), "ignored rows have loss 0"),
    Case(
        "all-ignored",
        lambda g: _classifier(g, target=torch.full((37,), -1)),
        "the mean over no row is 0",
    ),
    Case("strided", _strided, "views with gaps in both directions"),
    Case("certain", _certain, "losses far below the rounding of the logits"),
    Case("large-scale", partial(_classifier, scale=512.0), "a running maximum is needed"),
    Case("one-class", partial(_classifier, columns=1), "no other class: the loss is 0"),
    Case("no-rows", partial(_classifier, rows=0), "an empty batch"),
    Case("one-row", partial(_classifier, rows=1), "a batch of one"),
    *(
        Case(f"poles-{scale:g}", partial(_at_poles, scale=scale), "a row's own class is the last, far above the others")
        for scale in (64.0, 400.0)
    ),
    Case("turned-away", _turned_away, "columns beyond the last must not count, whatever exp makes of them"),
    Case("blocks", partial(_classifier, rows=13, columns=521, width=67), "more columns than two blocks"),
    Case(
        "aligned",
        partial(_classifier, rows=70, columns=300, width=72),
        "16-bit vectors at multiples of 16 bytes, which a GPU's copy engine fetches",
    ),
    Case("wide", partial(_classifier, rows=70, columns=7, width=307), "wider than any tile"),
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
    return {"x": randn(shape.rows), "y": randn(shape.columns), "target": target, "scale": 30.0, "margin": -0.1}


def multiply_adds(shape: Shape) -> int:
    return 3 * shape.rows * shape.columns * shape.width


def compulsory_bytes(shape: Shape, dtype: torch.dtype) -> int:
    return 2 * (shape.rows + shape.columns) * shape.width * dtype.itemsize + shape.rows * 8


def small_term(name: str, inputs: Inputs, dtype: torch.dtype, of_weights: float = 0.0) -> float:
    """Four roundings of the sum of absolute values behind an entry; a logit's error is a weight's relative one."""
    x, y, target = inputs["x"], inputs["y"], inputs["target"].long()
    similarity, reduction = inputs.get("similarity", "cosine"), inputs.get("reduction", "mean")
    rows = x.shape[0]
    scale = torch.as_tensor(inputs["scale"], dtype=torch.float64, device=x.device).reshape(-1, 1).expand(rows, 1)
    margin = torch.as_tensor(inputs["margin"], dtype=torch.float64, device=x.device).reshape(-1, 1).expand(rows, 1)
    counted = (target != inputs.get("ignore_index", -1))[:, None]
    own = (target[:, None] == torch.arange(y.shape[0], device=x.device)) & counted  # (B, N)
    u, u_largest, (factor_x, factor_y) = similarity_matrix(x, y, similarity), *reach(x, y, similarity)
    share = 1 / max(1, int(counted.sum())) if reduction == "mean" else 1.0
    angle, beyond_pi = inputs.get("angle_rad", 0.0), inputs.get("beyond_pi", "standard")
    turned = torch.where(own, apply_margin(u, angle, "angular", beyond_pi=beyond_pi), u)
    inverse_sine = (1 - u.square()).clamp(min=0).rsqrt()
    inverse_sine = torch.where(inverse_sine > 1e6, 0.0, inverse_sine)  # at the poles the derivative of the sine is 0
    slope = own * (1 + abs(math.sin(angle)) * inverse_sine)  # |psi'| at most
    bend = own * abs(math.sin(angle)) * inverse_sine**3  # |psi''|: an error of u moves psi'
    q = (scale * (turned - margin * own)).softmax(1) * counted if y.shape[0] else u
    weights = share * scale * (q + (1 - q) * (slope + bend * u_largest))  # |dL/du| at most
    logit = 1 + largest(scale) * (u_largest * max(1.0, largest(slope)) + largest(margin))
    of_scale = share * (q * (u.abs() + margin.abs()) + own * (turned.abs() + margin.abs())).sum(1)
    of_margin = share * (scale * own).sum(1)
    per_row = {n: torch.as_tensor(inputs[n]).dim() == 1 for n in ("scale", "margin")}
    eps = torch.finfo(accumulation_dtype(dtype)).eps
    sums = {
        "loss": logit * (1.0 if reduction != "sum" else rows),
        "grad_x": (logit + of_weights / (4 * eps)) * factor_x * largest(weights.sum(1)),
        "grad_y": (logit + of_weights / (4 * eps)) * factor_y * largest(weights.sum(0)),
        "grad_scale": logit * largest(of_scale if per_row["scale"] else of_scale.sum()),
        "grad_margin": logit * largest(of_margin if per_row["margin"] else of_margin.sum()),
    }
    return 4 * eps * sums[name]
