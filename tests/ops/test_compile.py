"""The registered ops keep torch's contract, and torch.compile takes them whole, forward and backward."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fused_margins.ops.labels import check_index, check_members
from torch import Tensor

from fused_margins.ops import cases, registry
from fused_margins.ops.contrast import contrast
from fused_margins.ops.nearest import nearest
from fused_margins.ops.scores import scores

# Of torch, by torch: Dynamo makes instances of the Functions that it traces, and Inductor uses TorchScript.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]

EXAMPLES = {
    "contrast": ("cosine-same", "scale-0d", "itself", "strided", "bias", "no-rows"),
    "draw": ("different", "itself", "strided", "no-columns"),
    "magnet": ("batch-mean", "batch-none", "strided", "int32", "no-rows"),
    "margin_softmax": ("cosine-mean", "dot-none", "scale-0d", "scale-rows", "angle+2-continuous", "strided", "no-rows"),
    "nearest": ("cosine-same", "itself-any", "below-cosine", "strided", "no-columns"),
    "scores": ("logits", "learnable-dot", "strided", "no-rows"),
}


def detached(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.detach() if isinstance(a, Tensor) else a for a in args)


class Recorder:
    """A kernel module that keeps what it is called with."""

    def __init__(self, module: Any) -> None:
        self.calls: dict[str, list[tuple[Any, ...]]] = {"forward": [], "backward": []}
        self.module = module

    def forward(self, *args: Any) -> Any:
        self.calls["forward"].append(detached(args))
        return self.module.forward(*args)

    def backward(self, *args: Any) -> Any:
        self.calls["backward"].append(detached(args))
        return self.module.backward(*args)


@pytest.fixture
def recorders(device_for) -> Iterator[SimpleNamespace]:
    """Watched CPU kernels of every op."""
    watched = {op: Recorder(registry.kernel(op, "cpu")) for op in registry.OPS if device_for(op, "cpu")}
    with (
        registry.substitute("contrast", "cpu", watched["contrast"]),
        registry.substitute("draw", "cpu", watched["draw"]),
        registry.substitute("magnet", "cpu", watched["magnet"]),
        registry.substitute("margin_softmax", "cpu", watched["margin_softmax"]),
        registry.substitute("nearest", "cpu", watched["nearest"]),
        registry.substitute("scores", "cpu", watched["scores"]),
    ):
        yield SimpleNamespace(**watched)


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, names in EXAMPLES.items() for name in names])
def test_ops_keep_the_contract(op, name, recorders):
    case = next(c for c in cases.load(op).CASES if c.name == name)
    inputs = cases.convert(case.make(torch.Generator().manual_seed(0)), torch.float32)
    cases.evaluate(cases.load(op), inputs, "cpu")
    calls = getattr(recorders, op).calls
    assert calls["forward"]
    torch.library.opcheck(getattr(torch.ops.fused_margins, op).default, (*calls["forward"][0], "cpu"))
    if calls["backward"]:
        backward = getattr(torch.ops.fused_margins, f"{op}_backward").default
        torch.library.opcheck(backward, (*calls["backward"][0], "cpu"))


def test_label_checks_keep_the_contract():
    index = torch.tensor([0, 2, -100, 1])
    torch.library.opcheck(torch.ops.fused_margins.check_index.default, (index, 3, -100, "target"))
    torch.library.opcheck(torch.ops.fused_margins.check_members.default, (torch.tensor([0, 1, 1]), 2))
    assert check_index(index, 3, -100, "target").tolist() == [0, 2, -1, 1]
    assert check_members(torch.tensor([0, 1, 1]), 2).tolist() == [1, 2]


def margin_softmax(x: Tensor, y: Tensor, target: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    positive, negative_lse = contrast(x, y, target, scale=scale, bias=bias, backend="cpu")
    return torch.nn.functional.softplus(negative_lse - scale * (positive - 0.3)).mean()


def info_nce(x: Tensor, y: Tensor, target: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """A batch against itself: one tensor on both sides, and labels twice."""
    labels = target % 3
    _, index = nearest(x, x, labels, labels, self_index=torch.arange(x.shape[0]), backend="cpu")
    chosen = index[:, 0].clamp(min=0)
    positive, negative_lse = contrast(x, x, chosen, labels, labels, scale=scale, backend="cpu")
    return (negative_lse - scale * positive).exp().log1p().mean() + 0 * (y.sum() + bias.sum())


def cross_entropy(x: Tensor, y: Tensor, target: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(
        scores(x, y, scale=scale, bias=bias, target=target, margin=0.2, backend="cpu"), target
    )


def arguments(rows: int, columns: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(rows)
    x, y, bias = (torch.randn(*s, generator=g) for s in ((rows, 16), (columns, 16), (columns,)))
    floating = [x, y, torch.tensor(8.0), bias]
    for t in floating:
        t.requires_grad_()
    return [x, y, torch.arange(rows) % columns, floating[2], bias]


def value_and_gradients(loss: Callable[..., Tensor], args: list[Tensor]) -> list[Tensor]:
    value = loss(*args)
    wanted = [t for t in args if t.requires_grad]
    return [value.detach(), *torch.autograd.grad(value, wanted, materialize_grads=True)]


LOSSES = {margin_softmax: {"contrast"}, info_nce: {"contrast"}, cross_entropy: {"scores"}}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_compiled_is_eager(loss, dynamic, recorders):
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic)
    sizes = [(12, 20), (15, 33), (7, 20)] if dynamic else [(12, 20)]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows, columns in sizes:
            args = arguments(rows, columns)
            expected = value_and_gradients(loss, args)
            before = {op: len(getattr(recorders, op).calls["backward"]) for op in LOSSES[loss]}
            got = value_and_gradients(compiled, args)
            # The kernel's own backward, once; the reference's formulas would leave these counts as they were.
            for op, count in before.items():
                assert len(getattr(recorders, op).calls["backward"]) == count + 1
            for a, b in zip(got, expected):
                torch.testing.assert_close(a, b)
                assert a.isfinite().all()


def test_a_bad_label_raises_from_a_compiled_graph(device_for):
    device_for("contrast", "cpu")
    torch.compiler.reset()
    compiled = torch.compile(margin_softmax, fullgraph=True, backend="aot_eager")
    args = arguments(12, 20)
    compiled(*args)
    args[2] = args[2].index_fill(0, torch.tensor([4]), 20)
    with pytest.raises(IndexError, match=r"target: expected values in \[0, 20\) or -1 \(ignored\), got 20 in row 4"):
        compiled(*args)
