"""The easy-positive losses against plain loops, a peer, and the mistakes of existing code."""

import copy

import pytest
import torch
from pytorch_metric_learning import distances, miners, reducers
from pytorch_metric_learning import losses as pml
from torch import Tensor
from torch.nn import functional as F

from fused_margins import EasyPositiveInfoNCELoss, EasyPositiveMarginLoss, EasyPositiveTripletLoss, NTXentLoss
from fused_margins.mining import NEGATIVES, POSITIVES

BACKENDS = ("reference", "cpu")
SIMILARITIES = {
    "negative_squared_euclidean": lambda a, b: -(a - b).square().sum(),
    "cosine": lambda a, b: F.cosine_similarity(a, b, dim=0),
    "dot": lambda a, b: (a * b).sum(),
}
ALL = (EasyPositiveTripletLoss, EasyPositiveMarginLoss, EasyPositiveInfoNCELoss)


@pytest.fixture(params=BACKENDS)
def backend(request, device_for) -> str:
    device_for("nearest", request.param)  # or skip, with the reason
    return request.param


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    """24 anchors of 5 classes; class 4 has one member."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(4, (24,), generator=generator)
    labels[7] = 4
    return torch.randn(24, 6, generator=generator, dtype=torch.float64).requires_grad_(), labels


def plain_choice(x: Tensor, labels: Tensor, u, negatives: str) -> list[tuple[int | None, int | None]]:
    """(positive, negative) of each anchor, None where there is none."""
    chosen, x = [], x.detach()
    for i in range(len(x)):
        similarity = [float(u(x[i], x[j])) for j in range(len(x))]
        same = [j for j in range(len(x)) if j != i and labels[j] == labels[i]]
        other = [j for j in range(len(x)) if labels[j] != labels[i]]
        positive = max(same, key=lambda j: similarity[j], default=None)
        if negatives == "semihard":
            other = [j for j in other if positive is not None and similarity[j] < similarity[positive]]
        chosen.append((positive, max(other, key=lambda j: similarity[j], default=None)))
    return chosen


def assert_same_loss_and_gradients(ours: Tensor, theirs: Tensor, inputs: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("negatives", ["hard", "semihard"])
@pytest.mark.parametrize("normalize", [True, False])
def test_triplet_is_its_formula(batch, backend, similarity, negatives, normalize):
    x, labels = batch
    u = SIMILARITIES[similarity]
    z = x / x.norm(dim=1, keepdim=True) if normalize else x
    terms = []
    for i, (p, n) in enumerate(plain_choice(z, labels, u, negatives)):
        if p is not None and n is not None:
            terms.append((u(z[i], z[n]) - u(z[i], z[p]) + 0.2).clamp(min=0))
    options = {"negatives": negatives, "similarity": similarity, "normalize": normalize, "backend": backend}
    theirs = torch.stack(terms)
    ours = EasyPositiveTripletLoss(0.2, **options)(x, labels)
    assert_same_loss_and_gradients(ours, theirs.mean(), (x,))
    torch.testing.assert_close(EasyPositiveTripletLoss(0.2, reduction="sum", **options)(x, labels), theirs.sum())
    each = EasyPositiveTripletLoss(0.2, reduction="none", **options)(x, labels)
    assert each.shape == (24,)
    assert each[7] == 0
    torch.testing.assert_close(each.sum(), theirs.sum())


@pytest.mark.parametrize("negatives", ["hard", "semihard"])
def test_triplet_agrees_with_a_peer(batch, backend, negatives):
    x, labels = batch
    distance = distances.LpDistance(power=2)  # the squared distance of unit vectors
    mined = miners.BatchEasyHardMiner(pos_strategy="easy", neg_strategy=negatives, distance=distance)(x, labels)
    peer = pml.TripletMarginLoss(margin=0.2, distance=distance, reducer=reducers.MeanReducer())
    ours = EasyPositiveTripletLoss(0.2, negatives, backend=backend)(x, labels)
    assert_same_loss_and_gradients(ours, peer(x, labels, mined), (x,))


@pytest.mark.parametrize("negatives", ["hard", "semihard"])
@pytest.mark.parametrize("num_classes", [None, 5])
def test_margin_loss_is_its_formula(batch, backend, negatives, num_classes):
    x, labels = batch
    loss = EasyPositiveMarginLoss(num_classes, 0.2, 1.1, negatives, backend=backend).double()
    if num_classes:
        loss.beta.data += torch.linspace(-0.2, 0.2, 5, dtype=torch.float64)
    z = x / x.norm(dim=1, keepdim=True)
    u = SIMILARITIES["negative_squared_euclidean"]
    terms = []
    for i, (p, n) in enumerate(plain_choice(z, labels, u, negatives)):
        beta = loss.beta[labels[i]] if num_classes else loss.beta
        if p is not None:
            terms.append(((z[i] - z[p]).norm() - beta + 0.2).clamp(min=0))
        if p is not None and n is not None:
            terms.append((beta - (z[i] - z[n]).norm() + 0.2).clamp(min=0))
    theirs = torch.stack(terms)
    assert 0 < int((theirs > 0).sum()) < len(terms)  # the mean is over the terms above 0 alone
    inputs = (x, loss.beta) if num_classes else (x,)
    assert_same_loss_and_gradients(loss(x, labels), theirs.sum() / (theirs > 0).sum(), inputs)


def test_infonce_is_its_formula(batch, backend):
    x, labels = batch
    u = SIMILARITIES["cosine"]
    terms = []
    for i, (p, _) in enumerate(plain_choice(x, labels, u, "hard")):
        if p is not None:
            others = [u(x[i], x[j]) / 0.2 for j in range(len(x)) if labels[j] != labels[i]]
            logits = torch.stack([u(x[i], x[p]) / 0.2, *others])
            terms.append(F.cross_entropy(logits[None], torch.tensor([0])))
    loss = EasyPositiveInfoNCELoss(0.2, backend=backend)
    assert_same_loss_and_gradients(loss(x, labels), torch.stack(terms).mean(), (x,))


@pytest.mark.parametrize("kind", ALL)
def test_gradients_by_finite_differences(backend, kind):
    x = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 3])
    bank = x.detach()[torch.randperm(9)] + 0.3
    options = {} if kind is EasyPositiveInfoNCELoss else {"negatives": "hard"}
    loss = kind(backend=backend, **options)
    assert torch.autograd.gradcheck(lambda x: loss(x, labels), (x,))
    assert torch.autograd.gradcheck(lambda x, y: loss(x, labels, y, labels), (x, bank.requires_grad_()))


@pytest.mark.parametrize("kind", ALL)
def test_a_bank_that_holds_the_batch_costs_no_positive(batch, backend, kind):
    # Trap: self is the nearest entry of such a bank; removed afterwards, it leaves the anchor without a positive.
    x, labels = batch[0].detach(), batch[1]
    older = torch.randn(10, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    older_labels = torch.full((10,), 9)
    options = {} if kind is EasyPositiveInfoNCELoss else {"negatives": "hard"}
    loss = kind(reduction="none", backend=backend, **options)
    bank, bank_labels = torch.cat([older, x]), torch.cat([older_labels, labels])
    with_bank = loss(x, labels, bank, bank_labels, torch.arange(24) + 10)
    within_batch = loss(torch.cat([x, older]), torch.cat([labels, older_labels]))[:24]
    torch.testing.assert_close(with_bank, within_batch)
    assert with_bank[7] == 0  # alone but for itself
    # Without self_index the entry counts as another sample: every anchor is its own positive, at no distance.
    unaware = loss(x, labels, bank, bank_labels)
    assert (unaware[labels < 4] < within_batch[labels < 4]).any()


def test_near_duplicates_are_positives(backend):
    # Trap: a similarity above 0.9999 taken for "self" drops them; self is an index here.
    x = torch.tensor([[1.0, 0.0], [1.0, 1e-4], [0.0, 1.0], [1e-4, 1.0], [-1.0, 0.0]])
    labels = torch.tensor([0, 0, 0, 0, 1])
    each = EasyPositiveMarginLoss(margin=0.2, beta=1e-3, negatives="hard", reduction="none", backend=backend)(x, labels)
    torch.testing.assert_close(each[:4], torch.full((4,), 0.1991))


@pytest.mark.parametrize("kind", ALL)
def test_duplicates_have_finite_gradients(backend, kind):
    # Trap: easy positives land at distance exactly 0, where the square root has an infinite slope.
    x = torch.eye(4)[[0, 0, 1, 1, 2, 3]].requires_grad_()
    kind(backend=backend)(x, torch.tensor([0, 0, 1, 1, 2, 2])).backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0 or kind is EasyPositiveTripletLoss


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [], [5]])
def test_anchors_alone_are_inactive(backend, kind, positives, labels):
    x = torch.randn(len(labels), 3, requires_grad=True)
    loss = kind(positives=positives, backend=backend)(x, torch.tensor(labels, dtype=torch.int64))
    loss.backward()
    assert loss.shape == ()
    assert loss == 0
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("kind", ALL)
def test_without_negatives_and_with_an_empty_bank(backend, kind):
    x, labels = torch.randn(5, 3, requires_grad=True), torch.zeros(5, dtype=torch.int32)
    loss = kind(backend=backend)(x, labels)
    loss.backward()
    assert x.grad.isfinite().all()
    if kind is not EasyPositiveMarginLoss:  # its positive term stands alone
        assert loss == 0
    empty = kind(backend=backend)(x, labels, torch.empty(0, 3), torch.empty(0, dtype=torch.int32))
    empty.backward()
    assert empty == 0


def test_margin_loss_without_negatives_keeps_its_positive_term(backend):
    x, labels = torch.eye(3), torch.zeros(3, dtype=torch.int64)  # positives at sqrt 2
    for negatives in NEGATIVES:
        loss = EasyPositiveMarginLoss(margin=0.2, beta=1.2, negatives=negatives, reduction="none", backend=backend)
        torch.testing.assert_close(loss(x, labels), torch.full((3,), 2**0.5 - 1.0))


def test_semihard_waits_where_every_negative_is_nearer(backend):
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [0.1, 1.0]])
    labels = torch.tensor([0, 0, 1, 2])
    loss = EasyPositiveTripletLoss(0.2, "semihard", reduction="none", backend=backend)(x, labels)
    assert torch.equal(loss, torch.zeros(4))
    assert EasyPositiveTripletLoss(0.2, "hard", backend=backend)(x, labels) > 1


def test_zero_vectors_are_harmless(backend):
    x = torch.zeros(4, 3, requires_grad=True)
    for kind in ALL:
        loss = kind(backend=backend)(x, torch.tensor([0, 0, 1, 1]))
        (grad,) = torch.autograd.grad(loss, x)
        assert loss.isfinite()
        assert grad.isfinite().all()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (EasyPositiveTripletLoss, {"positives": "hard", "negatives": "random"}),
        (EasyPositiveMarginLoss, {"positives": "random"}),
        (EasyPositiveInfoNCELoss, {}),
        (NTXentLoss, {}),  # as many terms as there are pairs, a number that the graph does not know
    ],
)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own, of a Function
def test_compiles_to_one_graph_of_any_size(kind, options):
    torch._dynamo.reset()
    loss = kind(**options)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (12, 10):
            x, labels = torch.randn(rows, 5, requires_grad=True), torch.arange(rows) % 5
            torch.manual_seed(0)
            ours = compiled(x, labels)
            torch.manual_seed(0)
            assert_same_loss_and_gradients(ours, loss(x, labels), (x,))


@pytest.mark.parametrize("kind", ALL)
def test_same_bits_for_one_and_two_threads(kind):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 64, generator=generator).requires_grad_()
    labels = torch.randint(20, (600,), generator=generator)
    before, results = torch.get_num_threads(), []
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)  # as users run it
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            loss = kind(generator=torch.Generator().manual_seed(1))(x, labels)
            results.append((loss.detach(), *torch.autograd.grad(loss, x)))
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(deterministic)
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(grad, results[0][1])


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_and_autocast(kind, dtype, batch):
    x, labels = batch[0].detach().to(dtype).requires_grad_(), batch[1]
    options = {} if kind is EasyPositiveInfoNCELoss else {"negatives": "hard"}
    loss = kind(**options)(x, labels.int())
    assert loss.dtype == torch.float32
    loss.backward()
    assert x.grad.dtype == dtype
    torch.testing.assert_close(loss.double(), kind(**options).double()(x.double(), labels), rtol=2e-2, atol=1e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert kind(**options)(x, labels).isfinite()


def test_state_and_representation():
    loss = EasyPositiveMarginLoss(num_classes=3, beta=0.9, generator=torch.Generator())
    loss.beta.data[1] = 2.0
    other = EasyPositiveMarginLoss(num_classes=3)
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other.beta, loss.beta)
    assert EasyPositiveMarginLoss().double().beta.dtype == torch.float64
    assert [name for name, _ in EasyPositiveMarginLoss().named_parameters()] == []
    assert set(EasyPositiveMarginLoss().state_dict()) == {"beta"}
    assert torch.equal(copy.deepcopy(loss).beta, loss.beta)
    assert "num_classes=3, margin=0.2, beta=0.9, negatives='distance-weighted'" in repr(loss)
    assert "margin=0.2, negatives='semihard', positives='easy'" in repr(EasyPositiveTripletLoss())
    assert "temperature=0.1, positives='easy'" in repr(EasyPositiveInfoNCELoss())


def test_margin_loss_labels():
    x = torch.randn(4, 3)
    loss = EasyPositiveMarginLoss(num_classes=2, reduction="none")
    with pytest.raises(IndexError, match=r"labels: expected values in \[0, 2\).*got 2 in row 3"):
        loss(x, torch.tensor([0, 0, 1, 2]))
    assert loss(x, torch.tensor([0, 0, -1, -1]))[2:].tolist() == [0, 0]  # counted for nothing as anchors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EasyPositiveTripletLoss(-0.1), "margin: expected a number of at least 0, got -0.1"),
        (lambda: EasyPositiveTripletLoss(float("nan")), "margin"),
        (
            lambda: EasyPositiveTripletLoss(negatives="all"),
            "negatives: expected one of 'hard', 'semihard', .*got 'all'",
        ),
        (
            lambda: EasyPositiveTripletLoss(positives="far"),
            "positives: expected one of 'easy', 'random', 'hard', 'all'",
        ),
        (lambda: EasyPositiveInfoNCELoss(negatives="easy"), "negatives: expected one of 'all', 'hard'"),
        (lambda: EasyPositiveTripletLoss(similarity="l1"), "similarity: expected one of"),
        (lambda: EasyPositiveTripletLoss(reduction="max"), "reduction: expected one of"),
        (lambda: EasyPositiveMarginLoss(0), "num_classes: expected at least 1, got 0"),
        (lambda: EasyPositiveMarginLoss(beta=0.0), "beta: expected a positive number"),
        (lambda: EasyPositiveMarginLoss(negatives="easy"), r"negatives: expected one of .*'distance-weighted'"),
        (lambda: EasyPositiveInfoNCELoss(0.0), "temperature: expected a positive number, got 0.0"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("kind", ALL)
def test_bad_input(kind):
    loss, x, labels = kind(), torch.randn(4, 3), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="embeddings: expected a matrix"):
        loss(x[0], labels)
    with pytest.raises(TypeError, match="labels: expected an integer dtype"):
        loss(x, labels.float())
    with pytest.raises(ValueError, match=r"labels: expected shape \(4,\), got \(3,\)"):
        loss(x, labels[:3])
    with pytest.raises(ValueError, match="reference_embeddings: expected width 3"):
        loss(x, labels, torch.randn(5, 2), torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"reference_labels: expected shape \(5,\)"):
        loss(x, labels, torch.randn(5, 3), labels)
    with pytest.raises(ValueError, match="both or neither"):
        loss(x, labels, reference_embeddings=x)
    with pytest.raises(IndexError, match="self_index"):
        loss(x, labels, x, labels, torch.tensor([0, 1, 2, 4]))
    with pytest.raises(ValueError, match="backend: expected one of 'auto'"):
        kind(backend="gpu")(x, labels)
