"""The magnet loss: its formula, and on a CPU as exact as its definition where rounding has most to take."""

import math

import pytest
import torch
from torch import Tensor

from fused_margins.ops import cases
from fused_margins.ops.cases import Inputs
from fused_margins.ops.magnet import magnet
from tests.conftest import backends

OP = cases.load("magnet")
on_every_backend = pytest.mark.parametrize("backend", backends("magnet"))
on_every_kernel = pytest.mark.parametrize("backend", backends("magnet", reference=False))
on_cpu = pytest.mark.parametrize("backend", [b for b in backends("magnet") if b == "cpu"])


def by_hand(inputs: Inputs) -> Tensor:
    x, clusters, labels = inputs["x"].numpy(), inputs["clusters"].tolist(), inputs["cluster_labels"].tolist()
    means = [sum(row for row, own in zip(x, clusters) if own == m) / clusters.count(m) for m in range(len(labels))]
    distances = [[math.fsum((row - mean) ** 2) for mean in means] for row in x]
    own = [of_row[m] for of_row, m in zip(distances, clusters)]
    variance = max(math.fsum(own) / max(len(x) - 1, 1), inputs.get("variance_floor", 1e-4))
    losses = []
    for of_row, m, d in zip(distances, clusters, own):
        others = math.fsum(
            math.exp(-other / (2 * variance)) for k, other in enumerate(of_row) if labels[k] != labels[m]
        )
        losses.append(max(0.0, inputs["alpha"] + d / (2 * variance) + math.log(others)) if others else 0.0)
    values, reduction = torch.tensor(losses, dtype=torch.float64), inputs.get("reduction", "mean")
    return values if reduction == "none" else values.sum() / (len(x) or 1 if reduction == "mean" else 1)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in OP.CASES])
def test_the_definition_is_its_formula(case):
    inputs = case.make(torch.Generator().manual_seed(0))
    got = OP.run(inputs, "reference")["loss"]
    torch.testing.assert_close(got, by_hand(inputs), rtol=1e-11, atol=1e-11)


def errors(backend, x, clusters, cluster_labels, **options):
    """Relative errors of loss and gradient on a backend and reference in float32, against the reference in float64."""
    results = []
    for name, t in ((backend, x), ("reference", x), ("reference", x.double())):
        leaf = t.detach().clone().requires_grad_()
        loss = magnet(leaf, clusters, cluster_labels, backend=name, **options)
        (gradient,) = torch.autograd.grad(loss, leaf)
        results.append((loss.detach().double(), gradient.double()))
    truth = results.pop()
    return [[float((a - b).norm() / b.norm()) for a, b in zip(got, truth)] for got in results]


@pytest.mark.parametrize("offset", [10.0, 1000.0])
@on_cpu
def test_far_from_the_origin(offset, backend):
    g = torch.Generator().manual_seed(0)
    clusters, cluster_labels = torch.arange(12).repeat_interleave(16), torch.arange(12) // 3
    x = torch.randn(12, 64, generator=g)[clusters] + torch.randn(192, 64, generator=g) + offset
    ours, reference = errors(backend, x, clusters, cluster_labels, alpha=1.0)
    for got, allowed in zip(ours, reference):
        assert got <= 2 * allowed + 1e-7


@pytest.mark.parametrize("offset", [0.0, 30.0])
@on_cpu
def test_many_rows(offset, backend):
    g = torch.Generator().manual_seed(0)
    clusters, cluster_labels = torch.randint(12, (100_000,), generator=g), torch.arange(12) // 3
    x = torch.randn(100_000, 8, generator=g) + offset
    ours, reference = errors(backend, x, clusters, cluster_labels, alpha=1.0)
    for got, allowed in zip(ours, reference):
        assert got <= 2 * allowed + 1e-6


@on_cpu
def test_one_cluster_far_from_all_others(backend):
    """Rows of clusters in turn: the first rows of two blocks are of one cluster."""
    g = torch.Generator().manual_seed(0)
    clusters, cluster_labels = torch.arange(192) % 12, torch.arange(12) // 3
    x = torch.randn(12, 64, generator=g)[clusters] + torch.randn(192, 64, generator=g)
    x[clusters == 0] += 100
    ours, reference = errors(backend, x, clusters, cluster_labels, alpha=50.0)
    for got, allowed in zip(ours, reference):
        assert got <= 2 * allowed + 1e-6


@pytest.mark.parametrize("spread", [100.0, 1000.0])
@on_cpu
def test_collapsed_clusters_far_apart_have_no_loss(spread, backend):
    """Logits of 1e9 and more: the nearest impostor's exponential is 1, however its logit was rounded."""
    clusters, cluster_labels = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1])
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        x = (torch.randn(2, 64, generator=g) * spread)[clusters].requires_grad_()
        loss = magnet(x, clusters, cluster_labels, backend=backend, alpha=1.0)
        loss.backward()
        assert loss == 0
        assert not x.grad.any()


@on_every_backend
def test_the_infinite_gradient_of_a_loss_of_zero_is_no_gradient(backend, device_for):
    """That of its square root, say."""
    device = device_for("magnet", backend)
    x = torch.cat([torch.randn(6, 5), torch.randn(6, 5) + 100]).to(device).requires_grad_()
    clusters = torch.tensor([0] * 3 + [1] * 3 + [2] * 3 + [3] * 3, device=device)
    loss = magnet(x, clusters, torch.tensor([0, 0, 1, 1], device=device), alpha=3.0, reduction="none", backend=backend)
    assert (loss == 0).any()
    (grad,) = torch.autograd.grad(loss.sqrt().sum(), x)
    assert grad.isfinite().all()


@on_every_backend
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("spoil", [1e20, torch.inf, torch.nan], ids=["too long", "infinite", "nan"])
def test_a_magnet_loss_without_a_variance_is_nan_and_so_are_its_gradients(backend, reduction, spoil, device_for):
    device_for("magnet", backend)
    x = (
        torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
        * torch.cat([torch.ones(11), torch.tensor([spoil])])[:, None]
    )
    x.requires_grad_()
    clusters, classes = torch.arange(12) % 4, torch.tensor([0, 0, 1, 1])
    loss = magnet(x, clusters, classes, reduction=reduction, backend=backend)
    assert loss.isnan().all()
    (grad,) = torch.autograd.grad(loss.sum(), x)
    assert grad.isnan().all()


@on_every_kernel
def test_half_precision_whose_squares_overflow(backend, device_for):
    """|x|^2 of 512 numbers near 300 is 4.6e7, far above float16's 65504."""
    inputs = OP.CASES[0].make(torch.Generator().manual_seed(0))
    inputs |= {"x": 300 + 10 * torch.randn(inputs["x"].shape[0], 512).double()}
    assert cases.disagreements(OP, inputs, backend, torch.float16, device=device_for("magnet", backend)) == []
