"""The registered ops keep torch's contract, and torch.compile and torch.jit.trace take them whole."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_margins.backends import registry
from fused_margins.core.indices import check_index, check_members
from fused_margins.ops import cases
from fused_margins.ops.cases import Inputs
from fused_margins.ops.through_dispatcher import as_bits
from tests.ops.suite.problems import (
    DIFFERENTIABLE,
    OPS,
    checks_read_values,
    device_of,
    make,
    pairs,
    representatives,
    richest,
    variables,
)

# Of torch, by torch: Dynamo makes instances of the Functions that it traces, and Inductor uses TorchScript.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]
PAIRS = pairs()
OF_GRAPHS = [(op, backend) for op, backend in PAIRS if not checks_read_values(op)]


class Watched:
    """A kernel module that counts its backwards."""

    def __init__(self, module: Any) -> None:
        self.module, self.backwards = module, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def backward(self, *args: Any) -> Any:
        self.backwards += 1
        return self.module.backward(*args)


def registered_call(op: str, inputs: Inputs, backend: str) -> tuple[list[Any], list[Any] | None]:
    """Arguments of the registered forward and backward, all gradients needed."""
    shell: Any = registry.OPS[op]
    a = shell.checked(shell.arguments(**inputs))
    flat = shell.flat(a)
    needs = as_bits([isinstance(a[i], Tensor) for i in shell.differentiable])
    forward = [*flat, needs, backend]
    if not shell.differentiable:
        return forward, None
    *outputs, saved = shell.registered(*forward)
    grads = [torch.ones_like(t) if out.given(a) else None for t, out in zip(outputs, shell.results.values())]
    return forward, [*grads, *flat, saved, needs, needs, backend]


@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "gradients"])
@pytest.mark.parametrize(
    ("op", "backend", "case"),
    [pytest.param(op, b, c, id=f"{op}-{c.name}-{b}") for op, b in PAIRS for c in representatives(op, b)],
)
def test_ops_keep_the_contract(op, case, backend, gradients):
    """What takes long, a graph of any size, of the cases alone that first give such outputs."""
    if gradients and op not in DIFFERENTIABLE:
        return
    shell: Any = registry.OPS[op]
    call = registered_call(op, make(case, torch.float32, device_of(backend)), backend)[gradients]
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if case in with_outputs_of_their_own(op, backend):
        checks.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(shell.registered_backward if gradients else shell.registered, tuple(call), test_utils=checks)


@functools.cache
def with_outputs_of_their_own(op: str, backend: str) -> list[cases.Case]:
    """The richest case, and of the others the first with outputs of so many axes; Nones among them."""
    found = {}
    for case in [*([richest(op, backend)] if op in DIFFERENTIABLE else []), *representatives(op, backend)]:
        outputs = OPS[op].run(make(case, torch.float32, device_of(backend)), backend)
        found.setdefault(tuple((name, t.dim()) for name, t in outputs.items()), case)
    return list(found.values())


def test_label_checks_keep_the_contract():
    index = torch.tensor([0, 2, -100, 1])
    torch.library.opcheck(torch.ops.fused_margins.check_index.default, (index, 3, -100, "target"))
    torch.library.opcheck(torch.ops.fused_margins.check_members.default, (torch.tensor([0, 1, 1]), 2))
    assert check_index(index, 3, -100, "target").tolist() == [0, 2, -1, 1]
    assert check_members(torch.tensor([0, 1, 1]), 2).tolist() == [1, 2]


def call_of(op: str, case: cases.Case, device: str, backend: str) -> tuple[Callable[..., Any], list[Tensor]]:
    """A function of the tensors of a case, and those tensors; one that stands on both sides is given once."""
    inputs = make(case, torch.float32, device)
    names = [n for n, v in inputs.items() if isinstance(v, Tensor) and not (n == "y" and v is inputs["x"])]
    itself, rest = inputs["x"] is inputs.get("y"), {n: v for n, v in inputs.items() if not isinstance(v, Tensor)}

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, tensors))
        if itself:
            given["y"] = given["x"]
        outputs = OPS[op].run(rest | given, backend)
        return tuple(t.where(t.isfinite(), 0.0) if t.is_floating_point() else t for t in outputs.values())

    of_gradients = variables(op, inputs)
    return function, [inputs[n].requires_grad_() if n in of_gradients else inputs[n] for n in names]


def values_and_gradients(function: Callable[..., Any], tensors: list[Tensor]) -> list[Tensor]:
    outputs = function(*tensors)
    connected, leaves = [t for t in outputs if t.requires_grad], [t for t in tensors if t.requires_grad]
    if not connected:
        return list(outputs)
    loss = sum(t.square().sum() for t in connected)
    return [*(t.detach() for t in outputs), *torch.autograd.grad(loss, leaves, materialize_grads=True)]


def with_itself(op: str, backend: str) -> list[cases.Case]:
    """A batch against itself, which Dynamo sees as one tensor given twice; of the ops that take one."""
    return [c for c in representatives(op, backend) if make(c)["x"] is make(c).get("y")][:1]


@pytest.mark.parametrize(
    ("op", "backend", "case"),
    [
        pytest.param(op, b, c, id=f"{op}-{c.name}-{b}")
        for op, b in OF_GRAPHS
        for c in [richest(op, b), *with_itself(op, b)]
    ],
)
def test_a_whole_graph(op, backend, case):
    """In one graph, forward and backward, with the kernel's own backward and not the reference's formulas."""
    torch.compiler.reset()
    watched = Watched(registry.kernel(op, backend))
    function, tensors = call_of(op, case, device_of(backend), backend)
    compiled = torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager")
    with registry.substitute(op, backend, watched):
        expected = values_and_gradients(function, tensors)
        before = watched.backwards
        got = values_and_gradients(compiled, tensors)
    assert watched.backwards - before == before == (op in DIFFERENTIABLE)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b)


def fewer_rows(tensors: list[Tensor], fewer: int) -> list[Tensor]:
    """The first rows alone of everything that has as many rows as the first tensor."""
    rows = tensors[0].shape[0]
    parts = [t.detach()[slice(rows - fewer) if t.dim() and t.shape[0] == rows else ...].clone() for t in tensors]
    return [part.requires_grad_(t.requires_grad) for part, t in zip(parts, tensors)]


def takes_fewer_rows(op: str, backend: str) -> bool:
    """Whether the first rows of a call are a call: k-means is told the sizes of its classes."""
    function, tensors = call_of(op, richest(op, backend), device_of(backend), backend)
    try:
        function(*fewer_rows(tensors, 5))
    except (ValueError, IndexError):
        return False
    return True


@pytest.mark.parametrize(("op", "backend"), [pair for pair in OF_GRAPHS if takes_fewer_rows(*pair)])
def test_a_graph_of_any_size(op, backend):
    """Inductor's graph of dynamic sizes is compiled once for all batches."""
    torch.compiler.reset()
    function, tensors = call_of(op, richest(op, backend), device_of(backend), backend)
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for left_out in (0, 5, 8):
            fewer = fewer_rows(tensors, left_out)
            for a, b in zip(values_and_gradients(compiled, fewer), values_and_gradients(function, fewer)):
                torch.testing.assert_close(a, b)
                assert a.isfinite().all()


@pytest.mark.parametrize(("op", "backend"), [pair for pair in PAIRS if pair not in OF_GRAPHS])
def test_what_no_graph_holds_still_runs_compiled(op, backend):
    torch.compiler.reset()
    function, tensors = call_of(op, OPS[op].CASES[0], device_of(backend), backend)
    compiled = torch.compile(function, backend="aot_eager")
    for a, b in zip(compiled(*tensors), function(*tensors)):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(("op", "backend"), PAIRS)
def test_a_traced_graph_computes_what_was_traced(op, backend):
    function, tensors = call_of(op, richest(op, backend), device_of(backend), backend)
    x, *rest = (t.detach() for t in tensors)
    traced = torch.jit.trace(lambda x: function(x, *rest), x, check_trace=False)
    other = x.flip(0).contiguous()
    torch.testing.assert_close(traced(other), function(other, *rest))
