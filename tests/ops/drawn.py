"""Matrices and labels drawn by Hypothesis."""

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from fused_margins.core.enums import Similarity
from fused_margins.ops.cases import Inputs

INTEGERS = [torch.int64, torch.int32, torch.int16]


@st.composite
def matrices(draw: Any) -> Inputs:
    """x and y, some rows of them equal or zero, at times transposed; around sizes at which tiles and strips end."""
    rows = draw(st.integers(0, 14) | st.sampled_from([24, 25, 49]))
    columns = draw(st.integers(0, 18) | st.sampled_from([31, 33, 255, 257]))
    width = draw(st.integers(0, 9) | st.sampled_from([16, 17, 33]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def side(count: int) -> Tensor:
        if draw(st.booleans()):
            t = torch.randn(width, count, generator=g, dtype=torch.float64).T
        else:
            t = torch.randn(count, width, generator=g, dtype=torch.float64)
        if count > 2 and draw(st.booleans()):
            t[0] = t[-1]
            t[1] = 0
        return t

    return {"x": side(rows), "y": side(columns), "similarity": draw(st.sampled_from(Similarity.names()))}


def labels_of(draw: Any, size: int, classes: int, offset: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    values = offset + torch.randint(classes, (size,), generator=g)
    return values if offset else values.to(draw(st.sampled_from(INTEGERS)))


def self_index_of(draw: Any, rows: int, columns: int) -> Tensor:
    """A column or -1 for every row."""
    return labels_of(draw, rows, columns + 1).long() - 1
