"""The definition itself, against loops over single numbers written from the formulas."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fused_margins.ops import cases
from fused_margins.ops.cases import Case, Inputs

Row = np.ndarray[Any, np.dtype[np.float64]]


def similarity_of(a: Row, b: Row, similarity: str) -> float:
    with np.errstate(invalid="ignore"):  # infinity times 0
        if similarity == "dot":
            return float(np.sum(a * b))
        if similarity == "negative_squared_euclidean":
            return -float(np.sum((a - b) ** 2))
        lengths = math.sqrt(np.sum(a * a)) * math.sqrt(np.sum(b * b))
        return float(np.sum(a * b)) / lengths if lengths > 0 else 0.0


def of_row(value: float | Tensor, i: int) -> float:
    return float(value[i]) if isinstance(value, Tensor) and value.dim() else float(value)


def admits(inputs: Inputs, i: int, j: int, row_label: int, relation: str) -> bool:
    column_label = int(inputs["column_labels"][j]) if "column_labels" in inputs else j
    if "self_index" in inputs and int(inputs["self_index"][i]) == j:
        return False
    return {"different": column_label != row_label, "same": column_label == row_label, "any": True}[relation]


def contrast(inputs: Inputs) -> dict[str, Tensor]:
    x, y, target = inputs["x"].numpy(), inputs["y"].numpy(), inputs["target"].tolist()
    similarity, relation = inputs.get("similarity", "cosine"), inputs.get("relation", "different")
    positive, negative_lse = [], []
    for i in range(len(x)):
        if target[i] == inputs.get("ignore_index", -1):
            positive.append(0.0)
            negative_lse.append(-math.inf)
            continue
        positive.append(similarity_of(x[i], y[target[i]], similarity))
        label = int(inputs["row_labels"][i]) if "row_labels" in inputs else target[i]
        logits = [
            of_row(inputs["scale"], i) * similarity_of(x[i], y[j], similarity) + of_row(inputs.get("bias", 0.0), j)
            for j in range(len(y))
            if admits(inputs, i, j, label, relation)
        ]
        top = max(logits, default=0.0)
        negative_lse.append(top + math.log(math.fsum(math.exp(z - top) for z in logits)) if logits else -math.inf)
    return {
        "positive": torch.tensor(positive, dtype=torch.float64),
        "negative_lse": torch.tensor(negative_lse, dtype=torch.float64),
    }


def nearest(inputs: Inputs) -> dict[str, Tensor]:
    x, y, k = inputs["x"].numpy(), inputs["y"].numpy(), inputs.get("k", 1)
    similarities, indices = [], []
    for i in range(len(x)):
        found = []
        for j in range(len(y)):
            u = similarity_of(x[i], y[j], inputs.get("similarity", "cosine"))
            below = float(inputs["below"][i]) if "below" in inputs else math.inf
            admitted = admits(inputs, i, j, int(inputs["row_labels"][i]), inputs.get("relation", "same"))
            # Not written as u >= below: NaN compares false either way.
            if admitted and not math.isnan(u) and u > -math.inf and (u < below or "below" not in inputs):
                found.append((-u, j))
        best = sorted(found)[:k] + [(math.inf, -1)] * k
        similarities.append([-u for u, _ in best[:k]])
        indices.append([j for _, j in best[:k]])
    shape = (len(x), k)
    return {
        "similarity": torch.tensor(similarities, dtype=torch.float64).reshape(shape),
        "index": torch.tensor(indices, dtype=torch.int64).reshape(shape),
    }


def scores(inputs: Inputs) -> dict[str, Tensor]:
    x, y = inputs["x"].numpy(), inputs["y"].numpy()
    z = torch.empty(len(x), len(y), dtype=torch.float64)
    for i in range(len(x)):
        for j in range(len(y)):
            u = similarity_of(x[i], y[j], inputs.get("similarity", "cosine"))
            if "target" in inputs and int(inputs["target"][i]) == j:
                u -= of_row(inputs.get("margin", 0.0), i)
            z[i, j] = of_row(inputs.get("scale", 1.0), i) * u + of_row(inputs.get("bias", 0.0), j)
    return {"scores": z}


def turned(u: float, angle: float, beyond_pi: str) -> float:
    """A cosine after a margin on its angle."""
    theta = math.acos(max(-1.0, min(1.0, u)))
    if angle > 0 and beyond_pi == "easy":
        return math.cos(theta + angle) if u > 0 else u
    if theta + angle > math.pi:
        return u - angle * math.sin(angle) if beyond_pi == "standard" else -2 - math.cos(theta + angle)
    return math.cos(theta + angle) if theta + angle >= 0 else u + 1 - math.cos(angle)


def margin_softmax(inputs: Inputs) -> dict[str, Tensor]:
    target, ignored = inputs["target"].tolist(), inputs.get("ignore_index", -1)
    both = contrast(inputs)
    losses = []
    for i, (u, negative_lse) in enumerate(zip(both["positive"].tolist(), both["negative_lse"].tolist())):
        if "angle_rad" in inputs:
            u = turned(u, inputs["angle_rad"], inputs.get("beyond_pi", "standard"))
        z = of_row(inputs["scale"], i) * (u - of_row(inputs["margin"], i))
        gap = negative_lse - z
        losses.append(0.0 if target[i] == ignored else max(gap, 0.0) + math.log1p(math.exp(-abs(gap))))
    counted = sum(t != ignored for t in target)
    reduction = inputs.get("reduction", "mean")
    values = torch.tensor(losses, dtype=torch.float64)
    return {"loss": values if reduction == "none" else values.sum() / (counted or 1 if reduction == "mean" else 1)}


def magnet(inputs: Inputs) -> dict[str, Tensor]:
    x, clusters, labels = inputs["x"].numpy(), inputs["clusters"].tolist(), inputs["cluster_labels"].tolist()
    means = [sum(row for row, own in zip(x, clusters) if own == m) / clusters.count(m) for m in range(len(labels))]
    distances = [[math.fsum((row - mean) ** 2) for mean in means] for row in x]
    own = [of_row[m] for of_row, m in zip(distances, clusters)]
    variance = max(math.fsum(own) / max(len(x) - 1, 1), inputs.get("variance_floor", 1e-4))
    losses = []
    for of_row, m, d in zip(distances, clusters, own):
        others = math.fsum(
            math.exp(-other / (2 * variance)) for k, other in enumerate(of_row) if labels[k] != labels[m]
        )
        losses.append(max(0.0, inputs["alpha"] + d / (2 * variance) + math.log(others)) if others else 0.0)
    values, reduction = torch.tensor(losses, dtype=torch.float64), inputs.get("reduction", "mean")
    return {"loss": values if reduction == "none" else values.sum() / (len(x) or 1 if reduction == "mean" else 1)}


BY_HAND = {
    "contrast": contrast,
    "magnet": magnet,
    "margin_softmax": margin_softmax,
    "nearest": nearest,
    "scores": scores,
}


@pytest.mark.parametrize(
    ("op", "case"), [pytest.param(op, case, id=f"{op}-{case.name}") for op in BY_HAND for case in cases.load(op).CASES]
)
def test_reference_is_its_formula(op: str, case: Case) -> None:
    inputs = case.make(torch.Generator().manual_seed(0))
    expected = BY_HAND[op](inputs)
    for name, value in cases.load(op).run(inputs, "reference").items():
        if value.is_floating_point() or case.exact:
            torch.testing.assert_close(value, expected[name], rtol=1e-11, atol=1e-11)
