"""Losses of other papers against formulas written in float64 with plain torch, and against their authors' numbers."""

import copy
import math

import pytest
import torch
import torch.utils.checkpoint
from pytorch_metric_learning import losses as pml
from torch import Tensor
from torch.nn import functional as F

import fused_margins
from fused_margins import (
    AdaFaceLoss,
    ElasticFaceLoss,
    MagFaceLoss,
    MultiSimilarityLoss,
    ProxyAnchorLoss,
    ProxyNCALoss,
    SphereFaceLoss,
    SupConLoss,
)
from fused_margins.core.indices import UNADMITTED
from fused_margins.functional import bias_from_counts, margin_from_counts, margin_logits, margin_softmax_loss

BACKENDS = ("reference", "cpu")
B, C, D = 19, 7, 6
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


def samples() -> tuple[Tensor, Tensor]:
    """Samples of lengths from 2 to 200; the class 6 has one, the class 5 none."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(B, D, generator=generator, dtype=torch.float64)
    x = x * torch.logspace(0, 2, B, dtype=torch.float64)[torch.randperm(B, generator=generator), None]
    labels = torch.randint(5, (B,), generator=generator)
    labels[3] = 6
    return x.requires_grad_(), labels


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return samples()


def made(kind: type, **options) -> torch.nn.Module:
    torch.manual_seed(1)
    return kind(C, D, **options).double()


def cosines(x: Tensor, w: Tensor) -> Tensor:
    return F.normalize(x) @ F.normalize(w).T


def assert_same(ours: Tensor, theirs: Tensor, *inputs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(t.sum(), inputs, retain_graph=True) for t in (ours, theirs)]
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


def reduced(each: Tensor, counted: Tensor, reduction: str) -> Tensor:
    each = torch.where(counted, each, 0.0)
    return {"mean": each.sum() / counted.sum().clamp(min=1), "sum": each.sum(), "none": each}[reduction]


@each_backend
@each_reduction
def test_adaface(batch, backend, reduction):
    x, labels = batch
    labels[5] = -100
    loss = made(AdaFaceLoss, scale=16.0, margin=0.4, momentum=0.1, reduction=reduction, backend=backend)
    counted = labels != -100
    mean, std = 20.0, 100.0
    for _ in range(3):
        length = x.detach().norm(dim=1).clip(0.001, 100)
        mean = 0.9 * mean + 0.1 * length[counted].mean()
        std = 0.9 * std + 0.1 * length[counted].std()
        q = ((length - mean) / (std + 1e-3) * 0.333).clip(-1, 1)
        u = cosines(x, loss.weight)
        shifted = torch.cos(u.clamp(-1 + 1e-15, 1 - 1e-15).acos() - 0.4 * q[:, None]) - (0.4 * q + 0.4)[:, None]
        z = 16 * torch.where(F.one_hot(labels.clamp(min=0), C).bool(), shifted, u)
        each = F.cross_entropy(z, labels, reduction="none")
        ours = loss(x, labels)
        assert_same(ours, reduced(each, counted, reduction), x, loss.weight)
    torch.testing.assert_close(torch.stack([loss.norm_mean, loss.norm_std]), torch.stack([mean, std]))
    assert set(loss.state_dict()) == {"weight", "norm_mean", "norm_std"}


def test_statistics_of_adaface_keep_what_is_usable():
    loss, x = made(AdaFaceLoss).float(), torch.randn(4, D)
    before = copy.deepcopy(loss.state_dict())

    def unmoved() -> bool:
        return all(torch.equal(t, before[name]) for name, t in loss.state_dict().items())

    broken = x.clone()
    broken[1, 2] = torch.nan
    assert loss(broken, torch.arange(4)).isnan()
    loss(x[:1], torch.tensor([1]))  # one length has no deviation
    loss(x, torch.full((4,), -100))
    assert unmoved()
    loss.eval()(x, torch.arange(4))
    assert unmoved()
    loss.train()(x, torch.arange(4))
    assert not unmoved()
    loss.reset_parameters()
    assert (float(loss.norm_mean), float(loss.norm_std)) == (20.0, 100.0)
    other = made(AdaFaceLoss).float()
    loss(x, torch.arange(4))
    other.load_state_dict(loss.state_dict())
    assert other.norm_mean == loss.norm_mean != 20


@each_backend
@each_reduction
def test_magface(batch, backend, reduction):
    x, labels = batch
    labels[5] = -100
    loss = made(MagFaceLoss, scale=16.0, reduction=reduction, backend=backend)
    a = x.norm(dim=1).clip(10, 110)
    assert (a.detach() > 10).any()
    assert (a.detach() == 10).any()
    u = cosines(x, loss.weight)
    m = (0.45 + (0.8 - 0.45) / 100 * (a - 10))[:, None]
    shifted = torch.where(u > 0, torch.cos(u.acos() + m), u)
    z = 16 * torch.where(F.one_hot(labels.clamp(min=0), C).bool(), shifted, u)
    counted = labels != -100
    each = F.cross_entropy(z, labels, reduction="none") + 35 * (a / 110**2 + 1 / a)
    assert_same(loss(x, labels), reduced(each, counted, reduction), x, loss.weight)


def test_a_step_that_is_made_again_would_count_its_lengths_twice():
    loss, x = made(AdaFaceLoss), torch.randn(4, D, dtype=torch.float64, requires_grad=True)
    value = torch.utils.checkpoint.checkpoint(loss, x, torch.arange(4), use_reentrant=False)
    with pytest.raises(RuntimeError, match="AdaFaceLoss: expected a call outside of a backward"):
        value.backward()


def test_the_length_of_a_sample_has_a_gradient_in_magface():
    loss, labels = made(MagFaceLoss, regularizer=0.0), torch.arange(4)
    x = F.normalize(loss.weight.detach()[:4] + 0.4) * torch.tensor([[5.0], [20.0], [100.0], [500.0]]).double()
    (gradient,) = torch.autograd.grad(loss(x.requires_grad_(), labels), x)
    radial = (gradient * x).sum(1).abs()
    assert (radial[1:3] > 1e-3 * gradient[1:3].norm(dim=1)).all()
    assert (radial[[0, 3]] < 1e-9 * gradient[[0, 3]].norm(dim=1)).all()  # clipped


@each_backend
@pytest.mark.parametrize("margin_type", ["angular", "additive"])
@pytest.mark.parametrize("plus", [False, True])
def test_elasticface(batch, backend, margin_type, plus):
    x, labels = batch
    labels[[2, 5]] = -100
    generator = torch.Generator().manual_seed(9)
    options = {"margin_type": margin_type, "plus": plus, "std": 0.2, "scale": 16.0, "backend": backend}
    loss = made(ElasticFaceLoss, generator=generator, **options)
    m = {"angular": 0.5, "additive": 0.35}[margin_type]
    ours = loss(x, labels)
    margins = m + 0.2 * torch.randn(B, generator=torch.Generator().manual_seed(9)).double()
    u, counted = cosines(x, loss.weight), labels != -100
    own = F.one_hot(labels.clamp(min=0), C).bool()
    if plus:  # of those that count, the nearest gets the smallest
        rows = counted.nonzero()[:, 0].tolist()
        nearest_first = sorted(rows, key=lambda i: -float(u[i, labels[i]].detach()))
        for i, value in zip(nearest_first, sorted(margins[rows].tolist())):
            margins[i] = value
    m = margins[:, None]
    if margin_type == "additive":
        shifted = u - m
    else:
        shifted = torch.where(u < -torch.cos(m), u - m * torch.sin(m), torch.cos(u.acos() + m))
        shifted = torch.where((m < 0) & (u > torch.cos(m)), u + 1 - torch.cos(m), shifted)
    theirs = F.cross_entropy(16 * torch.where(own, shifted, u), labels)
    assert_same(ours, theirs, x, loss.weight)
    assert loss(x, labels) != ours  # drawn anew
    plain = margin_softmax_loss(x, loss.weight, labels, scale=16.0, margin=loss.margin, margin_type=margin_type)
    torch.testing.assert_close(loss.eval()(x, labels), plain)


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # of pytorch-metric-learning
@each_backend
@pytest.mark.parametrize("margin", [1, 2, 3, 4, 7])
def test_sphereface(batch, backend, margin):
    x, labels = batch
    loss = made(SphereFaceLoss, margin=margin, scale=0.5, backend=backend)
    u = cosines(x, loss.weight)
    theta = u.acos()
    k = (theta.detach() * margin / math.pi).floor()
    z = (
        0.5
        * x.norm(dim=1, keepdim=True)
        * torch.where(F.one_hot(labels, C).bool(), (-1) ** k * torch.cos(margin * theta) - 2 * k, u)
    )
    assert_same(loss(x, labels), F.cross_entropy(z, labels), x, loss.weight)
    theirs = pml.SphereFaceLoss(C, D, margin=margin, scale=0.5)
    theirs.W.data = loss.weight.detach().T.clone()
    torch.testing.assert_close(loss(x, labels), theirs(x, labels))
    torch.testing.assert_close(loss.predictions(x), theirs.get_logits(x))


def test_a_zero_vector_has_the_loss_of_equal_logits_in_sphereface():
    loss = made(SphereFaceLoss)
    x = torch.zeros(2, D, dtype=torch.float64, requires_grad=True)
    value = loss(x, torch.tensor([0, 1]))
    value.backward()
    assert value.item() == pytest.approx(math.log(C))
    assert x.grad.isfinite().all()


@each_backend
def test_proxy_nca(batch, backend):
    x, labels = batch
    loss = made(ProxyNCALoss, softmax_scale=3.0, backend=backend)
    distances = (F.normalize(x)[:, None] - F.normalize(loss.weight)).square().sum(-1)
    assert_same(loss(x, labels), F.cross_entropy(-3 * distances, labels), x, loss.weight)
    theirs = pml.ProxyNCALoss(C, D, softmax_scale=3.0)
    theirs.proxies.data = loss.weight.detach().clone()
    torch.testing.assert_close(loss(x, labels), theirs(x, labels))


@each_backend
@each_reduction
def test_proxy_anchor(batch, backend, reduction):
    x, labels = batch
    labels[[5, 6]] = torch.tensor([-100, UNADMITTED])
    loss = made(ProxyAnchorLoss, margin=0.2, alpha=8.0, reduction=reduction, backend=backend)
    u, counted = cosines(loss.weight, x), labels >= 0
    own = (torch.arange(C)[:, None] == labels) & counted
    others = ~own & counted
    far = torch.log(1 + (own * torch.exp(-8 * (u - 0.2))).sum(1))
    near = torch.log(1 + (others * torch.exp(8 * (u + 0.2))).sum(1))
    theirs = {
        "mean": far.sum() / own.any(1).sum() + near.mean(),
        "sum": far.sum() + near.sum(),
        "none": far + near,
    }[reduction]
    assert_same(loss(x, labels), theirs, x, loss.weight)
    if reduction == "mean":
        peer = pml.ProxyAnchorLoss(C, D, margin=0.2, alpha=8.0)
        peer.proxies.data = loss.weight.detach().clone()
        torch.testing.assert_close(loss(x[counted], labels[counted]), peer(x[counted], labels[counted]))


def test_proxy_anchor_of_nothing_and_of_what_is_no_number():
    loss = made(ProxyAnchorLoss).float()
    x = torch.randn(4, D)
    assert loss(x[:0], torch.zeros(0).long()) == 0
    assert loss(x, torch.full((4,), -100)) == 0
    for value in (torch.nan, torch.inf):
        x[2, 1] = value
        assert loss(x, torch.arange(4)).isnan()
    with pytest.raises(IndexError, match=r"^labels: expected values in \[0, 7\) or -100 \(ignored\), got 7 in row 3"):
        loss(torch.randn(4, D), torch.tensor([0, 1, 2, 7]))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # of torch's compiler
def test_a_graph_without_breaks_moves_the_statistics(batch):
    x, labels = batch[0].detach().float(), batch[1]
    torch.manual_seed(0)
    eager, compiled = AdaFaceLoss(C, D), AdaFaceLoss(C, D)
    compiled.load_state_dict(eager.state_dict())
    try:
        value = torch.compile(compiled, fullgraph=True, backend="eager")(x, labels)
    finally:
        torch.compiler.reset()
    torch.testing.assert_close(value, eager(x, labels))
    for name, t in eager.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], t)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_no_lengths(batch, dtype):
    x, labels = batch[0].detach().to(dtype), batch[1]
    for kind in (AdaFaceLoss, MagFaceLoss, SphereFaceLoss, ProxyAnchorLoss):
        loss = made(kind).float()
        with torch.autocast("cpu", dtype=dtype):
            value = loss(x, labels)
        truth = made(kind)(x.double(), labels)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), truth, rtol=0.02, atol=0)


@each_backend
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"class_weight": True}, {"margin_type": "angular"}])
def test_a_bias_of_logits(batch, backend, options):
    x, labels = batch
    labels[5] = -100
    counts = torch.tensor([9, 5, 1, 30, 2, 2, 100])
    bias = bias_from_counts(counts.double(), tau=1.5)
    torch.testing.assert_close(bias, 1.5 * (counts / counts.sum().double()).log())
    bias.requires_grad_()
    w = torch.randn(C, D, dtype=torch.float64, requires_grad=True)
    options = dict(options)
    class_weight = torch.linspace(0.5, 2, C).double() if options.pop("class_weight", False) else None
    settings = {"scale": 5.0, "margin": 0.2, "logit_bias": bias, "backend": backend}
    u = cosines(x, w)
    shifted = torch.cos(u.acos() + 0.2) if options.get("margin_type") else u - 0.2
    z = 5 * torch.where(F.one_hot(labels.clamp(min=0), C).bool(), shifted, u) + bias
    smoothing = {n: v for n, v in options.items() if n == "label_smoothing"}
    theirs = F.cross_entropy(z, labels, weight=class_weight, **smoothing)
    ours = margin_softmax_loss(x, w, labels, class_weight=class_weight, **settings, **options)
    assert_same(ours, theirs, x, w, bias)
    kind = {n: v for n, v in options.items() if n == "margin_type"}
    counted = labels != -100
    torch.testing.assert_close(margin_logits(x, w, labels, **settings, **kind)[counted], z[counted])
    module = fused_margins.MarginSoftmaxLoss(C, D, scale=5.0, margin=0.2, logit_bias=bias, **options).double()
    module.weight.data = w.data
    if class_weight is None:
        torch.testing.assert_close(module(x, labels), theirs)
    torch.testing.assert_close(module.predictions(x), 5 * u)
    assert "logit_bias" in module.state_dict()


def test_margins_of_counts():
    counts = torch.tensor([8, 100, 3, 3])
    margins = margin_from_counts(counts.double(), max_margin=0.4)
    torch.testing.assert_close(margins, 0.4 * (3 / counts.double()) ** 0.25)
    assert margin_from_counts(counts, power=0).tolist() == [0.5] * 4
    loss = fused_margins.CosFaceLoss(4, 3, margin=margin_from_counts(counts, max_margin=0.4))
    torch.testing.assert_close(loss.margin, margins.float())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: margin_from_counts(torch.tensor([1, 0])), ValueError, "counts: expected one positive number a class"),
        (lambda: margin_from_counts([1, 2]), TypeError, "counts: expected a tensor of shape"),
        (lambda: margin_from_counts(torch.ones(2), power=-1), ValueError, "power: expected a number of at least 0"),
        (lambda: bias_from_counts(torch.tensor([[1]])), TypeError, "counts: expected a tensor of shape"),
        (lambda: AdaFaceLoss(C, D, momentum=1.5), ValueError, r"momentum: expected a number in \[0, 1\], got 1.5"),
        (lambda: AdaFaceLoss(C, D, margin=23.0), ValueError, "margin: expected a number within"),
        (lambda: AdaFaceLoss(C, D, concentration=0), ValueError, "concentration: expected a positive number"),
        (lambda: AdaFaceLoss(C, D, learnable_margin=True), ValueError, "learnable_margin: expected False"),
        (lambda: MagFaceLoss(C, D, upper_margin=45.0), ValueError, "lower_margin, upper_margin: .*math.radians"),
        (lambda: MagFaceLoss(C, D, upper_length=9.0), ValueError, "lower_length, upper_length: expected ascending"),
        (lambda: MagFaceLoss(C, D, regularizer=-1.0), ValueError, "regularizer: expected a number of at least 0"),
        (lambda: ElasticFaceLoss(C, D, margin=28.6), ValueError, "margin: expected radians.*math.radians"),
        (lambda: ElasticFaceLoss(C, D, margin_type="combined"), ValueError, "margin_type: expected one of 'angular'"),
        (lambda: ElasticFaceLoss(C, D, std=-0.1), ValueError, "std: expected a number of at least 0"),
        (
            lambda: ElasticFaceLoss(C, D, plus=True)(torch.randn(1, 0), torch.tensor([1])),
            ValueError,
            f"embeddings: expected width {D}, got 0",
        ),
        (lambda: ElasticFaceLoss(C, D, std=28.6), ValueError, "std: expected radians of at most pi, got 28.6"),
        (lambda: ElasticFaceLoss(C, D, plus=1), TypeError, "plus: expected True or False"),
        (lambda: SphereFaceLoss(C, D, margin=1.35), TypeError, "margin: expected an integer"),
        (lambda: SphereFaceLoss(C, D, margin=0), ValueError, "margin: expected at least 1"),
        (lambda: ProxyNCALoss(C, D, softmax_scale=0.0), ValueError, "softmax_scale: expected a positive number"),
        (lambda: ProxyAnchorLoss(C, D, alpha=-1), ValueError, "alpha: expected a positive number"),
        (lambda: SupConLoss(0), ValueError, "temperature: expected a positive number"),
        (lambda: MultiSimilarityLoss(beta=0), ValueError, "beta: expected a positive number"),
        (lambda: MultiSimilarityLoss(base="0.5"), TypeError, "base: expected a number"),
    ],
)
def test_settings_that_cannot_be(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("margin", [28.6, torch.tensor(28.6), torch.full((C,), 28.6)])
def test_degrees_are_no_radians(margin):
    with pytest.raises(ValueError, match=r"margin: expected radians within .*, got 28.6.*; degrees become radians"):
        fused_margins.ArcFaceLoss(C, D, margin=margin)
    if isinstance(margin, float):
        with pytest.raises(ValueError, match=r"angular_margin_rad: .*, got 28.6; degrees become radians by math.rad"):
            fused_margins.MarginSoftmaxLoss(C, D, margin_type="combined", angular_margin_rad=margin)
