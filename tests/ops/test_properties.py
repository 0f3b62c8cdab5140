"""Shapes, labels and options drawn by Hypothesis, the same at every run (see the profile in tests/conftest.py)."""

from typing import Any

import pytest
import torch
from fused_margins.ops.similarity import RELATIONS, SIMILARITIES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fused_margins.ops import cases, registry
from fused_margins.ops.cases import Inputs
from fused_margins.ops.contrast import contrast
from fused_margins.ops.nearest import nearest

BACKENDS = [b.name for b in registry.BACKENDS if b.name != "reference"]  # which the rule compares with itself
INTEGERS = [torch.int64, torch.int32, torch.int16]


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request, device_for):
    device_for("contrast", request.param)
    return request.param


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

    return {"x": side(rows), "y": side(columns), "similarity": draw(st.sampled_from(SIMILARITIES))}


def labels(draw: Any, size: int, classes: int, offset: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    values = offset + torch.randint(classes, (size,), generator=g)
    return values if offset else values.to(draw(st.sampled_from(INTEGERS)))


def self_index(draw: Any, rows: int, columns: int) -> Tensor:
    """A column or -1 for every row."""
    return labels(draw, rows, columns + 1).long() - 1


@st.composite
def contrast_inputs(draw: Any) -> Inputs:
    inputs = draw(matrices())
    rows, columns = inputs["x"].shape[0], inputs["y"].shape[0]
    inputs |= {"relation": draw(st.sampled_from(RELATIONS)), "target": self_index(draw, rows, columns)}
    classes, offset = draw(st.integers(1, 6)), draw(st.sampled_from([0, 0, 2**31 - 3, -(2**62)]))
    if draw(st.booleans()):
        inputs["row_labels"] = labels(draw, rows, classes, offset)
    if draw(st.booleans()):
        inputs["column_labels"] = labels(draw, columns, classes, offset)
    if draw(st.booleans()):
        inputs["self_index"] = self_index(draw, rows, columns)
    if draw(st.booleans()):
        inputs["bias"] = torch.linspace(-3, 3, columns, dtype=torch.float64)
    scale = draw(st.sampled_from([0.01, 1.0, 7.0]))
    kinds = [scale, torch.tensor(scale).double(), torch.linspace(scale, 2 * scale, rows, dtype=torch.float64)]
    return inputs | {"scale": draw(st.sampled_from(kinds))}


@st.composite
def nearest_inputs(draw: Any) -> Inputs:
    inputs = draw(matrices())
    rows, columns = inputs["x"].shape[0], inputs["y"].shape[0]
    classes, offset = draw(st.integers(1, 6)), draw(st.sampled_from([0, 0, 2**31 - 3, -(2**62)]))
    inputs |= {
        "row_labels": labels(draw, rows, classes, offset),
        "column_labels": labels(draw, columns, classes, offset),
    }
    inputs |= {"relation": draw(st.sampled_from(RELATIONS)), "k": draw(st.integers(1, 10))}
    if draw(st.booleans()):
        inputs["self_index"] = self_index(draw, rows, columns)
    return inputs


@settings(max_examples=150)
@given(inputs=contrast_inputs(), dtype=st.sampled_from([torch.float64, torch.float32]))
def test_contrast_agrees(inputs, dtype, backend):
    assert cases.disagreements(cases.load("contrast"), inputs, backend, dtype) == []


@settings(max_examples=150)
@given(inputs=nearest_inputs(), dtype=st.sampled_from([torch.float64, torch.float32]))
def test_nearest_agrees(inputs, dtype, backend):
    assert cases.disagreements(cases.load("nearest"), inputs, backend, dtype) == []


@settings(max_examples=75)
@given(inputs=matrices(), dtype=st.sampled_from([torch.float64, torch.float32]), data=st.data())
def test_scores_agrees(inputs, dtype, backend, data):
    rows, columns = inputs["x"].shape[0], inputs["y"].shape[0]
    inputs |= {"target": self_index(data.draw, rows, columns), "margin": torch.linspace(-1, 1, rows).double()}
    inputs |= {"scale": torch.tensor(3.0).double(), "bias": torch.ones(columns).double()}
    assert cases.disagreements(cases.load("scores"), inputs, backend, dtype) == []


@settings(max_examples=40)
@given(inputs=contrast_inputs(), seed=st.integers(0, 2**32))
def test_the_order_of_the_columns_does_not_matter(inputs, seed, backend):
    columns = inputs["y"].shape[0]
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(seed))
    place = torch.cat([order.argsort(), torch.tensor([-1])])  # -1 stays -1
    target = inputs["target"]
    inputs.setdefault("row_labels", target)
    inputs.setdefault("column_labels", torch.arange(columns))
    moved = {n: inputs[n][order] for n in ("y", "column_labels", "bias") if n in inputs}
    moved |= {n: place[inputs[n]] for n in ("target", "self_index") if n in inputs}
    for a, b in zip(contrast(**inputs, backend=backend), contrast(**inputs | moved, backend=backend)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@settings(max_examples=40)
@given(inputs=nearest_inputs())
def test_k_neighbours_begin_with_the_nearer_ones(inputs, backend):
    similarity, index = nearest(**inputs, backend=backend)
    assert (similarity[:, 1:] <= similarity[:, :-1]).all()
    for k in range(1, inputs["k"]):
        fewer, first = nearest(**inputs | {"k": k}, backend=backend)
        assert torch.equal(fewer, similarity[:, :k])
        assert torch.equal(first, index[:, :k])
