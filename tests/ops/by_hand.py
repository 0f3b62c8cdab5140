"""Loops over single numbers, written from the formulas: what the definitions of several ops are compared with."""

import math
from typing import Any

import numpy as np
from torch import Tensor

from fused_margins.core.indices import UNADMITTED
from fused_margins.ops.cases import Inputs

Row = np.ndarray[Any, np.dtype[np.float64]]


def in_numbers(inputs: Inputs) -> Inputs:
    """Matrices as arrays, every other tensor as numbers of Python: what loops read in a hundredth of the time."""

    def one(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.numpy() if value.dim() == 2 else value.tolist()

    return {name: one(value) for name, value in inputs.items()}


@np.errstate(invalid="ignore")  # infinity times 0
def similarities(x: Row, y: Row, similarity: str) -> list[list[float]]:
    """Of all pairs, each by itself."""
    return [[similarity_of(a, b, similarity) for b in y] for a in x]


def similarity_of(a: Row, b: Row, similarity: str) -> float:
    if similarity == "dot":
        return float(a @ b)
    if similarity == "negative_squared_euclidean":
        return -float((a - b) @ (a - b))
    lengths = math.sqrt(a @ a) * math.sqrt(b @ b)
    return float(a @ b) / lengths if lengths > 0 else 0.0


def of_row(value: float | list[float], i: int) -> float:
    return value[i] if isinstance(value, list) else value


def admits(inputs: Inputs, i: int, j: int, row_label: int, relation: str) -> bool:
    column_label = inputs["column_labels"][j] if "column_labels" in inputs else j
    if "self_index" in inputs and inputs["self_index"][i] == j:
        return False
    if column_label == UNADMITTED:
        return False
    return {"different": column_label != row_label, "same": column_label == row_label, "any": True}[relation]


def turned(u: float, angle: float, beyond_pi: str) -> float:
    """A cosine after a margin on its angle."""
    theta = math.acos(max(-1.0, min(1.0, u)))
    if angle > 0 and beyond_pi == "easy":
        return math.cos(theta + angle) if u > 0 else u
    if theta + angle > math.pi:
        return u - angle * math.sin(angle) if beyond_pi == "standard" else -2 - math.cos(theta + angle)
    return math.cos(theta + angle) if theta + angle >= 0 else u + 1 - math.cos(angle)
