"""First and second derivatives against finite differences, through torch.func, and where parts of them are missing."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from fused_margins.ops.kept import BLOCK, SPARE_ROWS, kept_size
from fused_margins.ops.similarity import SIMILARITIES
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fused_margins.ops import cases, native, registry
from fused_margins.ops.cases import Inputs, OpCases
from fused_margins.ops.contrast import contrast
from fused_margins.ops.scores import scores

OPS = {name: op for name in registry.OPS if (op := cases.load(name)).DIFFERENTIABLE}
BACKENDS = [b.name for b in registry.BACKENDS]


def differentiable(op: OpCases, inputs: Inputs, backend: str) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    """The op as a function of its differentiable tensors alone, with 0 in place of infinities; and those tensors."""
    names = [n for n in op.DIFFERENTIABLE if isinstance(inputs.get(n), Tensor)]
    with_itself = inputs["x"] is inputs.get("y")
    if with_itself:
        names.remove("y")

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, tensors))
        if with_itself:
            given["y"] = given["x"]
        return tuple(t.where(t.isfinite(), 0.0) for t in op.run(inputs | given, backend).values())

    return function, [inputs[n].detach().clone().requires_grad_() for n in names]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("op", "case"),
    [pytest.param(n, c, id=f"{n}-{c.name}") for n, op in OPS.items() for c in op.CASES if c.smooth],
)
def test_first_and_second_derivatives_of_every_case(op, case, backend, device_for):
    device_for(op, backend)
    inputs = case.make(torch.Generator().manual_seed(0))
    function, tensors = differentiable(OPS[op], inputs, backend)
    # Random projections of the Jacobian; the small problems below are checked entry by entry.
    assert gradcheck(function, tensors, fast_mode=True)
    assert gradgradcheck(function, tensors, fast_mode=True)


def small_problem(op: str, similarity: str, scale: str) -> Inputs:
    """5 rows, 4 columns: one row ignored, one without an admitted column; every input that has a gradient."""
    g = torch.Generator().manual_seed(1)
    if op == "magnet":
        case = next(c for c in OPS[op].CASES if c.name == "batch-none")
        return case.make(g)
    x, y, bias, margin = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((5, 3), (4, 3), (4,), (5,)))
    target = torch.tensor([2, -1, 0, 3, 1])
    scales = {"single": torch.tensor(1.7), "rows": torch.linspace(0.5, 3, 5)}
    shared = {"x": x, "y": y, "similarity": similarity, "target": target, "scale": scales[scale].double(), "bias": bias}
    if op == "scores":
        return shared | {"margin": margin if scale == "rows" else margin[0]}
    if op == "margin_softmax":
        del shared["bias"]
        return shared | {"margin": margin if scale == "rows" else margin[0], "reduction": "none"}
    labels = {"row_labels": torch.tensor([0, 0, 1, 7, 1]), "column_labels": torch.tensor([0, 1, 1, 0])}
    return shared | labels | {"self_index": torch.tensor([1, -1, 0, 3, -1]), "relation": "same"}


@pytest.mark.parametrize("budget", ["kept", "recomputed"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("op", "similarity", "scale"),
    list(product(["contrast", "margin_softmax", "scores"], SIMILARITIES, ["single", "rows"])),
)
def test_every_entry_of_the_derivatives(op, similarity, scale, backend, budget, device_for, request):
    device_for(op, backend)
    if budget == "recomputed":
        request.getfixturevalue("no_memory_budget")
    function, tensors = differentiable(OPS[op], small_problem(op, similarity, scale), backend)
    assert len(tensors) == len(OPS[op].DIFFERENTIABLE)
    assert gradcheck(function, tensors)
    assert gradgradcheck(function, tensors)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_each_input_alone(op, backend, device_for):
    """A gradient is the same whichever others are asked for."""
    device_for(op, backend)
    inputs = small_problem(op, "cosine", "rows")
    everything = cases.evaluate(OPS[op], inputs, backend)
    for name in OPS[op].DIFFERENTIABLE:
        leaf = inputs[name].detach().requires_grad_()
        outputs = [t for t in OPS[op].run(inputs | {name: leaf}, backend).values() if t.requires_grad]
        generator = torch.Generator().manual_seed(0)
        incoming = [torch.randint(-64, 65, t.shape, generator=generator).to(t) / 64 for t in outputs]
        if op == "contrast" and name in ("scale", "bias"):
            assert len(outputs) == 2 or backend == "reference"  # positive depends on neither: zero, or not connected
            if len(outputs) == 1:
                continue
        (grad,) = torch.autograd.grad(outputs, leaf, incoming)
        torch.testing.assert_close(grad, everything[f"grad_{name}"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_memory_budget_changes_no_bit_of_a_gradient(dtype, similarity, backend, device_for, no_memory_budget):
    """At a scale that is no power of two: its products round, and whether they do before an addition shows."""
    device_for("contrast", backend)
    op = cases.load("contrast")
    found = next(c for c in op.CASES if c.name == "chunks")
    inputs = found.make(torch.Generator().manual_seed(0)) | {"similarity": similarity, "scale": 30.0}
    inputs = cases.convert(inputs, dtype)
    recomputed = cases.evaluate(op, inputs, backend)
    registry.set_memory_budget(2**30)
    kept = cases.evaluate(op, inputs, backend)
    assert kept.keys() == recomputed.keys()
    for name in kept:
        assert torch.equal(kept[name], recomputed[name]), name


def test_the_memory_budget_decides_what_is_kept(device_for, no_memory_budget):
    device_for("contrast", "cpu")
    x, y = torch.randn(6, 4), torch.randn(2 * BLOCK + 8, 4, requires_grad=True)

    def kept_blocks() -> int:
        sizes = []

        def pack(t: Tensor) -> Tensor:
            sizes.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            contrast(x, y, torch.arange(6), scale=3.0, backend="cpu")
        return next(blocks for blocks in range(4) if kept_size(6, y.shape[0], blocks) in sizes)

    block_bytes = 4 * (kept_size(6, y.shape[0], 1) - kept_size(6, y.shape[0], 0))
    assert kept_blocks() == 0
    registry.set_memory_budget(block_bytes - 1)
    assert kept_blocks() == 0
    registry.set_memory_budget(2 * block_bytes)
    assert kept_blocks() == 2
    registry.set_memory_budget(2**30)
    assert kept_blocks() == 3


def test_both_sides_agree_on_what_is_kept(device_for):
    device_for("contrast", "cpu")
    assert (BLOCK, SPARE_ROWS) == (native.module.CONTRAST_BLOCK, native.module.CONTRAST_SPARE_ROWS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("used", [0, 1])
def test_undefined_incoming_gradients_are_zero(backend, used, device_for):
    device_for("contrast", backend)
    inputs = small_problem("contrast", "cosine", "rows")
    leaves = {n: inputs[n].requires_grad_() for n in ("x", "y", "scale", "bias")}
    chosen = contrast(**inputs, backend=backend)[used]
    weights = torch.linspace(-1, 1, 5).double().where(chosen.isfinite(), 0.0)
    grads = torch.autograd.grad(chosen, list(leaves.values()), weights, materialize_grads=True)
    both = contrast(**inputs, backend=backend)
    zero = torch.zeros(5).double()
    incoming = (weights, zero) if used == 0 else (zero, weights)
    expected = torch.autograd.grad(both, list(leaves.values()), incoming, materialize_grads=True)
    for grad, other in zip(grads, expected):
        assert torch.equal(grad, other)
    assert any(grad.any() for grad in grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_functional_transforms(backend, device_for):
    device_for("scores", backend)
    inputs = small_problem("contrast", "cosine", "rows")
    x, rest = inputs["x"], {n: v for n, v in inputs.items() if n != "x"}

    def loss(x: Tensor) -> Tensor:
        positive, negative_lse = contrast(x, **rest, backend=backend)
        return positive.sum() + negative_lse[negative_lse.isfinite().nonzero()[:, 0]].sum()

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(x), expected)

    def curvature(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: scores(x, rest["y"], scale=2.0, backend=backend).square().sum())(x).sum()

    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(
        scores(leaf, rest["y"], scale=2.0, backend=backend).square().sum(), leaf, create_graph=True
    )
    (expected,) = torch.autograd.grad(first.sum(), leaf)
    torch.testing.assert_close(torch.func.grad(curvature)(x), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_at_the_edges_is_exactly_zero(backend, device_for):
    """Zero vectors under cosine, ignored rows, rows that admit nothing: 0, not NaN, and not nearly 0."""
    device_for("contrast", backend)
    x, y = torch.randn(4, 6), torch.randn(5, 6)
    x[1] = 0
    y[2] = 0
    x.requires_grad_()
    y.requires_grad_()
    target, ones = torch.tensor([0, 1, -1, 3]), torch.ones(4)
    labels = {"row_labels": torch.tensor([0, 0, 0, 9]), "column_labels": torch.tensor([0, 1, 0, 1, 9])}
    positive, negative_lse = contrast(x, y, target, **labels, relation="same", scale=20.0, backend=backend)
    assert positive[1:3].tolist() == [0, 0]
    assert negative_lse[2] == -torch.inf
    grad_x, grad_y = torch.autograd.grad((positive, negative_lse), (x, y), (ones, ones))
    assert not grad_x[1:3].any()
    assert not grad_y[2].any()
    assert grad_x[0].any()
    assert grad_x[3].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivative_at_a_distance_of_zero(backend, device_for):
    device_for("scores", backend)
    x = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    distances = -scores(x, x.detach(), similarity="negative_squared_euclidean", backend=backend).diagonal()
    (first,) = torch.autograd.grad(distances.sum(), x, create_graph=True)
    torch.testing.assert_close(first, torch.zeros_like(x), rtol=0, atol=1e-13)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, torch.full_like(x, 2.0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_a_second_derivative_holds_no_graph_unless_asked(op, backend, device_for):
    device_for(op, backend)
    function, tensors = differentiable(OPS[op], small_problem(op, "cosine", "rows"), backend)
    for create_graph in (False, True):
        value = sum(t.square().sum() for t in function(*tensors))
        (first,) = torch.autograd.grad(value, tensors[0], create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), tensors[0], create_graph=create_graph)
        assert second.requires_grad == create_graph
    (third,) = torch.autograd.grad(second.sum(), tensors[0])
    assert third.isfinite().all()
    assert third.any()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # of torch.func.jvp, by torch
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_forward_mode(op, backend, device_for):
    """A directional derivative agrees with the gradients of reverse mode."""
    device_for(op, backend)
    function, tensors = differentiable(OPS[op], small_problem(op, "cosine", "rows"), backend)
    g = torch.Generator().manual_seed(2)
    directions = [torch.randn(t.shape, generator=g, dtype=torch.float64) for t in tensors]
    values, derivatives = torch.func.jvp(function, tuple(t.detach() for t in tensors), tuple(directions))
    outputs = function(*tensors)
    for value, derivative, output in zip(values, derivatives, outputs):
        torch.testing.assert_close(value, output.detach())
        weights = torch.randn(output.shape, generator=g, dtype=torch.float64)
        grads = torch.autograd.grad(output, tensors, weights, retain_graph=True, materialize_grads=True)
        along = sum((grad * direction).sum() for grad, direction in zip(grads, directions))
        torch.testing.assert_close((weights * derivative).sum(), along)
