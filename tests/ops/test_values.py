"""Values that are not ordinary numbers, arguments that are missing, and differentiation in forward mode."""

import numpy as np
import pytest
import torch
from fused_margins.ops.draw import draw

import fused_margins
from fused_margins.functional import magnet_loss, margin_softmax_loss, mine_negatives, mine_positives
from fused_margins.ops import registry
from fused_margins.ops.contrast import contrast
from fused_margins.ops.nearest import nearest
from fused_margins.ops.scores import scores

BACKENDS = [b.name for b in registry.BACKENDS]
X, Y, LABELS = torch.randn(6, 4), torch.randn(5, 4), torch.arange(6) % 5


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("labels", lambda: margin_softmax_loss(X, Y, None)),
        ("labels", lambda: mine_positives(X, None)),
        ("clusters", lambda: magnet_loss(X, None, LABELS)),
        ("target", lambda: contrast(X, Y, None, scale=1.0)),
        ("column_labels", lambda: nearest(X, X, LABELS, None)),
    ],
)
def test_labels_that_are_needed_may_not_be_none(argument, call):
    with pytest.raises(TypeError, match=f"{argument}: expected an integer tensor of shape"):
        call()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("similarity", ["cosine", "dot", "negative_squared_euclidean"])
def test_nan_columns_reach_the_row_that_admits_them(backend, similarity):
    """A whole strip of NaN is neither an empty strip nor nothing."""
    y = torch.randn(1024, 4)
    y[256:512] = torch.nan
    _, negative_lse = contrast(X, y, LABELS, scale=1.0, similarity=similarity, backend=backend)
    assert negative_lse.isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
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
    loss = magnet_loss(x, clusters, classes, reduction=reduction, backend=backend)
    assert loss.isnan().all()
    (grad,) = torch.autograd.grad(loss.sum(), x)
    assert grad.isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_outlier_whose_square_overflows_hides_nobody(backend):
    y = torch.randn(40, 4)
    y[0] = 1e20
    labels = torch.zeros(40, dtype=torch.int64)
    _, index = nearest(
        X, y, labels[:6], labels, similarity="negative_squared_euclidean", relation="any", backend=backend
    )
    assert torch.equal(index[:, 0], torch.cdist(X.double(), y.double()).argmin(1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("similarity", ["cosine", "dot", "negative_squared_euclidean"])
def test_equal_columns_tie_whatever_their_number(backend, similarity):
    for count in range(2, 70, 7):
        y = torch.randn(1, 33).repeat(count, 1)
        labels = torch.zeros(count, dtype=torch.int64)
        _, index = nearest(torch.randn(1, 33), y, labels[:1], labels, similarity=similarity, k=count, backend=backend)
        assert index.tolist() == [list(range(count))]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own forward mode is written in it
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_mode(backend):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (6, 5))
    direction = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    functions = (
        lambda x: margin_softmax_loss(x, y, LABELS, scale=4.0, backend=backend),
        lambda x: scores(x, y, scale=2.0, backend=backend).sum(),
    )
    for f in functions:
        _, tangent = torch.func.jvp(f, (x,), (direction,))
        torch.testing.assert_close(tangent, (torch.func.grad(f)(x) * direction).sum())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_directions_of_very_long_and_very_short_vectors(backend, factor):
    """Their squares are beyond float32."""
    labels = LABELS[:5]
    truth = margin_softmax_loss(X[:5].double(), Y.double(), labels, backend="reference")
    loss = margin_softmax_loss(X[:5] * factor, Y * factor, labels, backend=backend)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", ["3", None, [1.0]])
@pytest.mark.parametrize("argument", ["scale", "margin"])
def test_a_scale_or_margin_that_is_no_number(argument, bad):
    with pytest.raises(TypeError, match=f"{argument}: expected a number or a tensor, got {type(bad).__name__}"):
        margin_softmax_loss(X, Y, LABELS, **{argument: bad})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: margin_softmax_loss(X, Y, LABELS, scale=True), "scale: expected a number or a tensor, got bool"),
        (
            lambda: margin_softmax_loss(X, Y, LABELS, label_smoothing=Y),
            "label_smoothing: expected a number, got Tensor",
        ),
        (lambda: fused_margins.set_memory_budget(True), "num_bytes: expected a number, got bool"),
        (lambda: margin_softmax_loss(X, Y, LABELS, ignore_index=2**63), "ignore_index: expected an integer of 64 bits"),
        (lambda: nearest(X, Y, LABELS, LABELS[:5], k=2**64), "k: expected an integer of 64 bits"),
        (lambda: mine_positives(X[0], LABELS), "embeddings: expected a matrix"),
        (lambda: mine_positives(X, LABELS[:3]), r"labels: expected shape \(6,\), got \(3,\)"),
        (lambda: mine_negatives(X.int(), LABELS), "embeddings: expected a floating dtype"),
        (
            lambda: mine_positives(X, LABELS, reference_embeddings=Y[:, :2], reference_labels=LABELS[:5]),
            "reference_embeddings: expected width 4 as embeddings has, got 2",
        ),
        (
            lambda: mine_negatives(X, LABELS, reference_embeddings=Y, reference_labels=LABELS),
            r"reference_labels: expected shape \(5,\), got \(6,\)",
        ),
    ],
)
def test_arguments_are_called_what_the_caller_calls_them(call, message):
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        call()


@pytest.mark.parametrize("number", [np.float32, np.float64, np.int64])
def test_numbers_of_numpy_are_numbers(number):
    ours = margin_softmax_loss(X, Y, LABELS, scale=number(16), margin=number(1))
    assert ours == margin_softmax_loss(X, Y, LABELS, scale=16.0, margin=1.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_that_are_negated_when_they_are_read(backend, device_for):
    """The imaginary part of a conjugate lies in memory with the other sign."""
    g = torch.Generator().manual_seed(0)
    negated = torch.randn(12, 8, dtype=torch.complex64, generator=g).to(device_for("magnet", backend)).conj().imag
    assert negated.is_neg()
    weight, labels = torch.ones(3, 8).triu().to(negated.device), torch.arange(12, device=negated.device)

    def losses(x):
        x = x.detach().requires_grad_()
        loss = margin_softmax_loss(x, weight, labels % 3, backend=backend) + magnet_loss(
            x, labels % 6, labels[:6] % 3, backend=backend
        )
        return loss.detach(), torch.autograd.grad(loss, x)[0]

    for got, expected in zip(losses(negated), losses(negated.clone())):
        torch.testing.assert_close(got, expected)


WATCHED = {
    "scores": lambda x: scores(x, Y, backend="cpu"),
    "contrast": lambda x: contrast(x, Y, LABELS, scale=2.0, backend="cpu")[1],
    "nearest": lambda x: nearest(x, Y, LABELS, LABELS[:5], relation="different", backend="cpu")[0],
    "draw": lambda x: draw(x, Y, LABELS, LABELS[:5], torch.tensor(3), backend="cpu"),
    "margin_softmax": lambda x: margin_softmax_loss(x, Y, LABELS, reduction="none", backend="cpu"),
    "magnet": lambda x: magnet_loss(x, LABELS % 4, torch.tensor([0, 0, 1, 1]), reduction="none", backend="cpu"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("op", WATCHED)
def test_a_traced_graph_computes_what_was_traced(op, device_for):
    device_for(op, "cpu")
    other = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    traced = torch.jit.trace(WATCHED[op], X, check_trace=False)
    torch.testing.assert_close(traced(other), WATCHED[op](other))


@pytest.mark.parametrize("op", [op for op in WATCHED if op not in ("draw", "nearest")])  # which have no gradient
def test_batched_gradients(op, device_for):
    device_for(op, "cpu")
    expected = torch.autograd.functional.jacobian(WATCHED[op], X)
    torch.testing.assert_close(torch.autograd.functional.jacobian(WATCHED[op], X, vectorize=True), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_value_that_is_not_a_number_is_alone_in_the_gradient(backend, dtype, device_for):
    device_for("scores", backend)
    x, y = X.to(dtype), Y.to(dtype).requires_grad_()
    x[1, 3] = torch.nan
    (grad,) = torch.autograd.grad(scores(x, y, similarity="dot", backend=backend).sum(), y)
    assert grad.isnan().all(0).tolist() == [False, False, False, True]
    assert not grad[:, :3].isnan().any()
