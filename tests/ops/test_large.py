"""More similarities than 32 bits count: the first rows, the last ones and some between are those of a small problem."""

import pytest
import torch
from fused_margins.ops.draw import draw
from fused_margins.ops.draw.reference import exponentials, log_weight
from fused_margins.ops.similarity import unit_rows
from torch import Tensor

from fused_margins.ops import registry
from fused_margins.ops.contrast import contrast
from fused_margins.ops.margin_softmax import margin_softmax
from fused_margins.ops.nearest import nearest
from fused_margins.ops.scores import scores

SIDE = 46_400  # its square is more than 2^31
PICKED = torch.tensor([0, 7, SIDE // 2, SIDE - 2, SIDE - 1])


def backends(op: str) -> list[str]:
    return [b.name for b in registry.BACKENDS if b.name != "reference" and registry._HAS_KERNEL[op, b.name]]


def points(count: int, seed: int, device: str) -> Tensor:
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed)).to(device)


def of_picked(count: int, picked: Tensor) -> Tensor:
    """An incoming gradient of these rows alone."""
    return torch.zeros(count).index_fill_(0, picked, 1.0)


@pytest.mark.parametrize("backend", backends("contrast"))
def test_contrast(backend, device_for):
    device = device_for("contrast", backend)
    x, y = (points(SIDE, seed, device).requires_grad_() for seed in (0, 1))
    target, picked, incoming = torch.arange(SIDE, device=device), PICKED.to(device), of_picked(SIDE, PICKED).to(device)
    outputs = contrast(x, y, target, scale=4.0, backend=backend)
    grads = torch.autograd.grad(outputs, (x, y), (incoming, incoming))
    few, all_columns = x.detach()[picked].double().requires_grad_(), y.detach().double().requires_grad_()
    expected = contrast(few, all_columns, picked, scale=4.0, backend="reference")
    of_few, of_columns = torch.autograd.grad([t.sum() for t in expected], (few, all_columns))
    for got, truth in zip(outputs, expected):
        torch.testing.assert_close(got[picked].double(), truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grads[0][picked].double(), of_few, rtol=1e-4, atol=1e-4)
    assert not grads[0][incoming == 0].any()
    torch.testing.assert_close(grads[1].double(), of_columns, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("backend", backends("nearest"))
def test_nearest(backend, device_for):
    device = device_for("nearest", backend)
    x, labels, picked = points(SIDE, 0, device), torch.arange(SIDE, device=device) // 4, PICKED.to(device)
    options = {"relation": "same" if backend == "cuda" else "different", "similarity": "negative_squared_euclidean"}
    _, index = nearest(x, x, labels, labels, self_index=torch.arange(SIDE, device=device), backend=backend, **options)
    _, expected = nearest(x[picked], x, labels[picked], labels, self_index=picked, backend="reference", **options)
    assert torch.equal(index[picked], expected)


@pytest.mark.parametrize("backend", backends("draw"))
def test_draw(backend, device_for):
    device = device_for("draw", backend)
    x, labels = points(SIDE, 0, device), torch.arange(SIDE, device=device)
    seed = torch.tensor(11, device=device)
    index = draw(x, x, labels, labels, seed, backend=backend)
    for i in PICKED.tolist():
        weight = log_weight(2 - 2 * unit_rows(x.double()) @ unit_rows(x[i].double()), 2)
        number = weight - exponentials(i, 1, SIDE, seed, torch.float64)[0].log()
        number[i] = -torch.inf
        torch.testing.assert_close(number[index[i]], number.max(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("backend", [name for name in backends("scores") if name != "cpu"])  # gigabytes
def test_scores(backend, device_for):
    device = device_for("scores", backend)
    x, y = (points(SIDE, seed, device).half().requires_grad_() for seed in (0, 1))
    picked, incoming = PICKED.to(device), of_picked(SIDE, PICKED).to(device).half()
    z = scores(x, y, similarity="dot", backend=backend)
    grads = torch.autograd.grad(z, (x, y), incoming[:, None].expand_as(z))
    few, all_columns = x.detach()[picked].double().requires_grad_(), y.detach().double().requires_grad_()
    expected = few @ all_columns.T
    of_few, of_columns = torch.autograd.grad(expected.sum(), (few, all_columns))
    torch.testing.assert_close(z[picked].double(), expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(grads[0][picked].double(), of_few, rtol=1e-2, atol=1.0)
    torch.testing.assert_close(grads[1].double(), of_columns, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("backend", [name for name in backends("margin_softmax") if name == "cuda"])
def test_rows_of_few_classes(backend, device_for):
    """The others' are `contrast`'s."""
    device = device_for("margin_softmax", backend)
    rows, classes = 2**21 + 1000, 1024
    x, y = points(rows, 0, device).requires_grad_(), points(classes, 1, device).requires_grad_()
    target, picked = torch.arange(rows, device=device) % classes, torch.tensor([0, 2**20, rows - 2, rows - 1])
    incoming, picked = of_picked(rows, picked).to(device), picked.to(device)
    loss = margin_softmax(x, y, target, scale=4.0, margin=0.2, reduction="none", backend=backend)
    grads = torch.autograd.grad(loss, (x, y), incoming)
    few, weight = x.detach()[picked].double().requires_grad_(), y.detach().double().requires_grad_()
    expected = margin_softmax(few, weight, target[picked], scale=4.0, margin=0.2, reduction="none", backend="reference")
    of_few, of_weight = torch.autograd.grad(expected.sum(), (few, weight))
    torch.testing.assert_close(loss[picked].double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grads[0][picked].double(), of_few, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grads[1].double(), of_weight, rtol=1e-3, atol=1e-5)
