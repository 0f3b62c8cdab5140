"""Own cosines and sums of all: the gradients written by hand against the definition, to second order, and edges."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from fused_margins.core import cosine_sums as module
from fused_margins.core.cosine_sums import cosine_sums

B, N, D = 7, 5, 4


@pytest.fixture
def sides():
    g = torch.Generator().manual_seed(0)
    x, y, weight = (torch.randn(*size, generator=g, dtype=torch.float64) for size in ((B, D), (N, D), (N,)))
    return x, y, weight, torch.tensor([0, 3, 3, 1, 0, 3, 2])


def gradients(outputs, inputs, grads):
    return torch.autograd.grad(outputs, inputs, grads)


def test_values_and_gradients_are_those_of_the_definition(sides):
    *inputs, target = (t.requires_grad_(t.is_floating_point()) for t in sides)
    found, expected = cosine_sums(*inputs, target), module._defined(*inputs, target)
    assert "_CosineSums" in type(found[0].grad_fn).__name__
    torch.testing.assert_close(found, expected)
    grads = torch.randn(2, B, dtype=torch.float64).unbind()
    torch.testing.assert_close(gradients(found, inputs, grads), gradients(expected, inputs, grads))
    for one in ((grads[0], 0 * grads[1]), (0 * grads[0], grads[1])):
        torch.testing.assert_close(
            gradients(cosine_sums(*inputs, target), inputs, one),
            gradients(module._defined(*inputs, target), inputs, one),
        )


def test_many_gradients_at_once(sides):
    *inputs, target = (t.requires_grad_(t.is_floating_point()) for t in sides)
    outputs, grads = cosine_sums(*inputs, target), torch.randn(2, 3, B, dtype=torch.float64).unbind()
    together = torch.autograd.grad(outputs, inputs, grads, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        alone = torch.autograd.grad(outputs, inputs, [grad[i] for grad in grads], retain_graph=True)
        torch.testing.assert_close([t[i] for t in together], list(alone))


def test_derivatives_of_first_and_second_order(sides):
    *inputs, target = (t.requires_grad_(t.is_floating_point()) for t in sides)
    assert gradcheck(lambda *t: cosine_sums(*t, target), inputs)
    assert gradgradcheck(lambda *t: cosine_sums(*t, target), inputs)


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
def test_one_gradient_alone(sides, needed):
    *inputs, target = sides
    inputs = [t.requires_grad_(of) for t, of in zip(inputs, needed)]
    wanted = [t for t in inputs if t.requires_grad]
    grads = torch.randn(2, B, dtype=torch.float64).unbind()
    of = [(output, grad) for output, grad in zip(module._defined(*inputs, target), grads) if output.requires_grad]
    expected = gradients([output for output, _ in of], wanted, [grad for _, grad in of])
    torch.testing.assert_close(gradients(cosine_sums(*inputs, target), wanted, grads), expected)
    assert gradgradcheck(lambda t: cosine_sums(*(t if u is wanted[0] else u for u in inputs), target), wanted)


@pytest.mark.parametrize("factor", [1e-160, 1e160, 0.0])
def test_lengths_far_from_one(sides, factor):
    x, y, weight, target = sides
    x[2] *= factor
    y[3] *= factor
    inputs = [t.requires_grad_() for t in (x, y, weight)]
    found, expected = cosine_sums(*inputs, target), module._defined(*inputs, target)
    torch.testing.assert_close(found, expected)
    grads = torch.randn(2, B, dtype=torch.float64).unbind()
    torch.testing.assert_close(gradients(found, inputs, grads), gradients(expected, inputs, grads))


def test_columns_made_of_the_rows(sides):
    """Prototypes: each side's gradient is its own, whichever way it is taken."""
    x, _, weight, target = sides
    x.requires_grad_()

    def value(*, of=cosine_sums):
        own, total = of(x, x[:N].square(), weight, target)
        return own.square().sum() + (own * total).sum()

    (once,) = torch.autograd.grad(value(), x)
    (again,) = torch.autograd.grad(value(), x, create_graph=True)
    (expected,) = torch.autograd.grad(value(of=module._defined), x, create_graph=True)
    torch.testing.assert_close((once, again), (expected, expected))
    second = [torch.autograd.grad(t.square().sum(), x)[0] for t in (again, expected)]
    torch.testing.assert_close(*second)
    graph = cosine_sums(x, x[:N].square(), weight, target)[1]
    (together,) = torch.autograd.grad(graph, x, torch.eye(B, dtype=torch.float64), is_grads_batched=True)
    alone = torch.autograd.functional.jacobian(lambda t: module._defined(t, t[:N].square(), weight, target)[1], x)
    torch.testing.assert_close(together, alone)


def test_under_vmap_and_without_columns_or_width(sides):
    x, y, weight, target = sides
    together = torch.stack([x, 2 * x]), torch.stack([y, -y])
    found = torch.func.vmap(lambda a, b: cosine_sums(a, b, weight, target))(*together)
    own, total = cosine_sums(x, y, weight, target)
    torch.testing.assert_close(found, (torch.stack([own, -own]), torch.stack([total, -total])))
    for nothing in ((x, y[:0], weight[:0]), (x[:, :0], y[:, :0], weight)):
        own, total = cosine_sums(*nothing, target)
        assert own.shape == total.shape == (B,)
        assert not total.any()
