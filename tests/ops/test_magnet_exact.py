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


def test_one_cluster_far_from_all_others():
    """Rows of clusters in turn: the first rows of two blocks are of one cluster."""
    g = torch.Generator().manual_seed(0)
    clusters, cluster_labels = torch.arange(192) % 12, torch.arange(12) // 3
    x = torch.randn(12, 64, generator=g)[clusters] + torch.randn(192, 64, generator=g)
    x[clusters == 0] += 100
    ours, reference = errors(x, clusters, cluster_labels, alpha=50.0)
    for got, allowed in zip(ours, reference):
        assert got <= 2 * allowed + 1e-6


@pytest.mark.parametrize("spread", [100.0, 1000.0])
def test_collapsed_clusters_far_apart_have_no_loss(spread):
    """Logits of 1e9 and more: the nearest impostor's exponential is 1, however its logit was rounded."""
    clusters, cluster_labels = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1])
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        x = (torch.randn(2, 64, generator=g) * spread)[clusters].requires_grad_()
        loss = magnet(x, clusters, cluster_labels, backend="cpu", alpha=1.0)
        loss.backward()
        assert loss == 0
        assert not x.grad.any()
