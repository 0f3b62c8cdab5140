"""The magnet loss module against plain loops, and against the mistakes of existing code."""

import math

import pytest
import torch
from torch import Tensor

from fused_margins import MagnetLoss
from fused_margins.functional import magnet_loss

BACKENDS = ("reference", "cpu")


@pytest.fixture(params=BACKENDS)
def backend(request, device_for) -> str:
    device_for("contrast", request.param)  # or skip, with the reason
    return request.param


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Five clusters of three classes, of uneven sizes."""
    generator = torch.Generator().manual_seed(0)
    clusters = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 4, 4, 4])
    x = torch.randn(14, 3, generator=generator, dtype=torch.float64) + clusters[:, None] * 0.7
    return x.requires_grad_(), clusters, torch.tensor([5, 5, 2, 2, 9])


def plain_magnet(x: Tensor, clusters: Tensor, cluster_labels: Tensor, alpha: float, floor: float = 1e-4) -> Tensor:
    """(B,) losses, one sample and one cluster at a time."""
    means = [torch.stack([r for r, c in zip(x, clusters) if c == m]).mean(0) for m in range(len(cluster_labels))]
    variance = sum((r - means[int(c)]).square().sum() for r, c in zip(x, clusters)) / (len(x) - 1)
    variance = torch.clamp(variance, min=floor)
    losses = []
    for r, c in zip(x, clusters):
        own = torch.exp(-(r - means[int(c)]).square().sum() / (2 * variance) - alpha)
        impostors = [
            torch.exp(-(r - means[m]).square().sum() / (2 * variance))
            for m in range(len(cluster_labels))
            if cluster_labels[m] != cluster_labels[int(c)]
        ]
        losses.append(torch.relu(-torch.log(own / sum(impostors))) if impostors else x.sum() * 0)
    return torch.stack(losses)


@pytest.mark.parametrize("alpha", [0.3, 4.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_it_is_its_formula(batch, backend, alpha, reduction):
    x, clusters, cluster_labels = batch
    each = plain_magnet(x, clusters, cluster_labels, alpha)
    if alpha == 0.3:
        assert 0 < int((each > 0).sum()) < len(each)  # some hinges are closed
    theirs = {"mean": each.mean(), "sum": each.sum(), "none": each}[reduction]
    ours = MagnetLoss(alpha, reduction=reduction, backend=backend)(x, clusters, cluster_labels)
    torch.testing.assert_close(ours, theirs)
    (a,), (b,) = torch.autograd.grad(ours.sum(), x), torch.autograd.grad(theirs.sum(), x)
    torch.testing.assert_close(a, b)


def test_gradients_by_finite_differences(batch, backend):
    # Through the means and the variance, to second order.
    x, clusters, cluster_labels = batch
    loss = MagnetLoss(4.0, reduction="none", backend=backend)
    assert torch.autograd.gradcheck(lambda x: loss(x, clusters, cluster_labels), (x,))
    assert torch.autograd.gradgradcheck(lambda x: loss(x, clusters, cluster_labels), (x,))


def test_every_class_one_cluster(batch, backend):
    x, clusters, cluster_labels = batch
    labels = cluster_labels[clusters]  # 5, 2, 9: neither dense nor in order
    dense = torch.tensor([{5: 0, 2: 1, 9: 2}[int(l)] for l in labels])
    loss = MagnetLoss(2.0, backend=backend)
    torch.testing.assert_close(loss(x, labels), loss(x, dense, torch.tensor([5, 2, 9])))
    torch.testing.assert_close(loss(x, labels), plain_magnet(x, dense, torch.arange(3), 2.0).mean())


def test_the_scale_is_the_variance(batch, backend):
    # Trap: dividing by the variance squared. With the variance itself the loss does not know the unit of length.
    x, clusters, cluster_labels = batch
    loss = MagnetLoss(2.0, backend=backend)
    torch.testing.assert_close(loss(100 * x, clusters, cluster_labels), loss(x, clusters, cluster_labels))


def test_the_loss_is_not_capped(backend):
    # Trap: an epsilon inside the logarithm caps the loss at 18.42 and takes the gradient with it.
    x = torch.tensor([[0.0], [1.0], [10.0], [11.0], [500.0]], requires_grad=True)  # the last is far from all
    clusters, labels = torch.tensor([0, 0, 1, 1, 0]), torch.tensor([0, 1])
    loss = MagnetLoss(alpha=60.0, reduction="none", backend=backend)(x, clusters, labels)
    assert (loss > 50).all()
    loss[0].backward()
    assert x.grad.abs().sum() > 0


def test_clusters_of_the_same_class_do_not_repel(batch, backend):
    x, clusters, _ = batch
    loss = MagnetLoss(4.0, backend=backend)
    value = loss(x, clusters, torch.full((5,), 3))
    value.backward()
    assert value == 0
    assert torch.equal(x.grad, torch.zeros_like(x))
    # Moving a cluster of the own class moves no loss but by the variance, which it leaves alone.
    moved = x.detach() + 50 * (clusters == 1)[:, None]
    each = MagnetLoss(4.0, reduction="none", backend=backend)
    labels = torch.tensor([5, 5, 2, 2, 9])
    torch.testing.assert_close(each(moved, clusters, labels)[:3], each(x, clusters, labels)[:3])


def test_collapsed_embeddings(backend):
    x = torch.ones(6, 4, requires_grad=True)
    loss = MagnetLoss(1.0, backend=backend)(x, torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 1, 2]))
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(1 + math.log(2)))
    assert x.grad.isfinite().all()
    # Above the floor's reach: equal clusters apart from each other, variance 0.
    x = torch.eye(3).repeat_interleave(2, 0).requires_grad_()
    loss = MagnetLoss(1.0, variance_floor=0.1, backend=backend)(x, torch.arange(6) // 2, torch.arange(3))
    torch.testing.assert_close(loss, torch.tensor(0.0))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own, of a Function
def test_compiles_to_one_graph(batch):
    torch._dynamo.reset()
    x, clusters, cluster_labels = batch[0].detach().requires_grad_(), batch[1], batch[2]
    loss = MagnetLoss(2.0)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours, theirs = compiled(x, clusters, cluster_labels), loss(x, clusters, cluster_labels)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, x), torch.autograd.grad(theirs, x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_int32(batch, dtype):
    x, clusters, cluster_labels = batch
    half = x.detach().to(dtype)
    ours = MagnetLoss(2.0)(half, clusters.int(), cluster_labels.int())
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), MagnetLoss(2.0)(half.double(), clusters, cluster_labels))
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the variance must not be taken in bfloat16
        same = MagnetLoss(2.0)(x.detach().float(), clusters, cluster_labels)
    assert same.isfinite()


def test_representation_and_state():
    assert repr(MagnetLoss()) == "MagnetLoss(alpha=1, variance_floor=0.0001, reduction='mean', backend='auto')"
    assert MagnetLoss().state_dict() == {}


def test_bad_input(batch):
    x, clusters, cluster_labels = batch
    with pytest.raises(ValueError, match="reduction: expected one of 'mean', 'sum', 'none', got 'max'"):
        MagnetLoss(reduction="max")
    with pytest.raises(ValueError, match="variance_floor: expected a positive number, got 0"):
        MagnetLoss(variance_floor=0)
    with pytest.raises(ValueError, match="cluster 5 has none"):
        MagnetLoss()(x, clusters, torch.arange(6))
    with pytest.raises(IndexError, match="clusters"):
        MagnetLoss()(x, clusters, torch.arange(4))
    with pytest.raises(TypeError, match="labels: expected an integer dtype"):
        MagnetLoss()(x, clusters.float())
    with pytest.raises(ValueError, match=r"labels: expected shape \(14,\)"):
        MagnetLoss()(x, clusters[:3])
    with pytest.raises(ValueError, match="embeddings: expected a matrix"):
        MagnetLoss()(x[0], clusters, cluster_labels)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_same_bits_for_one_and_two_threads(backend):
    x = torch.randn(2048, 256, generator=torch.Generator().manual_seed(0)).requires_grad_()
    clusters, cluster_labels = torch.arange(2048) % 12, torch.arange(12) % 4  # neighbouring rows meet in other clusters
    before, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)  # as users run it
    grads = []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            loss = MagnetLoss(backend=backend)(x, clusters, cluster_labels)
            grads.append(torch.autograd.grad(loss, x)[0])
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(deterministic)
    if backend == "cpu":  # torch's own products, which the reference is made of, may depend on the threads
        assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[1], grads[2])


def test_what_is_refused_by_name():
    x, labels = torch.eye(4), torch.tensor([0, 0, 1, 1])
    with pytest.raises(TypeError, match=r"^embeddings: expected a tensor, got list"):
        MagnetLoss()([1.0], labels)
    with pytest.raises(TypeError, match=r"^embeddings: expected a tensor with data, got one on the meta device"):
        MagnetLoss()(x.to("meta"), labels.to("meta"))
    with pytest.raises(TypeError, match=r"^cluster_labels: expected a dense tensor, got a nested one"):
        MagnetLoss()(x, labels, torch.nested.nested_tensor([labels, labels]))
    with pytest.raises(ValueError, match=r"^variance_floor: expected a positive number, got inf"):
        magnet_loss(x, labels, torch.arange(2), variance_floor=math.inf)
