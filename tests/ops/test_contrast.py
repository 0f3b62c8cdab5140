"""`contrast`: its formula, values that are checked where they are read, reserved rows and columns, sizes, graphs."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fused_margins.core.enums import Relation
from fused_margins.core.indices import ABSENT, INVALID, UNADMITTED
from fused_margins.functional import margin_softmax_loss
from fused_margins.ops import cases
from fused_margins.ops.cases import Inputs
from fused_margins.ops.contrast import contrast
from fused_margins.ops.contrast import reference as definition
from fused_margins.ops.nearest import nearest
from tests.conftest import backends
from tests.ops.by_hand import admits, in_numbers, of_row, similarities, similarity_of, turned
from tests.ops.drawn import labels_of, matrices, self_index_of

OP = cases.load("contrast")
on_every_backend = pytest.mark.parametrize("backend", backends("contrast"))
on_every_kernel = pytest.mark.parametrize("backend", backends("contrast", reference=False))
on_cpu = pytest.mark.parametrize("backend", [b for b in backends("contrast") if b == "cpu"])


# The definition, by hand.


def vectors_by_hand(inputs: Inputs) -> tuple[list[float], list[float]]:
    inputs = in_numbers(inputs)
    target, columns, relation = inputs["target"], range(len(inputs["y"])), inputs.get("relation", "different")
    u = similarities(inputs["x"], inputs["y"], inputs.get("similarity", "cosine"))
    positive, negative_lse = [], []
    for i in range(len(u)):
        if target[i] == inputs.get("ignore_index", -1):
            positive.append(0.0)
            negative_lse.append(-math.inf)
            continue
        positive.append(0.0 if target[i] == ABSENT else u[i][target[i]])
        label = inputs["row_labels"][i] if "row_labels" in inputs else target[i]
        size = inputs.get("group_size", 1)
        groups = [
            [j for j in range(first, first + size) if admits(inputs, i, j, label, relation)]
            for first in range(0, len(columns), size)
        ]
        logits = [
            of_row(inputs["scale"], i) * u[i][j] + of_row(inputs.get("bias", 0.0), j)
            for j in (max(group, key=u[i].__getitem__) for group in groups if group)
        ]
        top = max(logits, default=0.0)
        negative_lse.append(top + math.log(math.fsum(math.exp(z - top) for z in logits)) if logits else -math.inf)
    return positive, negative_lse


def loss_by_hand(inputs: Inputs) -> Tensor:
    losses, counted = [], 0
    inputs, vectors = in_numbers(inputs), vectors_by_hand(inputs)
    for i, (u, negative_lse) in enumerate(zip(*vectors)):
        has_target = inputs["target"][i] not in (inputs.get("ignore_index", -1), ABSENT)
        counted += has_target and (inputs["epilogue"] != "info_nce" or negative_lse > -math.inf)
        if "angle_rad" in inputs:
            u = turned(u, inputs["angle_rad"], inputs.get("beyond_pi", "standard"))
        own = of_row(inputs["scale"], i) * (u - of_row(inputs.get("margin", 0.0), i))
        gap = negative_lse - own
        loss = max(gap, 0.0) + math.log1p(math.exp(-abs(gap)))
        if has_target and "smoothing" in inputs:
            z = [of_row(inputs["scale"], i) * similarity_of(inputs["x"][i], y, "cosine") for y in inputs["y"]]
            z[inputs["target"][i]] = own
            of_classes = math.fsum(loss + own - z_j for z_j in z) / len(z)  # loss + own: the log-sum-exp of all
            loss += inputs["smoothing"] * (of_classes - loss)
        losses.append(loss if has_target else 0.0)
    values, reduction = torch.tensor(losses, dtype=torch.float64), inputs.get("reduction", "mean")
    return values if reduction == "none" else values.sum() / (counted or 1 if reduction == "mean" else 1)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in OP.CASES])
def test_the_definition_is_its_formula(case):
    inputs = case.make(torch.Generator().manual_seed(0))
    got = OP.run(inputs, "reference")
    if "loss" in got:
        torch.testing.assert_close(got["loss"], loss_by_hand(inputs), rtol=1e-11, atol=1e-11)
        return
    for value, expected in zip(got.values(), vectors_by_hand(inputs)):
        torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64), rtol=1e-11, atol=1e-11)


# Values that are checked where they are read.

B, N, D = 6, 9, 4


def valid() -> Inputs:
    of_rows = {"row_labels": torch.arange(B), "column_labels": torch.arange(N), "self_index": torch.arange(B)}
    return {"x": torch.randn(B, D), "y": torch.randn(N, D), "target": torch.arange(B), "scale": torch.ones(B)} | of_rows


@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "gradients"])
@pytest.mark.parametrize("value", [N, -2, 2**40, -(2**63)])
@pytest.mark.parametrize("argument", ["target", "self_index"])
@on_every_backend
def test_an_index_out_of_range_raises_before_anything_is_read(argument, value, backend, gradients, device_for):
    if device_for("contrast", backend) != "cpu" or (argument, value) == ("target", ABSENT):
        return
    inputs = valid()
    inputs[argument] = torch.tensor([0, 1, -1, 3, value, N])  # the first bad row is named, -1 is none
    inputs["x"].requires_grad_(gradients)
    with pytest.raises(IndexError) as raised:
        contrast(**inputs, backend=backend)
    assert str(raised.value) == f"{argument}: expected values in [0, {N}) or -1 (ignored), got {value} in row 4"


@on_every_backend
def test_another_ignore_index_makes_minus_one_an_error(backend):
    inputs = valid() | {"target": torch.tensor([0, -100, -1, 0, 0, 0]), "ignore_index": -100}
    with pytest.raises(IndexError, match=r"target: .* or -100 \(ignored\), got -1 in row 2"):
        contrast(**inputs, backend=backend)


@on_every_backend
@pytest.mark.parametrize("value", [0.0, -2.0, torch.nan])
@pytest.mark.parametrize("rows", [(), (B,)], ids=["single", "rows"])
def test_a_scale_that_is_not_positive(value, rows, backend):
    scale = torch.ones(rows)
    scale.view(-1)[-1] = value
    with pytest.raises(ValueError, match="scale: expected positive values, got "):
        contrast(**valid() | {"scale": scale}, backend=backend)


def test_a_bad_row_is_not_a_number_where_checks_cannot_raise(monkeypatch):
    """As on a GPU: the check marks the row, and the definition turns the mark into NaN."""
    marked = torch.tensor([0, 1, INVALID, 3, 4, 5])
    monkeypatch.setattr(definition, "check_index", lambda *args, **kwargs: marked)
    for values in contrast(torch.randn(B, D), torch.randn(N, D), marked, scale=1.0, backend="reference"):
        assert values.isnan().tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"angle_rad": 3.2}, ValueError, r"angle_rad: expected radians within \[-pi, pi\], got 3.2"),
        ({"angle_rad": 0.5, "similarity": "dot"}, ValueError, "similarity: expected 'cosine' with an angle_rad"),
        ({"epilogue": "none", "margin": 0.1}, ValueError, "margin: expected with an epilogue that takes margins"),
        ({"epilogue": "info_nce", "margin": torch.ones(())}, ValueError, "margin: .* got epilogue 'info_nce'"),
        ({"epilogue": "none", "angle_rad": 0.1}, ValueError, "angle_rad: expected with an epilogue that takes margins"),
    ],
)
def test_margins_and_angles(options, error, message):
    with pytest.raises(error, match=message):
        contrast(**valid() | {"epilogue": "margin_softmax"} | options)


# Rows and columns that are reserved.


@on_every_backend
@pytest.mark.parametrize("relation", Relation.names())
@pytest.mark.interpreted
def test_columns_that_no_relation_admits_change_nothing(backend, relation, device_for):
    """Padding, whatever lies in its memory, has no share in a value and no gradient."""
    device, g = device_for("contrast", backend), torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 5, generator=g) for n in (8, 12))
    inputs = {"target": torch.arange(8), "row_labels": torch.arange(8) % 3, "column_labels": torch.arange(12) % 3}
    padded = torch.cat([y, torch.full((7, 5), 1e4)])
    labels = torch.cat([inputs["column_labels"], torch.full((7,), UNADMITTED)])
    inputs = {n: t.to(device) for n, t in inputs.items()}
    results = []
    for columns, column_labels in ((y, inputs["column_labels"]), (padded, labels)):
        leaves = [t.to(device).requires_grad_() for t in (x, columns)]
        options = inputs | {"column_labels": column_labels.to(device)}
        outputs = contrast(*leaves, **options, scale=3.0, relation=relation, backend=backend)
        weights = [torch.ones_like(t).where(t.isfinite(), 0.0) for t in outputs]
        of_x, of_y = torch.autograd.grad(outputs, leaves, weights)
        results.append((*(t.detach() for t in outputs), of_x, of_y[:12]))
        assert not of_y[12:].any()
    for plain, with_padding in zip(*results):
        torch.testing.assert_close(with_padding, plain, rtol=1e-5, atol=1e-6)


@on_every_backend
@pytest.mark.parametrize("epilogue", ["margin_softmax", "info_nce"])
@pytest.mark.interpreted
def test_rows_whose_class_lives_elsewhere(backend, epilogue):
    """They have negatives, no positive, no loss and no gradient, and count for nothing in a mean."""
    x, y = torch.randn(6, 5, requires_grad=True), torch.randn(9, 5)
    target = torch.tensor([0, ABSENT, 2, ABSENT, 4, 5])
    positive, negative_lse = contrast(x, y, target, scale=3.0, backend=backend)
    everything = contrast(x, y, torch.zeros(6).long(), scale=3.0, relation="any", backend=backend)[1]
    assert positive[target == ABSENT].eq(0).all()
    torch.testing.assert_close(negative_lse[target == ABSENT], everything[target == ABSENT])
    loss = contrast(x, y, target, scale=3.0, epilogue=epilogue, backend=backend)
    kept = target != ABSENT
    torch.testing.assert_close(loss, contrast(x[kept], y, target[kept], scale=3.0, epilogue=epilogue, backend=backend))
    (grad,) = torch.autograd.grad(loss, x)
    assert not grad[~kept].any()
    assert grad[kept].any(1).all()


@on_every_backend
@pytest.mark.interpreted
@pytest.mark.parametrize("epilogue", ["margin_softmax", "info_nce"])
def test_a_logit_that_is_infinite_makes_no_loss(backend, epilogue):
    """Not 0, though the right class wins: as torch's cross entropy says. Rows without a loss stay so."""
    x = torch.tensor([[math.inf], [-math.inf], [3e38], [1.0], [math.inf], [math.inf]], requires_grad=True)
    y, target = torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 1, 0, 0, -1, ABSENT])
    options = {"similarity": "dot", "epilogue": epilogue, "backend": backend}
    loss = contrast(x, y, target, scale=2.0, reduction="none", **options)
    expected = F.cross_entropy(2 * x[:4] @ y.T, target[:4], reduction="none")
    assert expected.isnan().tolist() == [True, True, True, False]
    torch.testing.assert_close(loss[:4], expected, equal_nan=True)
    assert loss[4:].eq(0).all()
    (grad,) = torch.autograd.grad(loss.sum(), x)
    assert grad[:3].isnan().all()
    assert grad[3].isfinite()
    assert contrast(x, y, target, scale=2.0, **options).isnan()
    options = {"similarity": "dot", "scale": 2.0, "backend": backend, "reduction": "none"}
    by_rows = margin_softmax_loss(x[:4], y, target[:4], class_weight=torch.ones(2), **options)
    torch.testing.assert_close(by_rows, expected, equal_nan=True)


# Sizes.


@pytest.mark.parametrize("columns", [20, 64, 191, 200, 264, 265, 400, 2311])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@on_cpu
def test_same_bits_of_few_and_many_columns(columns, dtype, backend):
    """The tasks then depend on the threads, and weights come in blocks of 192 columns, or one of up to 264."""
    g = torch.Generator().manual_seed(0)
    width = 600 if columns in (200, 265) else 128  # more than the depth that is summed at a time, and than rows
    x, y = torch.randn(300, width, generator=g), torch.randn(columns, width, generator=g)
    inputs = {"x": x, "y": y, "target": torch.randint(columns, (300,), generator=g), "scale": torch.tensor(4.0)}
    inputs = cases.convert(inputs | {"bias": torch.randn(columns, generator=g)}, dtype)
    before = torch.get_num_threads()
    try:
        for epilogue in ("none", "margin_softmax"):
            results = []
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                results.append(cases.evaluate(OP, inputs | {"epilogue": epilogue}, backend))
            for name, value in results[0].items():
                assert all(torch.equal(result[name], value) for result in results), name
    finally:
        torch.set_num_threads(before)


@on_every_kernel
def test_more_similarities_than_32_bits_count(backend, device_for):
    """The first rows, the last ones and some between are those of a small problem."""
    device, side = device_for("contrast", backend), 46_400  # its square is more than 2^31
    picked = torch.tensor([0, 7, side // 2, side - 2, side - 1], device=device)
    x, y = (torch.randn(side, 2, generator=torch.Generator().manual_seed(s)).to(device) for s in (0, 1))
    x, y, incoming = x.requires_grad_(), y.requires_grad_(), torch.zeros(side, device=device).index_fill_(0, picked, 1)
    outputs = contrast(x, y, torch.arange(side, device=device), scale=4.0, backend=backend)
    grads = torch.autograd.grad(outputs, (x, y), (incoming, incoming))
    few, all_columns = x.detach()[picked].double().requires_grad_(), y.detach().double().requires_grad_()
    expected = contrast(few, all_columns, picked, scale=4.0, backend="reference")
    of_few, of_columns = torch.autograd.grad([t.sum() for t in expected], (few, all_columns))
    for got, truth in zip(outputs, expected):
        torch.testing.assert_close(got[picked].double(), truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grads[0][picked].double(), of_few, rtol=1e-4, atol=1e-4)
    assert not grads[0][incoming == 0].any()
    torch.testing.assert_close(grads[1].double(), of_columns, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("backend", [b for b in backends("contrast", epilogue="margin_softmax") if b == "cuda"])
def test_more_rows_of_few_classes_than_a_grid(backend, device_for):
    device = device_for("contrast", backend, epilogue="margin_softmax")
    rows, classes = 2**21 + 1000, 1024
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 2, generator=g).to(device).requires_grad_() for n in (rows, classes))
    target = torch.arange(rows, device=device) % classes
    picked = torch.tensor([0, 2**20, rows - 2, rows - 1], device=device)
    incoming = torch.zeros(rows, device=device).index_fill_(0, picked, 1)
    options = {"scale": 4.0, "margin": 0.2, "reduction": "none", "epilogue": "margin_softmax"}
    loss = contrast(x, y, target, **options, backend=backend)
    grads = torch.autograd.grad(loss, (x, y), incoming)
    few, weight = x.detach()[picked].double().requires_grad_(), y.detach().double().requires_grad_()
    expected = contrast(few, weight, target[picked], **options, backend="reference")
    of_few, of_weight = torch.autograd.grad(expected.sum(), (few, weight))
    torch.testing.assert_close(loss[picked].double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grads[0][picked].double(), of_few, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grads[1].double(), of_weight, rtol=1e-3, atol=1e-5)


# Compiled together with what surrounds it.


def by_rows(x: Tensor, y: Tensor, target: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    positive, negative_lse = contrast(x, y, target, scale=scale, bias=bias, backend="cpu")
    return F.softplus(negative_lse - scale * (positive - 0.3)).mean()


def with_itself(x: Tensor, y: Tensor, target: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """A batch against itself: one tensor on both sides, and labels twice."""
    labels = target % 3
    _, index = nearest(x, x, labels, labels, self_index=torch.arange(x.shape[0]), backend="cpu")
    positive, negative_lse = contrast(x, x, index[:, 0].clamp(min=0), labels, labels, scale=scale, backend="cpu")
    return (negative_lse - scale * positive).exp().log1p().mean() + 0 * (y.sum() + bias.sum())


def arguments(rows: int, columns: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(rows)
    x, y, bias = (torch.randn(*s, generator=g) for s in ((rows, 16), (columns, 16), (columns,)))
    floating = [t.requires_grad_() for t in (x, y, torch.tensor(8.0), bias)]
    return [x, y, torch.arange(rows) % columns, floating[2], bias]


def value_and_gradients(loss: Callable[..., Tensor], args: list[Tensor]) -> list[Tensor]:
    value = loss(*args)
    wanted = [t for t in args if t.requires_grad]
    return [value.detach(), *torch.autograd.grad(value, wanted, materialize_grads=True)]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("loss", [by_rows, with_itself], ids=lambda f: f.__name__)
@on_cpu
def test_a_compiled_loss_is_the_eager_one(loss, backend):
    """Of any size, in one graph each way."""
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows, columns in [(12, 20), (15, 33), (7, 20)]:
            args = arguments(rows, columns)
            for a, b in zip(value_and_gradients(compiled, args), value_and_gradients(loss, args)):
                torch.testing.assert_close(a, b)
                assert a.isfinite().all()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@on_cpu
def test_a_bad_label_raises_from_a_compiled_graph(backend):
    torch.compiler.reset()
    compiled = torch.compile(by_rows, fullgraph=True, backend="aot_eager")
    args = arguments(12, 20)
    compiled(*args)
    args[2] = args[2].index_fill(0, torch.tensor([4]), 20)
    with pytest.raises(IndexError, match=r"target: expected values in \[0, 20\) or -1 \(ignored\), got 20 in row 4"):
        compiled(*args)


# Shapes, labels and options drawn by Hypothesis, the same at every run (see the profile in tests/conftest.py).


@st.composite
def drawn_inputs(draw: Any) -> Inputs:
    inputs = draw(matrices())
    rows, columns = inputs["x"].shape[0], inputs["y"].shape[0]
    inputs |= {"relation": draw(st.sampled_from(Relation.names())), "target": self_index_of(draw, rows, columns)}
    classes, offset = draw(st.integers(1, 6)), draw(st.sampled_from([0, 0, 2**31 - 3, -(2**62)]))
    if draw(st.booleans()):
        inputs["row_labels"] = labels_of(draw, rows, classes, offset)
    if draw(st.booleans()):
        inputs["column_labels"] = labels_of(draw, columns, classes, offset)
    if draw(st.booleans()):
        inputs["self_index"] = self_index_of(draw, rows, columns)
    if draw(st.booleans()):
        inputs["bias"] = torch.linspace(-3, 3, columns, dtype=torch.float64)
    scale = draw(st.sampled_from([0.01, 1.0, 7.0]))
    kinds = [scale, torch.tensor(scale).double(), torch.linspace(scale, 2 * scale, rows, dtype=torch.float64)]
    epilogue = draw(st.sampled_from(["none", "none", "margin_softmax", "info_nce"]))
    return inputs | {"scale": draw(st.sampled_from(kinds)), "epilogue": epilogue}


@on_every_kernel
@settings(max_examples=150)
@given(inputs=drawn_inputs(), dtype=st.sampled_from([torch.float64, torch.float32]))
def test_what_is_drawn_agrees(inputs, dtype, backend):
    assert cases.disagreements(OP, inputs, backend, dtype) == []


@on_every_kernel
@settings(max_examples=40)
@given(inputs=drawn_inputs(), seed=st.integers(0, 2**32))
def test_the_order_of_the_columns_does_not_matter(inputs, seed, backend):
    columns = inputs["y"].shape[0]
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(seed))
    place = torch.cat([order.argsort(), torch.tensor([-1])])  # -1 stays -1
    target = inputs["target"]
    inputs.setdefault("row_labels", target)
    inputs.setdefault("column_labels", torch.arange(columns))
    moved = {n: inputs[n][order] for n in ("y", "column_labels", "bias") if n in inputs}
    moved |= {n: place[inputs[n]] for n in ("target", "self_index") if n in inputs}
    expected = OP.run(inputs, backend)
    for name, value in OP.run(inputs | moved, backend).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-10)
