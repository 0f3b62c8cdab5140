"""The magnet loss on a CPU is as exact as its definition where rounding has most to take: far away, in long sums."""

import pytest
import torch

from fused_margins.ops.magnet import magnet


def errors(x, clusters, cluster_labels, **options):
    """Relative errors of loss and gradient on cpu and reference in float32, against the reference in float64."""
    results = []
    for backend, t in (("cpu", x), ("reference", x), ("reference", x.double())):
        leaf = t.detach().clone().requires_grad_()
        loss = magnet(leaf, clusters, cluster_labels, backend=backend, **options)
        (gradient,) = torch.autograd.grad(loss, leaf)
        results.append((loss.detach().double(), gradient.double()))
    truth = results.pop()
    return [[float((a - b).norm() / b.norm()) for a, b in zip(got, truth)] for got in results]


@pytest.mark.parametrize("offset", [10.0, 1000.0])
def test_far_from_the_origin(offset):
    g = torch.Generator().manual_seed(0)
    clusters, cluster_labels = torch.arange(12).repeat_interleave(16), torch.arange(12) // 3
    x = torch.randn(12, 64, generator=g)[clusters] + torch.randn(192, 64, generator=g) + offset
    ours, reference = errors(x, clusters, cluster_labels, alpha=1.0)
    for got, allowed in zip(ours, reference):
        assert got <= 2 * allowed + 1e-7


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_many_rows(offset):
    g = torch.Generator().manual_seed(0)
    clusters, cluster_labels = torch.randint(12, (100_000,), generator=g), torch.arange(12) // 3
    x = torch.randn(100_000, 8, generator=g) + offset
    ours, reference = errors(x, clusters, cluster_labels, alpha=1.0)
    for got, allowed in zip(ours, reference):
        assert got <= 2 * allowed + 1e-6
