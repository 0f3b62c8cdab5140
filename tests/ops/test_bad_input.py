"""Bad input raises an error that names the argument, what was expected and what came; nothing is computed before."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fused_margins.ops.labels import INVALID, check_members, checked

from fused_margins.ops import cases, labels, registry
from fused_margins.ops.cases import Inputs
from fused_margins.ops.contrast import contrast
from fused_margins.ops.contrast import reference as contrast_reference

BACKENDS = [b.name for b in registry.BACKENDS]
B, N, D = 6, 9, 4
ALL = ("contrast", "draw", "nearest", "scores")


def valid(op: str) -> Inputs:
    inputs = {"x": torch.randn(B, D), "y": torch.randn(N, D)}
    labels = {"row_labels": torch.arange(B), "column_labels": torch.arange(N), "self_index": torch.arange(B)}
    if op == "nearest":
        return inputs | labels | {"below": torch.zeros(B)}
    if op == "draw":
        return inputs | labels | {"seed": torch.tensor(3)}
    inputs |= {"target": torch.arange(B), "scale": torch.ones(B)}
    if op == "margin_softmax":
        return inputs
    inputs["bias"] = torch.zeros(N)
    return inputs | (labels if op == "contrast" else {"margin": torch.zeros(B)})


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


INTEGER_ARGUMENTS = [
    *(("contrast", n) for n in ("target", "row_labels", "column_labels", "self_index")),
    *((op, n) for op in ("draw", "nearest") for n in ("row_labels", "column_labels", "self_index")),
    ("scores", "target"),
]
VECTORS = [("contrast", "bias"), ("nearest", "below"), ("scores", "bias")]
ROW_FACTORS = [("contrast", "scale"), ("scores", "scale"), ("scores", "margin")]


def size_of(argument: str) -> int:
    return N if argument in ("column_labels", "bias") else B


BEFORE_ANY_KERNEL = [
    *(
        pytest.param(op, {argument: value}, error, message, id=f"{op}-{argument}-{what}")
        for op in ALL
        for argument, what, value, error, message in [
            ("x", "list", [[1.0]], TypeError, "x: expected a tensor, got list"),
            ("y", "none", None, TypeError, "y: expected a tensor, got NoneType"),
            ("x", "rank", torch.randn(D), ValueError, r"x: expected a matrix \(rows, width\), got shape \(4,\)"),
            ("y", "rank", torch.randn(1, N, D), ValueError, r"y: expected a matrix .* got shape \(1, 9, 4\)"),
            ("x", "integer", torch.ones(B, D).int(), TypeError, "x: expected a floating dtype .* got torch.int32"),
            ("x", "complex", torch.ones(B, D) + 0j, TypeError, "x: expected a floating dtype .* got torch.complex64"),
            ("y", "width", torch.randn(N, D + 1), ValueError, "y: expected width 4 as x has, got 5"),
            ("y", "dtype", torch.randn(N, D).double(), TypeError, r"y: .* x \(torch.float32\), got torch.float64"),
            ("y", "half", torch.randn(N, D).half(), TypeError, r"y: .* x \(torch.float32\), got torch.float16"),
            ("y", "device", meta(N, D), ValueError, r"y: expected the device of x \(cpu\), got meta"),
            (
                "x",
                "sparse",
                torch.randn(B, D).to_sparse(),
                TypeError,
                "x: expected a dense tensor, got layout .*sparse",
            ),
            ("similarity", "unknown", "cosin", ValueError, "similarity: .*'cosine', 'dot', .*, got 'cosin'"),
            ("similarity", "type", None, ValueError, "similarity: .*, got None"),
            ("backend", "unknown", "gpu", ValueError, "backend: expected one of 'auto', .*'reference', got 'gpu'"),
        ]
        if (op, argument) != ("draw", "similarity")  # which has none
    ),
    *(
        pytest.param(op, {argument: value}, error, f"{argument}: {message}", id=f"{op}-{argument}-{what}")
        for op, argument in INTEGER_ARGUMENTS
        for size in [size_of(argument)]
        for what, value, error, message in [
            ("list", [0] * size, TypeError, rf"expected an integer tensor of shape \({size},\), got list"),
            ("floating", torch.zeros(size), TypeError, "expected an integer dtype, got torch.float32"),
            ("bool", torch.zeros(size).bool(), TypeError, "expected an integer dtype, got torch.bool"),
            ("length", torch.arange(size + 1), ValueError, rf"expected shape \({size},\), got \({size + 1},\)"),
            ("rank", torch.zeros(size, 1).long(), ValueError, rf"expected shape \({size},\), got \({size}, 1\)"),
            ("device", meta(size, dtype=torch.int64), ValueError, "expected device cpu, got meta"),
        ]
    ),
    *(
        pytest.param(op, {argument: value}, error, f"{argument}: {message}", id=f"{op}-{argument}-{what}")
        for op, argument in VECTORS
        for size in [size_of(argument)]
        for what, value, error, message in [
            ("number", 1.0, ValueError, rf"expected a tensor of shape \({size},\), got float"),
            (
                "length",
                torch.ones(size + 1),
                ValueError,
                rf"expected a tensor of shape \({size},\), got \({size + 1},\)",
            ),
            ("integer", torch.ones(size).long(), TypeError, "expected a floating dtype, got torch.int64"),
            ("device", meta(size), ValueError, "expected device cpu, got meta"),
        ]
    ),
    *(
        pytest.param(op, {argument: value}, error, f"{argument}: {message}", id=f"{op}-{argument}-{what}")
        for op, argument in ROW_FACTORS
        for what, value, error, message in [
            ("length", torch.ones(B + 1), ValueError, r"expected a number, a 0-d tensor or shape \(6,\), got \(7,\)"),
            ("rank", torch.ones(B, 1), ValueError, r"expected a number, a 0-d tensor or shape \(6,\), got \(6, 1\)"),
            ("integer", torch.ones(B).long(), TypeError, "expected a floating dtype, got torch.int64"),
            ("device", meta(B), ValueError, "expected device cpu, got meta"),
        ]
    ),
    *(
        pytest.param(
            op, {"scale": value}, ValueError, f"scale: expected a positive number, got {value}", id=f"{op}-{value}"
        )
        for op in ("contrast", "scores")
        for value in (0, 0.0, -1.0, float("nan"))
    ),
    *(
        pytest.param(
            op, {"relation": "equal"}, ValueError, "relation: .*'different', 'same', 'any', got 'equal'", id=op
        )
        for op in ("contrast", "draw", "nearest")
    ),
    *(
        pytest.param(op, {n: None}, TypeError, f"{n}: expected an integer tensor", id=f"{op}-{n}-none")
        for op in ("draw", "nearest")
        for n in ("row_labels", "column_labels")
    ),
    *(
        pytest.param("draw", {"seed": value}, error, f"seed: expected {message}", id=f"draw-seed-{message}")
        for value, error, message in (
            (3, TypeError, "a 0-d integer tensor, got int"),
            (torch.tensor(0.5), TypeError, "an integer dtype, got torch.float32"),
            (torch.tensor([3]), ValueError, r"a 0-d tensor, got shape \(1,\)"),
            (torch.tensor(3).to_sparse(), TypeError, "a dense tensor, got layout"),
            (torch._efficientzerotensor((), dtype=torch.int64), TypeError, "a dense tensor, got zeros without memory"),
            (meta(dtype=torch.int64), ValueError, "device cpu, got meta"),
        )
    ),
    pytest.param(
        "contrast", {"target": None}, TypeError, "target: expected an integer tensor", id="contrast-target-none"
    ),
    *(
        pytest.param("margin_softmax", options, error, message, id=f"margin_softmax-angle-{n}")
        for n, (options, error, message) in enumerate(
            (
                ({"angle_rad": torch.ones(())}, TypeError, "angle_rad: expected a number, got Tensor"),
                ({"angle_rad": 3.2}, ValueError, r"angle_rad: expected radians within \[-pi, pi\], got 3.2"),
                (
                    {"angle_rad": 0.5, "similarity": "dot"},
                    ValueError,
                    "similarity: expected 'cosine' with an angle_rad",
                ),
                ({"straight_through": "no"}, TypeError, "straight_through: expected True or False, got 'no'"),
                ({"beyond_pi": "never"}, ValueError, "beyond_pi: expected one of 'standard', 'continuous', 'easy'"),
            )
        )
    ),
    pytest.param("nearest", {"k": 0}, ValueError, "k: expected at least 1, got 0", id="nearest-k"),
]


@pytest.mark.parametrize(("op", "change", "error", "message"), BEFORE_ANY_KERNEL)
def test_shapes_dtypes_devices_and_names(op: str, change: dict[str, Any], error: type[Exception], message: str) -> None:
    def must_not_run(*args: Any) -> None:
        raise AssertionError("a kernel ran")

    kernels = SimpleNamespace(forward=must_not_run, backward=must_not_run)
    arguments = valid(op) | {"backend": "auto"} | change
    with registry.substitute(op, "cpu", kernels), pytest.raises(error, match=message):
        cases.load(op).run({n: v for n, v in arguments.items() if n != "backend"}, arguments["backend"])


@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "gradients"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("op", "argument"), [p for p in INTEGER_ARGUMENTS if p[1] in ("target", "self_index")], ids="-".join
)
@pytest.mark.parametrize("value", [N, -2, 2**40, -(2**63)])
def test_an_index_out_of_range_raises_before_anything_is_read(op, argument, value, backend, gradients, device_for):
    device_for(op, backend)
    inputs = valid(op)
    inputs[argument] = torch.tensor([0, 1, -1, 3, value, N])  # the first bad row is named, -1 is none
    inputs["x"].requires_grad_(gradients)
    with pytest.raises(IndexError) as raised:
        cases.load(op).run(inputs, backend)
    assert str(raised.value) == f"{argument}: expected values in [0, {N}) or -1 (ignored), got {value} in row 4"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["contrast", "scores"])
def test_another_ignore_index_makes_minus_one_an_error(op, backend, device_for):
    device_for(op, backend)
    inputs = valid(op) | {"target": torch.tensor([0, -100, -1, 0, 0, 0]), "ignore_index": -100}
    with pytest.raises(IndexError, match=r"target: .* or -100 \(ignored\), got -1 in row 2"):
        cases.load(op).run(inputs, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["contrast", "scores"])
@pytest.mark.parametrize("value", [0.0, -2.0, torch.nan])
@pytest.mark.parametrize("rows", [(), (B,)], ids=["single", "rows"])
def test_a_scale_that_is_not_positive(op, value, rows, backend, device_for):
    device_for(op, backend)
    scale = torch.ones(rows)
    scale.view(-1)[-1] = value
    with pytest.raises(ValueError, match="scale: expected positive values, got "):
        cases.load(op).run(valid(op) | {"scale": scale}, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_that_only_compare_may_have_any_value(backend, device_for):
    device_for("nearest", backend)
    extremes = torch.tensor([2**63 - 1, -(2**63), 0, 0, 0, 0])
    inputs = valid("nearest") | {"row_labels": extremes, "relation": "different", "self_index": None, "below": None}
    inputs["column_labels"] = torch.cat([extremes, extremes[:3]])
    assert cases.disagreements(cases.load("nearest"), inputs, backend, torch.float32) == []


def test_a_bad_row_is_not_a_number_where_checks_cannot_raise(monkeypatch):
    """As on a GPU: the check marks the row, and the reference turns the mark into NaN."""
    marked = torch.tensor([0, 1, INVALID, 3, 4, 5])
    monkeypatch.setattr(contrast_reference, "check_index", lambda *args: marked)
    positive, negative_lse = contrast(torch.randn(B, D), torch.randn(N, D), marked, scale=1.0, backend="reference")
    for values in (positive, negative_lse):
        assert values.isnan().tolist() == [False, False, True, False, False, False]


def test_clusters_without_members():
    assert check_members(torch.tensor([2, 0, 1, 0]), 3).tolist() == [2, 1, 1]
    with pytest.raises(ValueError, match="clusters: every one of the 4 clusters needs a member, cluster 1 has none"):
        check_members(torch.tensor([2, 0, 3, 0]), 4)
    with pytest.raises(IndexError, match=r"clusters: expected values in \[0, 3\) .* got 3 in row 2"):
        check_members(torch.tensor([2, 0, 3, 0]), 3)


def test_checked_holds_within_its_context_only():
    with pytest.raises(KeyError), checked():
        raise KeyError(labels._raise_everywhere)
    assert not labels._raise_everywhere
    with checked():
        assert labels._raise_everywhere
        with checked(False):
            assert not labels._raise_everywhere
        assert labels._raise_everywhere


@pytest.mark.parametrize("op", ALL)
def test_tensors_without_data(op):
    both = {"x": meta(B, D), "y": meta(N, D)}
    with pytest.raises(TypeError, match="x: expected a tensor with data, got one on the meta device"):
        cases.load(op).run(valid(op) | both, "auto")


def test_zeros_without_memory_are_zeros():
    zeros = torch._efficientzerotensor((B, D))
    got = cases.load("contrast").run(valid("contrast") | {"x": zeros}, "auto")["positive"]
    assert torch.equal(got, torch.zeros(B))


@pytest.mark.parametrize("value", [None, 1.5, True, "1"])
def test_integers(value):
    with pytest.raises(TypeError, match="ignore_index: expected an integer, got"):
        contrast(**valid("contrast"), ignore_index=value)
    with pytest.raises(TypeError, match="k: expected an integer, got"):
        cases.load("nearest").run(valid("nearest") | {"k": value}, "auto")
    with pytest.raises(TypeError, match="rows: expected an integer, got"):
        registry.explain(rows=value, columns=1, width=1)


@pytest.mark.parametrize(
    ("value", "error"), [("1e6", TypeError), (None, TypeError), (torch.inf, ValueError), (torch.nan, ValueError)]
)
def test_a_memory_budget_is_a_number(value, error):
    before = registry.memory_budget()
    with pytest.raises(error, match="num_bytes: expected "):
        registry.set_memory_budget(value)
    assert registry.memory_budget() == before
