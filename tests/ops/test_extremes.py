"""Where usual formulas lose everything: tiny losses, long and short vectors, near and far points, half precision."""

import math

import pytest
import torch
from fused_margins.ops.similarity import SIMILARITIES
from torch.nn import functional as F

from fused_margins.functional import margin_softmax_loss
from fused_margins.ops import cases, registry
from fused_margins.ops.contrast import contrast
from fused_margins.ops.nearest import nearest
from fused_margins.ops.scores import scores

BACKENDS = [b.name for b in registry.BACKENDS]
EUCLIDEAN = "negative_squared_euclidean"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_gradients_where_all_similarities_are_near_the_scale(dtype, device_for):
    """exp(-logsumexp) is then near the smallest number of float32, and so is what it is multiplied by."""
    device_for("margin_softmax", "cpu")
    g = torch.Generator().manual_seed(0)
    centre = torch.randn(1, 32, generator=g)
    x, y = ((centre + 0.02 * torch.randn(n, 32, generator=g)).to(dtype) for n in (256, 100))
    labels = torch.arange(256) % 100

    def gradients(x, y, backend):
        x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
        loss = margin_softmax_loss(x, y, labels, scale=80.0, margin=-0.3, backend=backend)
        return torch.autograd.grad(loss, [x, y])

    for got, true in zip(gradients(x, y, "cpu"), gradients(x.double(), y.double(), "reference")):
        assert (got - true).norm() <= (1e-4 if dtype == torch.float32 else 1e-2) * true.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loss_far_below_the_rounding_of_its_logits(backend, device_for):
    """Scale 64, margin 0.35, 1e5 classes, cosine 0.85 to the right one, 0.0608 to the others: the loss is 6.24e-8."""
    device_for("contrast", backend)
    classes, scale, margin, cosine = 100_000, 64.0, 0.35, 0.0608
    others = torch.tensor([cosine, 0.0, math.sqrt(1 - cosine**2)])
    weight = others.repeat(classes, 1)
    weight[7] = torch.tensor([0.85, math.sqrt(1 - 0.85**2), 0.0])
    x = torch.tensor([[1.0, 0.0, 0.0]], requires_grad=True)
    positive, negative_lse = contrast(x, weight, torch.tensor([7]), scale=scale, backend=backend)
    logit = scale * (positive - margin)
    loss = F.softplus(negative_lse - logit)
    expected = math.log1p((classes - 1) * math.exp(scale * (cosine - (0.85 - margin))))
    assert expected == pytest.approx(6.24e-8, rel=0.01)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    (grad,) = torch.autograd.grad(loss, x)
    # d loss / d cosine of the right class is scale * loss, and x turns towards it by the part at right angles.
    assert grad[0, 1].item() == pytest.approx(-scale * expected * math.sqrt(1 - 0.85**2), rel=1e-3)
    # What is lost otherwise: the log-sum-exp over all classes minus the logit is exactly 0.
    assert (torch.logaddexp(negative_lse, logit) - logit).item() == 0


@pytest.mark.parametrize("length", [1e-38, 1e-30, 1e-20, 1e-3, 1e18, 1e30, 1e38])
def test_cosines_of_vectors_of_any_length(length, device_for):
    """Squares of these lengths leave float32's range; the C++ kernels square in double."""
    device_for("scores", "cpu")
    g = torch.Generator().manual_seed(0)
    direction = torch.randn(5, 9, generator=g)
    x = (F.normalize(direction) * length).requires_grad_()
    y = torch.randn(7, 9, generator=g)
    u = scores(x, y, backend="cpu")
    exact = x.detach().double().requires_grad_()
    truth = scores(exact, y.double(), backend="reference")
    torch.testing.assert_close(u.double(), truth, rtol=0, atol=1e-6)
    weights = torch.randn(5, 7, generator=g)
    (grad,) = torch.autograd.grad(u, x, weights)
    (expected,) = torch.autograd.grad(truth, exact, weights.double())
    torch.testing.assert_close(grad.double() * length, expected * length, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [1e-300, 1e-160, 1e160, 1e300])
def test_cosines_of_float64_vectors_of_any_length(length, backend, device_for):
    """Squares of these lengths leave float64's range, too."""
    device_for("scores", backend)
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 9, generator=g, dtype=torch.float64) for n in (5, 7))
    long = (x * length).requires_grad_()
    u = scores(long, y, backend=backend)
    expected = scores(x.requires_grad_(), y, backend="reference")
    torch.testing.assert_close(u, expected, rtol=0, atol=1e-14)
    weights = torch.randn(5, 7, generator=g, dtype=torch.float64)
    (grad,) = torch.autograd.grad(u, long, weights)
    torch.testing.assert_close(grad * length, torch.autograd.grad(expected, x, weights)[0], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_vectors_of_subnormal_numbers_count_as_zero(backend, device_for):
    device_for("scores", backend)
    x = torch.full((2, 4), 1e-41, requires_grad=True)
    u = scores(x, torch.ones(3, 4), backend=backend)
    assert not u.any()
    assert not torch.autograd.grad(u.sum(), x)[0].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", registry.OPS)
def test_half_precision_whose_squares_overflow(op, backend, device_for):
    """|x|^2 of 512 numbers near 300 is 4.6e7, far above float16's 65504."""
    device_for(op, backend)
    names = ("cosine-same", "cosine-mean", "logits", "batch-mean", "different")
    found = next(c for c in cases.load(op).CASES if c.name in names)
    inputs = found.make(torch.Generator().manual_seed(0))
    inputs |= {n: 300 + 10 * torch.randn(inputs[n].shape[0], 512).double() for n in ("x", "y") if n in inputs}
    assert cases.disagreements(cases.load(op), inputs, backend, torch.float16) == []
    if op not in ("scores", "magnet", "draw"):  # float16 outputs; distances in any case
        inputs |= {"similarity": EUCLIDEAN} | ({"scale": 1e-4} if op in ("contrast", "margin_softmax") else {})
        assert cases.disagreements(cases.load(op), inputs, backend, torch.float16) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_nearest_of_points_that_only_their_differences_tell_apart(backend, device_for):
    """Points on a grid of 1/64 about 10000 from the origin: exact in float32, though no expanded distance is."""
    device_for("nearest", backend)
    g = torch.Generator().manual_seed(0)
    x, y = ((10_000 + torch.randint(-40, 41, (n, 5), generator=g) / 64).float() for n in (61, 97))
    x[::2] -= 20_000  # two clouds: the common centre is far from both
    y[::2] -= 20_000
    labels = {"row_labels": torch.arange(61) % 3, "column_labels": torch.arange(97) % 3}
    options = {"similarity": EUCLIDEAN, "relation": "different", "k": 10}
    similarity, index = nearest(x, y, **labels, **options, backend=backend)
    true_similarity, true_index = nearest(x.double(), y.double(), **labels, **options, backend="reference")
    assert torch.equal(index, true_index)
    assert torch.equal(similarity.double(), true_similarity)


@pytest.mark.parametrize("similarity", ["dot", "cosine", EUCLIDEAN])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_columns_tie_whatever_their_place(backend, similarity, device_for):
    """Numbers that no dtype holds exactly: copies of one column must still give the same bits, wherever they stand."""
    device_for("nearest", backend)
    for rows, columns, width in ((1, 53, 19), (31, 271, 23), (37, 131, 64), (7, 2311, 5)):
        g = torch.Generator().manual_seed(rows)
        x, y = torch.randn(rows, width, generator=g), torch.randn(1, width, generator=g).repeat(columns, 1)
        labels = torch.zeros(rows, dtype=torch.int64), torch.zeros(columns, dtype=torch.int64)
        _, index = nearest(x, y, *labels, similarity=similarity, k=10, backend=backend)
        assert torch.equal(index, torch.arange(10).expand(rows, 10))


@pytest.mark.parametrize("backend", BACKENDS)
def test_near_duplicates_are_neighbours_not_the_row_itself(backend, device_for):
    device_for("nearest", backend)
    x = torch.randn(20, 16)
    x[1] = x[0] + 1e-6
    x[3] = x[2]
    labels = torch.zeros(20, dtype=torch.int64)
    for similarity in ("cosine", EUCLIDEAN):
        options = {"similarity": similarity, "self_index": torch.arange(20), "backend": backend}
        _, index = nearest(x, x, labels, labels, **options)
        assert index[:4, 0].tolist() == [1, 0, 3, 2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_memory_bank_that_holds_the_batch(backend, device_for):
    """The batch is enqueued before it is mined: each row must find a positive other than its own copy."""
    device_for("nearest", backend)
    batch, labels = torch.randn(12, 8), torch.arange(12) % 4
    bank, bank_labels = torch.cat([torch.randn(30, 8), batch]), torch.cat([torch.arange(30) % 4, labels])
    own = torch.arange(30, 42)
    similarity, index = nearest(batch, bank, labels, bank_labels, self_index=own, backend=backend)
    assert (index[:, 0] != own).all()
    assert (index >= 0).all()
    assert (similarity < 1 - 1e-4).all()
    assert torch.equal(bank_labels[index[:, 0]], labels)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_not_a_number_stays_in_its_row(backend, dtype, similarity, device_for):
    device_for("contrast", backend)
    x, y = torch.randn(5, 6).to(dtype), torch.randn(7, 6).to(dtype)
    x[2, 3] = torch.nan
    options = {"similarity": similarity, "backend": backend}
    positive, negative_lse = contrast(x, y, torch.arange(5), scale=10.0, **options)
    for values in (positive, negative_lse):
        assert values.isnan().tolist() == [False, False, True, False, False]
    assert scores(x, y, **options).isnan().any(1).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_outlier_whose_square_overflows_hides_no_other_column(backend, device_for):
    device_for("nearest", backend)
    x, y = torch.randn(11, 5), torch.randn(40, 5)
    labels = torch.zeros(11, dtype=torch.int64), torch.zeros(40, dtype=torch.int64)
    options = {"similarity": EUCLIDEAN, "k": 3, "backend": backend}
    expected = nearest(x, y[1:], labels[0], labels[1][1:], **options)
    y[0] = 1e25
    similarity, index = nearest(x, y, *labels, **options)
    assert torch.equal(similarity, expected[0])
    assert torch.equal(index, expected[1] + 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_distance_is_negative(backend, dtype, device_for):
    device_for("scores", backend)
    x = (5 + torch.randn(60, 33)).to(dtype)
    u = scores(x, x, similarity=EUCLIDEAN, backend=backend)
    assert (u <= 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_16_bits_is_read_and_written(backend, dtype, device_for):
    device_for("scores", backend)
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    one = torch.ones(1, 1)
    target = torch.zeros(2**16, dtype=torch.int64)
    positive, _ = contrast(every[:, None], one.to(dtype), target, scale=1.0, similarity="dot", backend=backend)
    torch.testing.assert_close(positive, every.float(), rtol=0, atol=0, equal_nan=True)
    z = scores(every[:, None], one.to(dtype), similarity="dot", backend=backend)
    torch.testing.assert_close(z[:, 0], every, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_are_rounded_to_the_nearest_number_of_16_bits(backend, dtype, device_for):
    """A product of 1 and a scale is any float32: between two neighbours, half-way, subnormal, too large."""
    device_for("scores", backend)
    every = torch.arange(1, 2**15).to(torch.int16).view(dtype).float()
    finite = every[every.isfinite()]
    halfway = finite[1:] / 2 + finite[:-1] / 2  # exact in float32
    scale = torch.cat([halfway, halfway.nextafter(finite[1:]), halfway.nextafter(finite[:-1]), halfway * 1.0001])
    scale = torch.cat([scale, torch.tensor([65519.0, 65520.0, 65521.0, 3.38e38, 3.4e38])])
    x = torch.ones(scale.shape[0], 1, dtype=dtype)
    for sign in (1, -1):
        z = scores(x, sign * torch.ones(1, 1, dtype=dtype), scale=scale, similarity="dot", backend=backend)[:, 0]
        assert torch.equal(z, (sign * scale).to(dtype))


def _gradients(x, y, labels, backend, weight=1.0, **options):
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    return torch.autograd.grad(weight * margin_softmax_loss(x, y, labels, backend=backend, **options), [x, y])


@pytest.mark.parametrize("similarity", [EUCLIDEAN, "dot"])
def test_a_block_of_columns_that_admits_nothing_for_a_row(similarity, device_for):
    """193 columns: the own class of some rows is the only one in its block, and all others are far away."""
    device_for("margin_softmax", "cpu")
    g = torch.Generator().manual_seed(0)
    x, y = 4 * torch.rand(64, 128, generator=g), -4 * torch.rand(193, 128, generator=g)
    labels = torch.arange(64) * 3 + 3
    options = {"scale": 1.0, "similarity": similarity}
    truth = _gradients(x.double(), y.double(), labels, "reference", **options)
    for got, true in zip(_gradients(x, y, labels, "cpu", **options), truth):
        assert (got - true).norm() <= 1e-4 * true.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("weight", [1.0, 1e-9])
def test_gradients_where_some_rows_agree_with_all_classes_and_some_with_none(dtype, weight, device_for):
    """Their exp(-logsumexp) are 60 orders of magnitude apart."""
    device_for("margin_softmax", "cpu")
    g = torch.Generator().manual_seed(0)
    centre = torch.randn(1, 32, generator=g)
    x, y = ((centre + 0.05 * torch.randn(n, 32, generator=g)).to(dtype) for n in (256, 100))
    x[::8] = -x[::8]
    labels = torch.randint(100, (256,), generator=g)
    options = {"scale": 79.0, "margin": -0.1, "weight": weight}
    truth = _gradients(x.double(), y.double(), labels, "reference", **options)
    for got, true in zip(_gradients(x, y, labels, "cpu", **options), truth):
        assert (got - true).norm() <= (1e-4 if dtype == torch.float32 else 1e-2) * true.norm()


@pytest.mark.parametrize("length", [1e-20, 1e30])
def test_gradients_of_classes_from_rows_far_from_unit_length(length, device_for):
    device_for("margin_softmax", "cpu")
    g = torch.Generator().manual_seed(0)
    x, y = length * torch.randn(64, 32, generator=g), torch.randn(50, 32, generator=g)
    labels = torch.randint(50, (64,), generator=g)
    true = _gradients(x.double(), y.double(), labels, "reference", scale=64.0)[1]
    assert (_gradients(x, y, labels, "cpu", scale=64.0)[1] - true).norm() <= 1e-4 * true.norm()


@pytest.mark.parametrize("relation", ["any", "same"])
def test_an_infinite_similarity_is_the_nearest(relation, device_for):
    device_for("nearest", "cpu")
    x, label = torch.tensor([[1e30]]), torch.zeros(1, dtype=torch.long)
    best, index = nearest(x, x, label, label, relation=relation, similarity="dot", backend="cpu")
    assert best.item() == math.inf
    assert index.item() == 0


def test_factors_of_bfloat16_rows_whose_product_overflows(device_for):
    device_for("nearest", "cpu")
    x, y = torch.zeros(1, 4), torch.zeros(2, 4)
    x[0, 0] = y[0, 1] = y[1, 1] = 2.0**65
    y[1, 0] = 2.0**50
    zeros = torch.zeros(2, dtype=torch.long)
    options = {"relation": "any", "similarity": "dot", "backend": "cpu"}
    best, index = nearest(x.bfloat16(), y.bfloat16(), zeros[:1], zeros, **options)
    assert best.item() == 2.0**115
    assert index.item() == 1
