"""Bad input raises an error that names the argument, what was expected and what came; nothing is computed before."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fused_margins.backends import budget, registry
from fused_margins.core import indices
from fused_margins.core.indices import check_members, checked
from fused_margins.ops import fields as kinds
from fused_margins.ops.cases import convert
from tests.forks import Forked
from tests.ops.suite import hostile
from tests.ops.suite.problems import OPS, device_of, pairs, small

Bad = tuple[str, Any, type[Exception], str]


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def zeros_without_memory() -> torch.Tensor:
    return torch._efficientzerotensor((), dtype=torch.int64)


def bad_matrices(t: torch.Tensor, first: bool) -> list[Bad]:
    rows, width = t.shape
    found: list[Bad] = [
        ("list", [[1.0]], TypeError, "expected a tensor, got list"),
        ("none", None, TypeError, "expected a tensor, got NoneType"),
        ("rank-1", t[0], ValueError, rf"expected a matrix \(rows, width\), got shape \({width},\)"),
        ("rank-3", t[None], ValueError, rf"expected a matrix .* got shape \(1, {rows}, {width}\)"),
        ("integer", t.int(), TypeError, "expected a floating dtype .* got torch.int32"),
        ("complex", t + 0j, TypeError, "expected a floating dtype .* got torch.complex64"),
        ("sparse", t.to_sparse(), TypeError, "expected a dense tensor, got layout .*sparse"),
    ]
    if first:
        return found
    return [
        *found,
        ("width", torch.cat([t, t], 1), ValueError, f"expected width {width} as x has, got {2 * width}"),
        ("dtype", t.double(), TypeError, r".* x \(torch.float32\), got torch.float64"),
        ("half", t.half(), TypeError, r".* x \(torch.float32\), got torch.float16"),
        ("device", meta(rows, width), ValueError, r"expected the device of x \(cpu\), got meta"),
    ]


def bad_labels(size: int, of_another: bool, optional: bool) -> list[Bad]:
    shape = rf"\({size},\)"
    found: list[Bad] = [
        ("floating", torch.zeros(size), TypeError, "expected an integer dtype, got torch.float32"),
        ("bool", torch.zeros(size).bool(), TypeError, "expected an integer dtype, got torch.bool"),
        ("rank", torch.zeros(size, 1).long(), ValueError, rf"expected shape {shape}, got \({size}, 1\)"),
        ("device", meta(size, dtype=torch.int64), ValueError, "expected device cpu, got meta"),
        ("sparse", torch.ones(size).long().to_sparse(), TypeError, "expected a dense tensor, got layout"),
    ]
    if of_another:
        found += [
            ("list", [0] * size, TypeError, f"expected an integer tensor of shape {shape}, got list"),
            ("length", torch.arange(size + 1), ValueError, rf"expected shape {shape}, got \({size + 1},\)"),
        ]
        found += [] if optional else [("none", None, TypeError, f"expected an integer tensor of shape {shape}")]
    return found


def bad_values(op: str, name: str, field: Any, inputs: dict[str, Any]) -> list[Bad]:
    """Values that a field does not take."""
    shell: Any = registry.OPS[op]
    index, optional = list(shell.fields).index(name), name in shell.optional
    if isinstance(field, kinds.Embeddings):
        return bad_matrices(inputs[name], first=index == 0)
    of_another = bool(field.axes) and shell.sizes.get(field.axes[0], (-1, 0))[0] != index
    size = {"rows": inputs["x"].shape[0]}.get(field.axes[0] if field.axes else "", 0)
    if field.axes and size == 0:
        size = len(inputs[name]) if name in inputs else len(inputs["y"])
    if isinstance(field, kinds.Labels):
        return bad_labels(size, of_another, optional)
    if isinstance(field, kinds.Vector):
        shape = rf"\({size},\)"
        return [
            ("number", 1.0, ValueError, f"expected a tensor of shape {shape}, got float"),
            ("length", torch.ones(size + 1), ValueError, rf"expected a tensor of shape {shape}, got \({size + 1},\)"),
            ("integer", torch.ones(size).long(), TypeError, "expected a floating dtype, got torch.int64"),
            ("device", meta(size), ValueError, "expected device cpu, got meta"),
        ]
    if isinstance(field, kinds.RowFactor):
        expected = rf"expected a number, a 0-d tensor or shape \({size},\)"
        positive = [(f"{v}", v, ValueError, f"expected a positive number, got {v}") for v in (0.0, -1.0, torch.nan)]
        return [
            ("length", torch.ones(size + 1), ValueError, rf"{expected}, got \({size + 1},\)"),
            ("rank", torch.ones(size, 1), ValueError, rf"{expected}, got \({size}, 1\)"),
            ("integer", torch.ones(size).long(), TypeError, "expected a floating dtype, got torch.int64"),
            ("device", meta(size), ValueError, "expected device cpu, got meta"),
            *(
                (type(v).__name__, v, TypeError, f"expected a number or a tensor, got {type(v).__name__}")
                for v in ("3", None, [1.0], True)
            ),
            *(positive if field.positive else []),
        ]
    if isinstance(field, kinds.Seed):
        return [
            ("number", 3, TypeError, "expected a 0-d integer tensor, got int"),
            ("floating", torch.tensor(0.5), TypeError, "expected an integer dtype, got torch.float32"),
            ("rank", torch.tensor([3]), ValueError, r"expected a 0-d tensor, got shape \(1,\)"),
            ("sparse", torch.tensor(3).to_sparse(), TypeError, "expected a dense tensor, got layout"),
            ("zero", zeros_without_memory(), TypeError, "expected a dense tensor, got zeros without memory"),
            ("device", meta(dtype=torch.int64), ValueError, "expected device cpu, got meta"),
        ]
    if isinstance(field, kinds.Values):
        return [
            ("list", [[1.0]], ValueError, "expected a (floating matrix, got list|tensor with)"),
            ("integer", torch.ones(2, 2).long(), ValueError, "expected a floating matrix, got .* of torch.int64"),
            ("rank", torch.ones(2), ValueError, "expected a floating matrix, got"),
            ("device", meta(2, 2), ValueError, "expected device cpu, got meta"),
        ]
    if isinstance(field, kinds.Choice):
        names = ", ".join(map(repr, field.options.names()))
        return [
            (f"{v}", v, ValueError, f"expected one of {re.escape(names)}, got {v!r}")
            for v in ("unknown", field.options.names()[0].upper(), None)
        ]
    if isinstance(field, kinds.Integer):
        found: list[Bad] = [(f"{v}", v, TypeError, f"expected an integer, got {v!r}") for v in (None, 1.5, True, "1")]
        found.append(("large", 2**64, ValueError, "expected an integer of 64 bits"))
        if field.low > -(2**63):
            found.append(("low", field.low - 1, ValueError, f"expected at least {field.low}, got {field.low - 1}"))
        if field.high < 2**63 - 1:
            found.append(("high", field.high + 1, ValueError, f"expected at most {field.high}, got {field.high + 1}"))
        return found
    if isinstance(field, kinds.Number):
        return [
            (type(v).__name__, v, TypeError, f"expected a number, got {type(v).__name__}")
            for v in (torch.ones(()), "1", None, True)
        ]
    if isinstance(field, kinds.Flag):
        return [(f"{v}", v, TypeError, f"expected True or False, got {v!r}") for v in ("no", 1, None)]
    raise AssertionError(f"a kind of field without bad values: {field}")


def problem(op: str) -> dict[str, Any]:
    return convert(small(op, rows=9, columns=6, width=4), torch.float32)


BAD = [
    pytest.param(op, {name: value}, error, f"^{name}: {message}", id=f"{op}-{name}-{what}")
    for op, shell in registry.OPS.items()
    for name, field in shell.fields.items()  # type: ignore[attr-defined]
    for what, value, error, message in bad_values(op, name, field, problem(op))
]


@pytest.mark.parametrize(("op", "change", "error", "message"), BAD)
def test_every_field_says_what_it_takes(op: str, change: dict[str, Any], error: type[Exception], message: str) -> None:
    def must_not_run(*args: Any) -> None:
        raise AssertionError("a kernel ran")

    kernels = SimpleNamespace(can_run=lambda problem: None, forward=must_not_run, backward=must_not_run)
    with registry.substitute(op, "cpu", kernels), pytest.raises(error, match=message):
        OPS[op].run(problem(op) | change, "auto")


@pytest.mark.parametrize("op", OPS)
def test_what_is_no_field(op):
    with pytest.raises(ValueError, match=r"^backend: expected one of 'auto', .*'reference', got 'gpu'"):
        OPS[op].run(problem(op), "gpu")
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        OPS[op].run(problem(op) | {"colour": 3}, "auto")
    without_data = {n: v.to("meta") if isinstance(v, torch.Tensor) else v for n, v in problem(op).items()}
    with pytest.raises(TypeError, match="x: expected a tensor with data, got one on the meta device"):
        OPS[op].run(without_data, "auto")


@pytest.mark.parametrize(("op", "backend"), pairs(reference=True))
def test_zeros_without_memory_are_zeros(op, backend):
    """As torch makes them of derivatives that are 0."""
    if device_of(backend) != "cpu":
        return
    inputs = problem(op)
    zeros = torch._efficientzerotensor(inputs["x"].shape)
    expected = OPS[op].run(inputs | {"x": torch.zeros_like(inputs["x"])}, backend)
    for name, value in OPS[op].run(inputs | {"x": zeros}, backend).items():
        assert torch.equal(value, expected[name])


def test_no_direct_call_ends_the_interpreter():
    """Whatever the registered ops are handed, they return or raise: see `tests.ops.suite.hostile`."""
    code, printed = Forked(hostile.main).result(300)
    assert code == 0, f"exit {code}\n{printed[-2000:]}"
    last = printed.splitlines()[-1]
    assert re.fullmatch(r"done: \d{4,} calls of \d+ ops, \d{3,} refused", last), printed[-2000:]


def test_clusters_without_members():
    assert check_members(torch.tensor([2, 0, 1, 0]), 3).tolist() == [2, 1, 1]
    for op in (lambda t: torch.ops.fused_margins.check_index(t, 3, -1, "index"), lambda t: check_members(t, 3)):
        for t in (torch.tensor([0.5, 1]), torch.tensor([1j]), torch.tensor([0]).to_sparse()):
            with pytest.raises(TypeError, match=r"^(index|clusters): expected a dense integer vector"):
                op(t)
        with pytest.raises(ValueError, match=r"^(index|clusters): expected a vector, got shape \(1, 2\)"):
            op(torch.tensor([[0, 7]]))
    with pytest.raises(ValueError, match=r"^num_clusters: expected at least 0, got -1"):
        check_members(torch.tensor([0]), -1)
    with pytest.raises(ValueError, match="clusters: every one of the 4 clusters needs a member, cluster 1 has none"):
        check_members(torch.tensor([2, 0, 3, 0]), 4)
    with pytest.raises(IndexError, match=r"clusters: expected values in \[0, 3\) .* got 3 in row 2"):
        check_members(torch.tensor([2, 0, 3, 0]), 3)


def test_checked_holds_within_its_context_only():
    with pytest.raises(KeyError), checked():
        raise KeyError(indices.raises_everywhere())
    assert not indices.raises_everywhere()
    with checked():
        assert indices.raises_everywhere()
        with checked(False):
            assert not indices.raises_everywhere()
        assert indices.raises_everywhere()


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ("1e6", TypeError),
        (None, TypeError),
        (True, TypeError),
        (torch.inf, TypeError),
        (1.5, TypeError),
        (-1, ValueError),
    ],
)
def test_a_memory_budget_is_an_integer(value, error):
    before = budget.memory_budget()
    with pytest.raises(error, match="num_bytes: expected "):
        budget.set_memory_budget(value)
    assert budget.memory_budget() == before


@pytest.mark.parametrize("op", OPS)
def test_a_direct_call_of_tensors_with_and_without_data_is_refused(op):
    """torch takes the implementation without data, whose outputs nobody writes."""
    shell: Any = registry.OPS[op]
    a = shell.checked(shell.arguments(**problem(op)))
    for i, (name, value) in enumerate(zip(shell.fields, a)):
        if i and isinstance(value, torch.Tensor):
            with pytest.raises(ValueError, match=f"^{name}: expected device cpu, got meta"):
                shell.registered(*shell.flat(a._replace(**{name: value.to("meta")})), 0, "cpu")


@pytest.mark.parametrize("op", [op for op in OPS if registry.OPS[op].differentiable])
def test_a_direct_backward_of_sparse_gradients_is_refused(op):
    shell: Any = registry.OPS[op]
    a = shell.checked(shell.arguments(**problem(op)))
    backend = registry.resolve("auto", shell.problem(a))
    if backend == "reference":  # without kernels there is no direct backward
        return
    *outputs, saved = shell.registered(*shell.flat(a), 1, backend)
    grads = [t.to_sparse() if out.given(a) else None for t, out in zip(outputs, shell.results.values())]
    with pytest.raises(TypeError, match=r"^grad_\w+: expected a dense tensor, got layout torch.sparse_coo"):
        shell.registered_backward(*grads, *shell.flat(a), saved, 1, 1, backend)
