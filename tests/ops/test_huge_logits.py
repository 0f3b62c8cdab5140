"""Logits so large that their own rounding is 1 and more: the loss and its gradients are still the definition's."""

import pytest
import torch

from fused_margins.ops.margin_softmax import margin_softmax


@pytest.mark.parametrize("similarity", ["dot", "negative_squared_euclidean"])
@pytest.mark.parametrize("size", [1e3, 1e4, 5e4, 2e5])
def test_the_largest_exponential_is_one(similarity, size):
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 16, generator=g) * size for n in (64, 50))
    target = torch.randint(50, (64,), generator=g)
    results = []
    for backend in ("cpu", "reference"):
        leaves = x.clone().requires_grad_(), y.clone().requires_grad_()
        loss = margin_softmax(*leaves, target, scale=30.0, margin=0.1, similarity=similarity, backend=backend)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for got, expected in zip(*results):
        assert got.isfinite().all()
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))
