"""Loops over single numbers, written from the formulas: what the definitions of several ops are compared with."""

import math
from typing import Any

import numpy as np
from torch import Tensor

from fused_margins.core.indices import UNADMITTED
from fused_margins.ops.cases import Inputs

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
    if column_label == UNADMITTED:
        return False
    return {"different": column_label != row_label, "same": column_label == row_label, "any": True}[relation]
