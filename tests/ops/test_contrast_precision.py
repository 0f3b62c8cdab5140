"""`contrast` where usual formulas lose everything: tiny losses, huge logits, long and short vectors, no numbers."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fused_margins.backends import registry
from fused_margins.core.enums import Similarity
from fused_margins.functional import margin_softmax_loss
from fused_margins.ops import cases
from fused_margins.ops.contrast import contrast, kernel_cpu
from tests.conftest import backends

OP = cases.load("contrast")
EUCLIDEAN = "negative_squared_euclidean"
on_every_backend = pytest.mark.parametrize("backend", backends("contrast"))
on_every_kernel = pytest.mark.parametrize("backend", backends("contrast", reference=False))
of_losses = pytest.mark.parametrize("backend", backends("contrast", reference=False, epilogue="margin_softmax"))
on_cpu = pytest.mark.parametrize("backend", [b for b in backends("contrast") if b == "cpu"])
BY_WIDTH = {"argvalues": [torch.float32, torch.bfloat16], "ids": ["float32", "bfloat16"]}


@on_every_backend
def test_a_loss_far_below_the_rounding_of_its_logits(backend, device_for):
    """Scale 64, margin 0.35, 1e5 classes, cosine 0.85 to the right one, 0.0608 to the others: the loss is 6.24e-8."""
    device = device_for("contrast", backend)
    classes, scale, margin, cosine = 100_000, 64.0, 0.35, 0.0608
    others = torch.tensor([cosine, 0.0, math.sqrt(1 - cosine**2)])
    weight = others.repeat(classes, 1)
    weight[7] = torch.tensor([0.85, math.sqrt(1 - 0.85**2), 0.0])
    x, weight = torch.tensor([[1.0, 0.0, 0.0]], device=device, requires_grad=True), weight.to(device)
    target = torch.tensor([7], device=device)
    positive, negative_lse = contrast(x, weight, target, scale=scale, backend=backend)
    logit = scale * (positive - margin)
    by_rows = F.softplus(negative_lse - logit)
    fused = contrast(x, weight, target, scale=scale, margin=margin, epilogue="margin_softmax", backend=backend)
    expected = math.log1p((classes - 1) * math.exp(scale * (cosine - (0.85 - margin))))
    assert expected == pytest.approx(6.24e-8, rel=0.01)
    for loss in (by_rows, fused):
        assert loss.item() == pytest.approx(expected, rel=1e-4)
        (grad,) = torch.autograd.grad(loss, x)
        # d loss / d cosine of the right class is scale * loss, and x turns towards it by the part at right angles.
        assert grad[0, 1].item() == pytest.approx(-scale * expected * math.sqrt(1 - 0.85**2), rel=1e-3)
    # What is lost otherwise: the log-sum-exp over all classes minus the logit is exactly 0.
    assert (torch.logaddexp(negative_lse, logit) - logit).item() == 0


def loss_gradients(x: Tensor, y: Tensor, labels: Tensor, backend: str, weight: float = 1.0, **options: Any) -> Any:
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    return torch.autograd.grad(weight * margin_softmax_loss(x, y, labels, backend=backend, **options), [x, y])


def assert_near_the_truth(x: Tensor, y: Tensor, labels: Tensor, backend: str, **options: Any) -> None:
    """Gradients of the loss, in norm."""
    truth = loss_gradients(x.double(), y.double(), labels, "reference", **options)
    for got, true in zip(loss_gradients(x, y, labels, backend, **options), truth):
        assert (got - true).norm() <= (1e-4 if x.dtype == torch.float32 else 1e-2) * true.norm()


@pytest.mark.parametrize("dtype", **BY_WIDTH)
@on_cpu
def test_gradients_where_all_similarities_are_near_the_scale(dtype, backend):
    """exp(-logsumexp) is then near the smallest number of float32, and so is what it is multiplied by."""
    g = torch.Generator().manual_seed(0)
    centre = torch.randn(1, 32, generator=g)
    x, y = ((centre + 0.02 * torch.randn(n, 32, generator=g)).to(dtype) for n in (256, 100))
    assert_near_the_truth(x, y, torch.arange(256) % 100, backend, scale=80.0, margin=-0.3)


@pytest.mark.parametrize("similarity", [EUCLIDEAN, "dot"])
@on_cpu
@pytest.mark.interpreted
def test_a_block_of_columns_that_admits_nothing_for_a_row(similarity, backend):
    """385 columns: the own class of a row is the only one in its block, and all others are far away."""
    g = torch.Generator().manual_seed(0)
    x, y = 4 * torch.rand(64, 128, generator=g), -4 * torch.rand(385, 128, generator=g)
    assert_near_the_truth(x, y, torch.arange(64) * 6 + 6, backend, scale=1.0, similarity=similarity)


@pytest.mark.parametrize("dtype", **BY_WIDTH)
@pytest.mark.parametrize("weight", [1.0, 1e-9])
@on_cpu
def test_gradients_where_some_rows_agree_with_all_classes_and_some_with_none(dtype, weight, backend):
    """Their exp(-logsumexp) are 60 orders of magnitude apart."""
    g = torch.Generator().manual_seed(0)
    centre = torch.randn(1, 32, generator=g)
    x, y = ((centre + 0.05 * torch.randn(n, 32, generator=g)).to(dtype) for n in (256, 100))
    x[::8] = -x[::8]
    labels = torch.randint(100, (256,), generator=g)
    assert_near_the_truth(x, y, labels, backend, scale=79.0, margin=-0.1, weight=weight)


@pytest.mark.parametrize("length", [1e-20, 1e30])
@on_cpu
def test_gradients_of_classes_from_rows_far_from_unit_length(length, backend):
    g = torch.Generator().manual_seed(0)
    x, y = length * torch.randn(64, 32, generator=g), torch.randn(50, 32, generator=g)
    labels = torch.randint(50, (64,), generator=g)
    true = loss_gradients(x.double(), y.double(), labels, "reference", scale=64.0)[1]
    assert (loss_gradients(x, y, labels, backend, scale=64.0)[1] - true).norm() <= 1e-4 * true.norm()


@of_losses
@pytest.mark.parametrize("factor", [1e-30, 1e30])
@pytest.mark.interpreted
def test_directions_of_very_long_and_very_short_vectors(backend, factor, device_for):
    """Their squares are beyond float32."""
    device, g = device_for("contrast", backend, epilogue="margin_softmax"), torch.Generator().manual_seed(0)
    x, y, labels = torch.randn(5, 4, generator=g), torch.randn(5, 4, generator=g), torch.arange(5)
    x, y, labels = x.to(device), y.to(device), labels.to(device)
    truth = margin_softmax_loss(x.double(), y.double(), labels, backend="reference")
    loss = margin_softmax_loss(x * factor, y * factor, labels, backend=backend)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("similarity", ["dot", EUCLIDEAN])
@pytest.mark.parametrize("size", [1e3, 1e4, 5e4, 2e5])
@on_cpu
@pytest.mark.interpreted
def test_logits_whose_own_rounding_is_one_and_more(similarity, size, backend):
    """The largest exponential is 1: the loss and its gradients are still the definition's."""
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 16, generator=g) * size for n in (64, 50))
    target = torch.randint(50, (64,), generator=g)
    options = {"scale": 30.0, "margin": 0.1, "similarity": similarity, "epilogue": "margin_softmax"}
    results = []
    for name in (backend, "reference"):
        leaves = x.clone().requires_grad_(), y.clone().requires_grad_()
        loss = contrast(*leaves, target, **options, backend=name)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for got, expected in zip(*results):
        assert got.isfinite().all()
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 16.0, 64.0, 82.0])
@pytest.mark.parametrize("name", ["softmax", "poles", "pointing-away", "some-ignored", "zero-rows", "one-class"])
@on_cpu
def test_with_and_without_a_running_maximum(name, scale, dtype, backend, monkeypatch):
    """Up to about scale + ln N = 86 both apply."""
    case = next(c for c in OP.CASES if c.name == name)
    inputs = cases.convert(case.make(torch.Generator().manual_seed(0)) | {"scale": scale}, dtype)
    plain = OP.run(inputs, backend)
    monkeypatch.setattr(kernel_cpu, "force_running_maximum", True)
    with registry.substitute("contrast", backend, kernel_cpu):  # no route of the first call
        shifted = OP.run(inputs, backend)
    assert torch.equal(plain["positive"], shifted["positive"])
    assert torch.equal(plain["negative_lse"] == -torch.inf, shifted["negative_lse"] == -torch.inf)
    # Relative errors of the sums, a few units each and more where logits are large, are absolute errors of logarithms.
    error = 8 * torch.finfo(plain["positive"].dtype).eps * (1 + scale)
    torch.testing.assert_close(plain["negative_lse"], shifted["negative_lse"], rtol=0, atol=error)


@on_cpu
def test_the_running_maximum_starts_where_it_must(backend):
    """Just below the limit nothing overflows; just above it the sum without a maximum would."""
    columns = 1000
    x, y = torch.ones(2, 8), torch.ones(columns, 8)
    for scale in (86 - math.log(columns) - 0.1, 86 - math.log(columns) + 0.1, 88.0, 512.0):
        lse = contrast(x, y, torch.tensor([0, 5]), scale=scale, backend=backend)[1]
        torch.testing.assert_close(lse, torch.full((2,), scale + math.log(columns - 1)), rtol=1e-6, atol=0)


@of_losses
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("noise", [30.0, 1.0], ids=["untrained", "trained"])
def test_gradients_of_16_bits_have_at_most_half_the_error_of_eager_pytorch(noise, dtype, backend, device_for):
    """Sums in float32 are worth it against what PyTorch does in 16 bits."""
    device, scale, margin = device_for("contrast", backend, epilogue="margin_softmax"), 16.0, -0.1
    g = torch.Generator().manual_seed(0)
    weight, labels = torch.randn(60, 96, generator=g), torch.randint(60, (64,), generator=g)
    embeddings = weight[labels] + noise * torch.randn(64, 96, generator=g)
    embeddings, weight, labels = embeddings.to(device, dtype), weight.to(device, dtype), labels.to(device)

    def eager(x: Tensor, y: Tensor) -> Tensor:
        z = F.linear(scale * F.normalize(x), F.normalize(y))
        z = z.scatter_add(1, labels[:, None], z.new_full((1, 1), -scale * margin).expand(len(labels), 1))
        return F.cross_entropy(z, labels)

    options = {"scale": scale, "margin": margin}
    truth = loss_gradients(embeddings.double(), weight.double(), labels, "reference", **options)
    ours = loss_gradients(embeddings, weight, labels, backend, **options)
    leaves = embeddings.requires_grad_(), weight.requires_grad_()
    for right, our, their in zip(truth, ours, torch.autograd.grad(eager(*leaves), leaves)):
        assert (our.double() - right).norm() <= (their.double() - right).norm() / 2


@on_every_backend
@pytest.mark.parametrize("similarity", Similarity.names())
@pytest.mark.interpreted
def test_nan_columns_reach_the_row_that_admits_them(backend, similarity):
    """A whole strip of NaN is neither an empty strip nor nothing."""
    y = torch.randn(1024, 4)
    y[256:512] = torch.nan
    _, lse = contrast(torch.randn(6, 4), y, torch.arange(6), scale=1.0, similarity=similarity, backend=backend)
    assert lse.isnan().all()


@on_every_backend
@pytest.mark.parametrize("similarity", Similarity.names())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.interpreted
def test_not_a_number_stays_in_its_row(backend, dtype, similarity):
    x, y = torch.randn(5, 6).to(dtype), torch.randn(7, 6).to(dtype)
    x[2, 3] = torch.nan
    for values in contrast(x, y, torch.arange(5), scale=10.0, similarity=similarity, backend=backend):
        assert values.isnan().tolist() == [False, False, True, False, False]


@on_every_backend
@pytest.mark.interpreted
def test_gradient_at_the_edges_is_exactly_zero(backend, device_for):
    """Zero vectors under cosine, ignored rows, rows that admit nothing: 0, not NaN, and not nearly 0."""
    device = device_for("contrast", backend)
    x, y = torch.randn(4, 6), torch.randn(5, 6)
    x[1] = 0
    y[2] = 0
    x, y = x.to(device).requires_grad_(), y.to(device).requires_grad_()
    target, ones = torch.tensor([0, 1, -1, 3], device=device), torch.ones(4, device=device)
    labels = {"row_labels": torch.tensor([0, 0, 0, 9]), "column_labels": torch.tensor([0, 1, 0, 1, 9])}
    labels = {n: t.to(device) for n, t in labels.items()}
    positive, negative_lse = contrast(x, y, target, **labels, relation="same", scale=20.0, backend=backend)
    assert positive[1:3].tolist() == [0, 0]
    assert negative_lse[2] == -torch.inf
    grad_x, grad_y = torch.autograd.grad((positive, negative_lse), (x, y), (ones, ones))
    assert not grad_x[1:3].any()
    assert not grad_y[2].any()
    assert grad_x[0].any()
    assert grad_x[3].any()


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_16_bits_is_read(backend, dtype):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    one, target = torch.ones(1, 1).to(dtype), torch.zeros(2**16, dtype=torch.int64)
    positive, _ = contrast(every[:, None], one, target, scale=1.0, similarity="dot", backend=backend)
    torch.testing.assert_close(positive, every.float(), rtol=0, atol=0, equal_nan=True)


@on_every_kernel
@pytest.mark.parametrize("similarity", [None, EUCLIDEAN], ids=["default", "euclidean"])
@pytest.mark.interpreted
def test_half_precision_whose_squares_overflow(similarity, backend, device_for):
    """|x|^2 of 96 numbers near 300 is 8.6e6, and |x - y|^2 1.2e5: above float16's 65504."""
    device = device_for("contrast", backend)
    for name in ("cosine-same", "margin_softmax-cosine-mean"):
        inputs = next(c for c in OP.CASES if c.name == name).make(torch.Generator().manual_seed(0))
        inputs |= {n: 300 + 25 * torch.randn(inputs[n].shape[0], 96).double() for n in ("x", "y")}
        inputs |= {"similarity": similarity, "scale": 1e-4} if similarity else {}
        assert cases.disagreements(OP, inputs, backend, torch.float16, device=device) == []
