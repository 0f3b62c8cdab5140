"""Classes with several centers, against formulas over the whole matrix; in pieces and at once."""

import math

import pytest
import torch
from torch.nn import functional as F

from fused_margins import MarginSoftmaxLoss, SoftTripleLoss, SubCenterArcFaceLoss
from fused_margins.backends.budget import within_memory_budget
from fused_margins.functional import margin_logits, margin_softmax_loss

B, C, K, D = 12, 7, 3, 5


def inputs(dtype=torch.float64):
    x = torch.randn(B, D, dtype=dtype, requires_grad=True)
    weight = torch.randn(C, K, D, dtype=dtype, requires_grad=True)
    return x, weight, torch.arange(B) % C


def by_formula(x, weight, labels, scale, psi, temperature=0.0, similarity="cosine"):
    if similarity == "cosine":
        u = torch.einsum("bd,ckd->bck", F.normalize(x), F.normalize(weight, dim=-1))
    elif similarity == "dot":
        u = torch.einsum("bd,ckd->bck", x, weight)
    else:
        u = -(x[:, None, None] - weight).square().sum(-1)
    u = ((u / temperature).softmax(2) * u).sum(2) if temperature else u.amax(2)
    own = F.one_hot(labels, weight.shape[0]).bool()
    return F.cross_entropy(scale * torch.where(own, psi(u), u), labels, reduction="none")


PSI = {
    "additive": lambda u: u + 0.2,
    "angular": lambda u: torch.cos(torch.acos(u) + 0.3),
}
MARGIN = {"additive": -0.2, "angular": 0.3}
# Bytes of softmax weights that a kernel saves, and of a piece of classes.
pieces_or_not = pytest.mark.parametrize("budget", [0, 2**27], ids=["pieces", "at-once"])


@pieces_or_not
@pytest.mark.parametrize("temperature", [0.0, 0.3])
@pytest.mark.parametrize(
    ("similarity", "margin_type"),
    [("cosine", "additive"), ("cosine", "angular"), ("dot", "additive"), ("negative_squared_euclidean", "additive")],
)
def test_values_and_gradients(budget, temperature, similarity, margin_type):
    x, weight, labels = inputs()
    options = {"similarity": similarity, "margin_type": margin_type, "margin": MARGIN[margin_type], "scale": 4.0}
    with within_memory_budget(budget):
        loss = margin_softmax_loss(x, weight, labels, center_temperature=temperature, reduction="none", **options)
        grads = torch.autograd.grad(loss.sum(), [x, weight])
    expected = by_formula(x, weight, labels, 4.0, PSI[margin_type], temperature, similarity)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grads, torch.autograd.grad(expected.sum(), [x, weight]))
    logits = margin_logits(x, weight, labels, center_temperature=temperature, **options)
    torch.testing.assert_close(F.cross_entropy(logits, labels, reduction="none"), expected)


@pieces_or_not
def test_second_derivatives(budget):
    x, weight, labels = inputs()
    with within_memory_budget(budget):
        assert torch.autograd.gradgradcheck(
            lambda x, w: margin_softmax_loss(x, w, labels, scale=3.0, center_temperature=0.5),
            (x, weight),
            fast_mode=True,
        )


@pieces_or_not
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes_err_little(budget, dtype):
    x, weight, labels = inputs(dtype)
    with within_memory_budget(budget):
        loss = margin_softmax_loss(x, weight, labels, scale=30.0, margin=0.1)
    assert loss.dtype == torch.float32
    expected = by_formula(x.double(), weight.double(), labels, 30.0, lambda u: u - 0.1).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)


@pieces_or_not
def test_rows_that_count_for_nothing_scales_of_rows_and_class_weights(budget):
    x, weight, labels = inputs()
    scale = torch.rand(B, 1, dtype=torch.float64) + 1
    ignored = labels.clone()
    ignored[3] = -100
    class_weight = torch.rand(C, dtype=torch.float64)
    with within_memory_budget(budget):
        loss = margin_softmax_loss(x, weight, ignored, scale=scale, margin=0.1, class_weight=class_weight)
    each = by_formula(x, weight, labels, scale, lambda u: u - 0.1) * class_weight[labels]
    kept = ignored != -100
    torch.testing.assert_close(loss, each[kept].sum() / class_weight[labels[kept]].sum())
    (grad,) = torch.autograd.grad(loss, x)
    assert not grad[3].any()
    assert grad[kept].any(1).all()


def test_one_class_has_no_loss():
    x, weight, _ = inputs()
    loss = margin_softmax_loss(x, weight[:1], torch.zeros(B).long())
    assert loss == 0
    assert all(not g.any() for g in torch.autograd.grad(loss, [x, weight]))


def test_pieces_hold_a_piece_alone():
    """What autograd saves grows with rows and classes, not with their product."""
    x, weight = torch.randn(256, 8, requires_grad=True), torch.randn(2000, 3, 8, requires_grad=True)
    labels = torch.randint(0, 2000, (256,))

    def largest_saved(budget):
        sizes = []
        with (
            within_memory_budget(budget),
            torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t),
        ):
            margin_softmax_loss(x, weight, labels, center_temperature=0.1)
        return max(sizes)

    assert largest_saved(2**30) >= 256 * 2000
    assert largest_saved(2**20) <= weight.numel()


def test_sub_centers_are_those_of_the_paper():
    torch.manual_seed(0)
    loss = SubCenterArcFaceLoss(C, D, margin=20.0, scale=8.0, sub_centers=K)
    x, labels = torch.randn(B, D), torch.arange(B) % C
    expected = by_formula(x, loss.weight, labels, 8.0, lambda u: torch.cos(torch.acos(u) + math.radians(20)))
    torch.testing.assert_close(loss(x, labels), expected.mean())
    assert loss.weight.shape == (C, K, D)
    torch.testing.assert_close(
        loss.predictions(x), 8 * (F.normalize(x) @ F.normalize(loss.weight, dim=-1).transpose(1, 2)).amax(2).T
    )


def test_soft_triples_are_those_of_the_paper():
    loss = SoftTripleLoss(C, D, centers_per_class=K, la=5.0, gamma=0.2, margin=0.05)
    x, labels = torch.randn(B, D), torch.arange(B) % C
    expected = by_formula(x, loss.weight, labels, 5.0, lambda u: u - 0.05, 0.2)
    torch.testing.assert_close(loss(x, labels), expected.mean())
    assert SoftTripleLoss(C, D, centers_per_class=1)(x, labels).isfinite()


def test_what_is_refused_by_name():
    x, weight, labels = inputs()
    for error, message, call in (
        (
            ValueError,
            r"^label_smoothing: expected 0 where a class has several centers, got 0.1",
            {"label_smoothing": 0.1},
        ),
        (
            ValueError,
            r"^backend: expected 'auto' or 'reference' with a center_temperature, got 'cpu'",
            {"backend": "cpu", "center_temperature": 0.1},
        ),
        (ValueError, r"^center_temperature: expected a number of at least 0, got -1", {"center_temperature": -1}),
        (TypeError, r"^center_temperature: expected a number, got str", {"center_temperature": "1"}),
        (
            ValueError,
            r"^center_temperature: expected a number of at least 0, got nan",
            {"center_temperature": math.nan},
        ),
    ):
        with pytest.raises(error, match=message):
            margin_softmax_loss(x, weight, labels, **call)
    with pytest.raises(ValueError, match=r"^weight: expected a tensor \(classes, centers, width\).*, got \(7, 5\)"):
        margin_softmax_loss(x, weight[:, 0], labels, center_temperature=0.1)
    with pytest.raises(ValueError, match=r"^weight: expected a tensor .* with centers, got \(7, 0, 5\)"):
        margin_logits(x, weight[:, :0])
    with pytest.raises(ValueError, match=r"^weight: expected width 5 as embeddings has, got 4"):
        margin_softmax_loss(x, weight[..., :4], labels)
    with pytest.raises(TypeError, match=r"^weight: expected the dtype of embeddings"):
        margin_softmax_loss(x, weight.float(), labels)
    with pytest.raises(IndexError, match=r"^labels: expected values in \[0, 7\)"):
        margin_softmax_loss(x, weight, labels + 1)
    with pytest.raises(ValueError, match=r"^center_temperature: expected 0 with one center a class, got 0.1"):
        MarginSoftmaxLoss(C, D, center_temperature=0.1)
    with pytest.raises(ValueError, match=r"^label_smoothing: expected 0 where"):
        MarginSoftmaxLoss(C, D, centers_per_class=2, label_smoothing=0.1)
    with pytest.raises(TypeError, match=r"^sub_centers: expected an integer, got 2.5"):
        SubCenterArcFaceLoss(C, D, sub_centers=2.5)
    with pytest.raises(ValueError, match=r"^gamma: expected a positive number, got 0"):
        SoftTripleLoss(C, D, gamma=0)


def test_autocast():
    x, weight, labels = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = margin_softmax_loss(x, weight, labels)
    expected = margin_softmax_loss(x.bfloat16(), weight.bfloat16(), labels)
    assert torch.equal(narrow, expected)
