"""First and second derivatives against finite differences, through torch.func, and where parts of them are missing."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fused_margins.ops import cases
from fused_margins.ops.cases import Inputs
from tests.ops.suite.problems import (
    DIFFERENTIABLE,
    OPS,
    device_of,
    make,
    options_in_pairs,
    pairs,
    refusal,
    representatives,
    richest,
    small,
    variables,
)

PAIRS = pairs(DIFFERENTIABLE)
WITH_REFERENCE = pairs(DIFFERENTIABLE, reference=True)
each_pair = pytest.mark.parametrize(("op", "backend"), PAIRS)


def function_of(op: str, inputs: Inputs, backend: str) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    """The op as a function of its differentiable tensors alone, with 0 in place of infinities; and those tensors."""
    names = variables(op, inputs)
    with_itself = inputs["x"] is inputs.get("y")
    if with_itself:
        names.remove("y")

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, tensors))
        if with_itself:
            given["y"] = given["x"]
        return tuple(t.where(t.isfinite(), 0.0) for t in OPS[op].run(inputs | given, backend).values())

    return function, [inputs[n].detach().clone().requires_grad_() for n in names]


def richest_of(op: str, backend: str) -> Inputs:
    return make(richest(op, backend), device=device_of(backend))


def backwards_of(outputs: list[Tensor], variables: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients under incoming ones that are the same at every call; rows without a finite output have none."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.rand(t.shape, generator=generator).to(t).where(t.isfinite(), 0.0) for t in outputs]
    return torch.autograd.grad(outputs, variables, weights, materialize_grads=True)


@pytest.mark.parametrize(
    ("op", "case"),
    [pytest.param(n, c, id=f"{n}-{c.name}") for n in DIFFERENTIABLE for c in OPS[n].CASES if c.smooth],
)
def test_first_derivatives_of_every_case(op, case):
    """Random projections of the Jacobian of the definition, which every backend agrees with."""
    function, tensors = function_of(op, make(case), "reference")
    assert gradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize(
    ("op", "backend", "case"),
    [
        pytest.param(n, b, c, id=f"{n}-{c.name}-{b}")
        for n, b in PAIRS
        for c in representatives(n, b)
        if c.smooth
    ],
)  # fmt: skip
def test_second_derivatives(op, case, backend):
    function, tensors = function_of(op, make(case, device=device_of(backend)), backend)
    assert gradcheck(function, tensors, fast_mode=True)
    assert gradgradcheck(function, tensors, fast_mode=True)


SMALL = [
    pytest.param(op, options, n % 2 == 1, id="-".join([op, *(o.name.lower() for o in options.values())]))
    for op in DIFFERENTIABLE
    for n, options in enumerate(options_in_pairs(op))
]


@pytest.mark.parametrize("backend", sorted({b for _, b in PAIRS}))
@pytest.mark.parametrize(("op", "options", "single"), SMALL)
def test_every_entry_of_the_derivatives(op, options, single, backend):
    """Of a small problem with everything that has a gradient, under every option, with a scale for all or each row."""
    inputs = cases.convert(small(op, single=single, **options), torch.float64, device_of(backend))
    if (op, backend) not in PAIRS or refusal(op, inputs, backend):
        return
    function, tensors = function_of(op, inputs, backend)
    assert gradcheck(function, tensors)
    assert gradgradcheck(function, tensors, fast_mode=True)  # of the definition's formulas: a projection will do


@each_pair
def test_each_variable_alone(op, backend):
    """A gradient is the same whichever others are asked for: each alone, and all but one."""
    for case in representatives(op, backend):
        inputs = make(case, device=device_of(backend))
        names = variables(op, inputs)
        if inputs["x"] is inputs.get("y"):
            continue
        leaves = {n: inputs[n].detach().requires_grad_() for n in names}
        outputs = list(OPS[op].run(inputs | leaves, backend).values())
        everything = dict(zip(names, backwards_of(outputs, list(leaves.values()))))
        for wanted in [*([n] for n in names), *([m for m in names if m != n] for n in names if len(names) > 2)]:
            some = {n: inputs[n].detach().requires_grad_() for n in wanted}
            outputs = list(OPS[op].run(inputs | some, backend).values())
            for name, grad in zip(wanted, backwards_of(outputs, list(some.values()))):
                torch.testing.assert_close(grad, everything[name], rtol=1e-12, atol=1e-12)


@each_pair
def test_fewer_gradients_than_the_forward_saved_for(op, backend):
    """One forward; its backward for each variable alone."""
    inputs = richest_of(op, backend)
    leaves = {n: inputs[n].detach().requires_grad_() for n in variables(op, inputs)}
    outputs = list(OPS[op].run(inputs | leaves, backend).values())
    weights = [torch.ones_like(t) for t in outputs]
    together = torch.autograd.grad(outputs, list(leaves.values()), weights, retain_graph=True)
    for leaf, expected in zip(leaves.values(), together):
        (grad,) = torch.autograd.grad(outputs, leaf, weights, retain_graph=True)
        torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-12)


@each_pair
def test_undefined_incoming_gradients_are_zero(op, backend):
    """Of several outputs only one is used."""
    for case in representatives(op, backend):
        inputs = make(case, device=device_of(backend))
        names = variables(op, inputs)
        leaf_of = {id(inputs[n]): inputs[n].detach().requires_grad_() for n in names}
        leaves = {n: leaf_of[id(inputs[n])] for n in names}
        outputs = list(OPS[op].run(inputs | leaves, backend).values())
        if len(outputs) == 1 or not inputs["x"].numel():
            continue
        for used in outputs:
            weights = torch.linspace(-1, 1, used.numel()).to(used).view(used.shape).where(used.isfinite(), 0.0)
            incoming = [weights if t is used else torch.zeros_like(t) for t in outputs]
            of_leaves = list(leaf_of.values())
            grads = torch.autograd.grad(used, of_leaves, weights, retain_graph=True, materialize_grads=True)
            expected = torch.autograd.grad(outputs, of_leaves, incoming, retain_graph=True, materialize_grads=True)
            assert all(torch.equal(a, b) for a, b in zip(grads, expected))
            assert any(grad.any() for grad in grads) or not weights.any()


@pytest.mark.parametrize(("op", "backend"), WITH_REFERENCE)
def test_functional_transforms(op, backend):
    """torch.func.grad, once and twice, is autograd's."""
    function, tensors = function_of(op, richest_of(op, backend), backend)

    def loss(*tensors: Tensor) -> Tensor:
        return sum(t.square().sum() for t in function(*tensors))

    plain = tuple(t.detach() for t in tensors)
    places = tuple(range(len(tensors)))
    first = torch.autograd.grad(loss(*tensors), tensors, create_graph=True)
    torch.testing.assert_close(torch.func.grad(loss, places)(*plain), tuple(t.detach() for t in first))

    def curvature(x: Tensor) -> Tensor:
        return torch.func.grad(loss)(x, *plain[1:]).square().sum()

    (second,) = torch.autograd.grad(first[0].square().sum(), tensors[0])
    torch.testing.assert_close(torch.func.grad(curvature)(plain[0]), second)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # of torch.func.jvp, by torch
@pytest.mark.parametrize(("op", "backend"), WITH_REFERENCE)
def test_forward_mode(op, backend):
    """A directional derivative agrees with the gradients of reverse mode."""
    function, tensors = function_of(op, richest_of(op, backend), backend)
    g = torch.Generator().manual_seed(2)
    directions = [torch.randn(t.shape, generator=g, dtype=torch.float64).to(t) for t in tensors]
    values, derivatives = torch.func.jvp(function, tuple(t.detach() for t in tensors), tuple(directions))
    outputs = function(*tensors)
    for value, derivative, output in zip(values, derivatives, outputs):
        torch.testing.assert_close(value, output.detach())
        weights = torch.randn(output.shape, generator=g, dtype=torch.float64).to(output)
        grads = torch.autograd.grad(output, tensors, weights, retain_graph=True, materialize_grads=True)
        along = sum((grad * direction).sum() for grad, direction in zip(grads, directions))
        torch.testing.assert_close((weights * derivative).sum(), along)


@each_pair
def test_batched_gradients(op, backend):
    """A whole Jacobian in one backward is the one that is made row by row."""
    inputs = richest_of(op, backend)
    x = inputs["x"]

    def function(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.reshape(-1)[:50] for t in OPS[op].run(inputs | {"x": x}, backend).values())

    expected = torch.autograd.functional.jacobian(function, x)
    for got, row_by_row in zip(torch.autograd.functional.jacobian(function, x, vectorize=True), expected):
        torch.testing.assert_close(got, row_by_row)


@pytest.mark.parametrize(("op", "backend"), WITH_REFERENCE)
def test_a_second_derivative_holds_no_graph_unless_asked(op, backend):
    function, tensors = function_of(op, richest_of(op, backend), backend)
    for create_graph in (False, True):
        value = sum(t.square().sum() for t in function(*tensors))
        (first,) = torch.autograd.grad(value, tensors[0], create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), tensors[0], create_graph=create_graph)
        assert second.requires_grad == create_graph
    (third,) = torch.autograd.grad(second.sum(), tensors[0])
    assert third.isfinite().all()
    assert third.any()


@each_pair
def test_saved_tensors_may_move(op, backend):
    """Hooks that put what a forward saves elsewhere: the backward finds it wherever it is then."""
    for case in representatives(op, backend):
        for dtype in (torch.float32, torch.bfloat16):
            inputs = make(case, dtype, device_of(backend))
            expected = cases.evaluate(OPS[op], inputs, backend)
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t.clone()):
                got = cases.evaluate(OPS[op], inputs, backend)
            for name, value in expected.items():
                assert torch.equal(got[name], value), (case.name, name)


@each_pair
def test_outputs_may_change_before_the_backward(op, backend):
    """Losses of rows that are weighted in place: no output is a part of what is saved."""
    for case in representatives(op, backend):
        inputs = make(case, device=device_of(backend))
        names = variables(op, inputs)
        tensors = {n: inputs[n].detach().clone().requires_grad_() for n in names}
        found = []
        for changes in (False, True):
            outputs = [t for t in OPS[op].run(inputs | tensors, backend).values() if t.requires_grad]
            weights = [torch.ones_like(t).where(t.isfinite(), 0.0) for t in outputs]
            if changes:
                with torch.no_grad():
                    for t in outputs:
                        t.fill_(7.0)
            found.append(torch.autograd.grad(outputs, list(tensors.values()), weights, materialize_grads=True))
        for expected, got in zip(*found):
            assert torch.equal(got, expected), case.name
            assert got.storage_offset() == 0, case.name  # compiled graphs count on it


@each_pair
def test_an_input_that_changes_before_the_backward_is_an_error(op, backend):
    inputs = richest_of(op, backend)
    x = inputs["x"].detach().requires_grad_()
    own = x.clone()
    outputs = [t for t in OPS[op].run(inputs | {"x": own}, backend).values() if t.requires_grad]
    with torch.no_grad():
        own.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad([t.sum() for t in outputs], x)


@each_pair
def test_batches_of_gradients_are_refused_and_the_way_out_is_named(op, backend):
    function, tensors = function_of(op, richest_of(op, backend), backend)
    batches = [torch.stack([t.detach(), t.detach()]) for t in tensors]
    places = tuple(range(len(tensors)))

    def total(*variables):
        return sum(t.sum() for t in function(*variables))

    with pytest.raises(RuntimeError, match=f'{op}: expected no torch.vmap over gradients.*"reference" takes it'):
        torch.vmap(torch.func.grad(total, argnums=places))(*batches)
    function, _ = function_of(op, richest_of(op, backend), "reference")
    for got, t in zip(torch.vmap(torch.func.grad(total, argnums=places))(*batches), batches):
        assert got.shape == t.shape
