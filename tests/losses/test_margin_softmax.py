"""Margin softmax against formulas written independently of it, against PyTorch, and against pytorch-metric-learning."""

import math

import pytest
import torch
from pytorch_metric_learning import losses as pml
from torch import Tensor
from torch.nn import functional as F

import fused_margins
from fused_margins.functional import margin_logits, margin_softmax_loss
from fused_margins.margins import apply_margin

BACKENDS = ("reference", "cpu")
B, C, D = 23, 11, 17


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, D, generator=generator, dtype=torch.float64).requires_grad_()
    w = torch.randn(C, D, generator=generator, dtype=torch.float64).requires_grad_()
    return x, w, torch.randint(C, (B,), generator=generator)


def cosines(x: Tensor, w: Tensor) -> Tensor:
    return F.normalize(x) @ F.normalize(w).T


def assert_same_loss_and_gradients(ours: Tensor, theirs: Tensor, inputs: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours.sum(), inputs), torch.autograd.grad(theirs.sum(), inputs)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_without_margin_it_is_cross_entropy(batch, backend, reduction, label_smoothing, weighted):
    x, w, labels = batch
    labels[3] = -100
    class_weight = torch.linspace(0.5, 2, C, dtype=torch.float64) if weighted else None
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    ours = margin_softmax_loss(x, w, labels, scale=7.0, class_weight=class_weight, backend=backend, **options)
    theirs = F.cross_entropy(7.0 * cosines(x, w), labels, weight=class_weight, **options)
    assert_same_loss_and_gradients(ours, theirs, (x, w))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("similarity", ["dot", "negative_squared_euclidean"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_other_similarities(batch, backend, similarity, label_smoothing):
    x, w, labels = batch
    u = x @ w.T if similarity == "dot" else -(x[:, None] - w).square().sum(-1)
    u = u - 0.3 * F.one_hot(labels, C)
    ours = margin_softmax_loss(
        x, w, labels, scale=0.5, margin=0.3, similarity=similarity, label_smoothing=label_smoothing, backend=backend
    )
    assert_same_loss_and_gradients(ours, F.cross_entropy(0.5 * u, labels, label_smoothing=label_smoothing), (x, w))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["number", "0-d", "per class", "per sample"])
@pytest.mark.parametrize("sign", [-1, 1])
def test_additive_margins_of_every_form_and_sign(batch, backend, kind, sign):
    x, w, labels = batch
    per_class = sign * torch.linspace(0, 0.6, C, dtype=torch.float64)
    per_sample = sign * torch.linspace(0, 0.6, B, dtype=torch.float64)[:, None]
    zero_d = torch.tensor(sign * 0.35, dtype=torch.float64)
    margin = {"number": sign * 0.35, "0-d": zero_d, "per class": per_class, "per sample": per_sample}[kind]
    inputs = (x, w)
    if isinstance(margin, Tensor):
        inputs = (x, w, margin.requires_grad_())
    of_row = margin[labels] if kind == "per class" else torch.as_tensor(margin, dtype=torch.float64)
    theirs = F.cross_entropy(12 * (cosines(x, w) - F.one_hot(labels, C) * of_row.reshape(-1, 1)), labels)
    ours = margin_softmax_loss(x, w, labels, scale=12.0, margin=margin, backend=backend)
    assert_same_loss_and_gradients(ours, theirs, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("per_sample", [False, True])
def test_learnable_scale(batch, backend, per_sample):
    x, w, labels = batch
    shape = (B, 1) if per_sample else ()
    scale = torch.full(shape, 9.0, dtype=torch.float64).requires_grad_()
    theirs = F.cross_entropy(scale * (cosines(x, w) + 0.2 * F.one_hot(labels, C)), labels)
    ours = margin_softmax_loss(x, w, labels, scale=scale, margin=-0.2, backend=backend)
    assert_same_loss_and_gradients(ours, theirs, (x, w, scale))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("margin_type", ["additive", "angular", "combined"])
@pytest.mark.parametrize("margin", [-0.4, 0.0, 0.4])
@pytest.mark.parametrize("beyond_pi", ["standard", "continuous", "easy"])
def test_logits_carry_the_same_loss_and_gradients(batch, backend, margin_type, margin, beyond_pi):
    x, w, labels = batch
    labels[5] = -100
    options = {"scale": 6.0, "margin": margin, "margin_type": margin_type, "beyond_pi": beyond_pi, "backend": backend}
    if margin_type == "combined":
        options |= {"angular_margin_rad": 0.3, "angular_multiplier": 1.2}
    theirs = F.cross_entropy(margin_logits(x, w, labels, **options), labels)
    assert_same_loss_and_gradients(margin_softmax_loss(x, w, labels, **options), theirs, (x, w))


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_without_labels_are_plain(batch, backend):
    x, w, _ = batch
    torch.testing.assert_close(margin_logits(x, w, scale=3.0, margin=0.5, backend=backend), 3 * cosines(x, w))


@pytest.mark.parametrize("margin", [-1.0, -0.3, 0.3, 1.0])
@pytest.mark.parametrize("multiplier", [1.0, 2.5])
def test_angular_margin_is_the_cosine_of_the_shifted_angle(margin, multiplier):
    theta = torch.linspace(0.01, math.pi - 0.01, 301, dtype=torch.float64)
    inside = (multiplier * theta + margin > 0) & (multiplier * theta + margin < math.pi)
    psi = apply_margin(theta.cos(), 0.1, "combined", margin, multiplier)
    torch.testing.assert_close(psi[inside], torch.cos(multiplier * theta + margin)[inside] - 0.1)


@pytest.mark.parametrize("margin", [-0.8, 0.5, 1.2])
@pytest.mark.parametrize(("multiplier", "beyond_pi"), [(1.0, "continuous"), (3.0, "continuous"), (3.0, "standard")])
def test_the_continuation_never_turns_back(margin, multiplier, beyond_pi):
    u = torch.linspace(1, -1, 2001, dtype=torch.float64)
    psi = apply_margin(u, 0.0, "combined", margin, multiplier, beyond_pi)
    assert (psi.diff() <= 1e-12).all()
    assert psi.diff().abs().max() < 0.2  # no jump: the steepest part, near |u| = 1, moves by sqrt(2 / 1000) a step


def test_fallbacks_beyond_pi():
    u, m = torch.tensor([-0.99, 0.2], dtype=torch.float64), 0.5
    inside = math.cos(math.acos(0.2) + m)
    for beyond_pi, beyond in (
        ("standard", -0.99 - m * math.sin(m)),
        ("continuous", -2 - math.cos(math.acos(-0.99) + m)),
    ):
        psi = apply_margin(u, m, "angular", beyond_pi=beyond_pi)
        torch.testing.assert_close(psi, torch.tensor([beyond, inside], dtype=torch.float64))
    easy = apply_margin(torch.tensor([-0.1, 0.2], dtype=torch.float64), m, "angular", beyond_pi="easy")
    torch.testing.assert_close(easy, torch.tensor([-0.1, inside], dtype=torch.float64))


@pytest.mark.parametrize("margin_type", ["angular", "combined"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_at_the_poles(margin_type, dtype):
    u = torch.tensor([1.0, -1.0, 1 + 1e-7, -1 - 1e-7, 0.0], dtype=dtype, requires_grad=True)
    psi = apply_margin(u, 0.5, margin_type, 0.3, 2.0)
    (gradient,) = torch.autograd.grad(psi.sum(), u)
    assert psi.isfinite().all()
    assert gradient.isfinite().all()


def test_straight_through_gradient_is_one():
    u = torch.tensor([0.3, -0.5, 0.9], dtype=torch.float64, requires_grad=True)
    margin = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    psi = apply_margin(u, margin, "angular", gradient="straight_through")
    torch.testing.assert_close(psi, apply_margin(u, 0.4, "angular"))
    of_u, of_margin = torch.autograd.grad(psi.sum(), (u, margin))
    torch.testing.assert_close(of_u, torch.ones_like(u))
    assert of_margin != 0  # a learnable margin still learns


@pytest.mark.parametrize("backend", BACKENDS)
def test_tiny_losses_survive_float32(backend):
    """With C = 1e5, s = 64 and m = 0.35 the usual logsumexp - z has no digit left of this loss, nor of its gradient."""
    classes, scale, margin, cosine = 100_000, 64.0, 0.35, 0.85
    # Two dimensions carry the positive pair, a third all the negatives, orthogonal to the anchor.
    weight = torch.zeros(classes, 3)
    weight[:, 2] = 1
    weight[0] = torch.tensor([cosine, math.sqrt(1 - cosine**2), 0])
    x = torch.tensor([[1.0, 0.0, 0.0]], requires_grad=True)
    labels = torch.zeros(1, dtype=torch.int64)
    loss = margin_softmax_loss(x, weight, labels, scale=scale, margin=margin, backend=backend)
    exact = math.log1p((classes - 1) * math.exp(-scale * (cosine - margin)))
    assert loss.item() == pytest.approx(exact, rel=1e-4)
    assert F.cross_entropy(scale * (x @ weight.T - margin * F.one_hot(labels, classes)), labels) == 0
    loss.backward()
    assert x.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (fused_margins.CosFaceLoss(C, D, scale=16, margin=0.2), pml.CosFaceLoss(C, D, scale=16, margin=0.2)),
        (
            fused_margins.ArcFaceLoss(C, D, scale=16, margin=0.5),
            pml.ArcFaceLoss(C, D, scale=16, margin=math.degrees(0.5)),
        ),
        (fused_margins.NormalizedSoftmaxLoss(C, D, scale=20), pml.NormalizedSoftmaxLoss(C, D, temperature=0.05)),
    ],
    ids=["CosFace", "ArcFace", "NormalizedSoftmax"],
)
def test_pytorch_metric_learning_agrees(ours, theirs):
    generator = torch.Generator().manual_seed(1)
    x, labels = torch.randn(B, D, generator=generator), torch.randint(C, (B,), generator=generator)
    theirs.W.data = ours.weight.detach().T.clone()
    torch.testing.assert_close(ours(x, labels), theirs(x, labels), rtol=1e-4, atol=1e-5)


def test_all_rows_ignored_is_zero_with_a_graph(batch):
    x, w, labels = batch
    loss = margin_softmax_loss(x, w, torch.full_like(labels, -100), label_smoothing=0.1)
    loss.backward()
    assert loss == 0
    assert (x.grad == 0).all()
    assert (w.grad == 0).all()


def test_one_class_has_no_loss():
    x = torch.randn(4, 3, requires_grad=True)
    loss = margin_softmax_loss(x, torch.randn(1, 3), torch.zeros(4, dtype=torch.int64))
    loss.backward()
    assert loss == 0
    assert (x.grad == 0).all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"reduction": "avg"}, ValueError, "reduction: expected one of 'mean', 'sum', 'none', got 'avg'"),
        ({"margin_type": "arc"}, ValueError, "margin_type: expected one of 'additive'"),
        ({"similarity": "cos"}, ValueError, "similarity: expected one of 'cosine'"),
        ({"beyond_pi": "no", "margin_type": "angular"}, ValueError, "beyond_pi: expected one of"),
        ({"margin_gradient": "no"}, ValueError, "margin_gradient: expected one of"),
        ({"backend": "tpu"}, ValueError, "backend: expected one of 'auto'"),
        ({"scale": 0.0}, ValueError, "scale: expected a positive number, got 0.0"),
        ({"scale": -1.0}, ValueError, "scale: expected a positive number, got -1.0"),
        ({"scale": torch.tensor(-1.0)}, ValueError, "scale: expected positive values, got -1"),
        ({"scale": torch.ones(B)}, ValueError, "scale: expected a number, a 0-d tensor or shape"),
        ({"margin": torch.ones(C + 1)}, ValueError, "margin: expected a number"),
        ({"margin": 4.0, "margin_type": "angular"}, ValueError, "margin: expected radians"),
        ({"margin_type": "combined", "angular_multiplier": "2"}, TypeError, "angular_multiplier: expected a number"),
        ({"margin_type": "combined", "angular_multiplier": torch.ones(2)}, TypeError, "angular_multiplier: expected a"),
        ({"margin": float("nan"), "margin_type": "angular"}, ValueError, "margin: expected radians"),
        ({"margin": "0.5", "margin_type": "angular"}, TypeError, "margin: expected a number or a tensor, got str"),
        ({"margin_type": "combined", "angular_margin_rad": None}, TypeError, "angular_margin_rad: expected a number"),
        ({"margin_type": "angular", "similarity": "dot"}, ValueError, "similarity: expected 'cosine' for margin_type"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing: expected a number in"),
        ({"class_weight": torch.ones(C + 1)}, ValueError, "class_weight: expected a tensor of shape"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_options(batch, options, error, message, backend):
    x, w, labels = batch
    with pytest.raises(error, match=message):
        margin_softmax_loss(x, w, labels, **{"backend": backend, **options})


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_tensors(batch, backend):
    x, w, labels = batch
    for bad in (C, -1):
        wrong = labels.clone()
        wrong[7] = bad
        with pytest.raises(IndexError, match=rf"^labels: expected values in .*, got {bad} in row 7"):
            margin_softmax_loss(x, w, wrong, backend=backend)
        with pytest.raises(IndexError, match=rf"^labels: expected values in .*, got {bad} in row 7"):
            margin_logits(x, w, wrong, backend=backend)
    with pytest.raises(TypeError, match=r"labels: expected an integer dtype, got torch\.float64"):
        margin_softmax_loss(x, w, labels.double(), backend=backend)
    with pytest.raises(ValueError, match=rf"weight: expected width {D} as embeddings has, got {D + 1}"):
        margin_softmax_loss(x, torch.ones(C, D + 1, dtype=torch.float64), labels, backend=backend)
    with pytest.raises(TypeError, match="weight: expected the dtype of embeddings"):
        margin_softmax_loss(x, w.float(), labels, backend=backend)
    with pytest.raises(ValueError, match="embeddings: expected a matrix"):
        margin_softmax_loss(x[0], w, labels, backend=backend)


MODULES = [
    fused_margins.MarginSoftmaxLoss(C, D),
    fused_margins.MarginSoftmaxLoss(
        C, D, margin=torch.linspace(-0.2, 0.2, C), learnable_margin=True, learnable_scale=True
    ),
    fused_margins.MarginSoftmaxLoss(C, D, margin=torch.linspace(-0.2, 0.2, C), class_weight=torch.ones(C)),
    fused_margins.CosFaceLoss(C, D),
    fused_margins.ArcFaceLoss(C, D),
    fused_margins.NegativeMarginLoss(C, D),
    fused_margins.NegativeSoftmaxLoss(C, D),
    fused_margins.NormalizedSoftmaxLoss(C, D),
]


@pytest.mark.parametrize("loss", MODULES, ids=lambda m: type(m).__name__)
def test_modules(loss):
    generator = torch.Generator().manual_seed(2)
    x, labels = torch.randn(B, D, generator=generator), torch.randint(C, (B,), generator=generator)
    value = loss(x, labels)
    value.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in loss.parameters())
    loss.zero_grad(set_to_none=True)

    other = type(loss)(C, D)
    if loss.state_dict().keys() == other.state_dict().keys():  # the plain ones; the others carry more state
        other.load_state_dict(loss.state_dict())
        assert other(x, labels) == value
    assert loss.predictions(x).shape == (B, C)
    assert f"num_classes={C}, embedding_size={D}, scale=" in repr(loss)

    double = loss.double()(x.double(), labels)
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), value, rtol=1e-4, atol=1e-5)
    loss.float()


def test_module_state_carries_learnable_margin_and_scale():
    make = lambda: fused_margins.MarginSoftmaxLoss(C, D, learnable_margin=True, learnable_scale=True)  # noqa: E731
    a, b = make(), make()
    with torch.no_grad():
        a.margin.fill_(0.3)
        a.scale.fill_(11.0)
    b.load_state_dict(a.state_dict())
    assert (b.margin.item(), b.scale.item()) == (pytest.approx(0.3), 11.0)


def test_module_rejects_bad_sizes():
    with pytest.raises(ValueError, match="num_classes: expected at least 1, got 0"):
        fused_margins.CosFaceLoss(0, 4)
    with pytest.raises(ValueError, match=r"margin: expected shape \(3,\), got \(2,\)"):
        fused_margins.MarginSoftmaxLoss(3, 4, margin=torch.ones(2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_narrow_labels_do_not_meet_a_wide_ignore_index(backend):
    x, w = torch.randn(3, 4), torch.randn(300, 4)
    labels = torch.tensor([156, 1, 2])  # 156 is -100 in eight bits
    narrow = margin_softmax_loss(x, w, labels.to(torch.uint8), label_smoothing=0.1, backend=backend)
    assert narrow == margin_softmax_loss(x, w, labels, label_smoothing=0.1, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_empty_batch(backend, label_smoothing):
    x, w = torch.randn(0, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    labels = torch.zeros(0, dtype=torch.int64)
    loss = margin_softmax_loss(x, w, labels, label_smoothing=label_smoothing, backend=backend)
    loss.backward()
    assert loss == 0
    assert (w.grad == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wider_margin_does_not_widen_the_loss(batch, backend):
    x, w, labels = (t.detach() for t in batch)
    margin = torch.linspace(-0.2, 0.2, C, dtype=torch.float64)
    assert margin_softmax_loss(x.float(), w.float(), labels, margin=margin, backend=backend).dtype == torch.float32
    with pytest.raises(TypeError, match=r"margin: expected a floating dtype, got torch\.int64"):
        margin_softmax_loss(x, w, labels, margin=torch.ones(C, dtype=torch.int64), backend=backend)


@pytest.mark.parametrize("similarity", ["cosine", "dot", "negative_squared_euclidean"])
@pytest.mark.parametrize("weighted", [False, True])
def test_label_smoothing_is_accumulated_in_float32_under_autocast(similarity, weighted):
    x, w, labels = torch.randn(16, 256), torch.randn(1000, 256), torch.arange(16)
    class_weight = torch.linspace(0.5, 2, 1000) if weighted else None
    scale = 0.1 if similarity == "negative_squared_euclidean" else 1.0
    options = {"scale": scale, "similarity": similarity, "label_smoothing": 0.5, "class_weight": class_weight}
    truth = margin_softmax_loss(x.bfloat16().double(), w.bfloat16().double(), labels, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = margin_softmax_loss(x, w, labels, **options)
    assert (loss - truth).abs() < 1e-5 * truth


@pytest.mark.parametrize("backend", BACKENDS)
def test_label_smoothing_far_from_the_origin(backend):
    x, w, labels = torch.randn(8, 8) + 1000, torch.randn(20, 8) + 1000, torch.arange(8)
    options = {"scale": 1.0, "similarity": "negative_squared_euclidean", "label_smoothing": 0.2, "backend": backend}
    truth = margin_softmax_loss(x.double(), w.double(), labels, **options)
    torch.testing.assert_close(margin_softmax_loss(x, w, labels, **options).double(), truth, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"margin_type": "angular", "similarity": "dot"},
        {"beyond_pi": "never"},
        {"angular_multiplier": 2.0},
        {"angular_margin_rad": 0.5},
    ],
)
def test_options_are_checked_where_they_do_nothing(batch, options):
    x, w, labels = batch
    for call in (lambda: margin_logits(x, w, **options), lambda: margin_softmax_loss(x, w, labels, **options)):
        with pytest.raises(ValueError, match="expected"):
            call()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_many_losses_are_added_up_without_losing_digits(backend, reduction):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(1 << 16, 4, generator=generator), torch.randn(7, 4, generator=generator)
    labels = torch.randint(7, (1 << 16,), generator=generator)
    options = {"scale": 30.0, "margin": 0.35, "reduction": reduction, "backend": backend}
    ours = margin_softmax_loss(x, weight, labels, **options)
    truth = margin_softmax_loss(x.double(), weight.double(), labels, **options)
    assert abs(float(ours) / float(truth) - 1) < 1e-6
