"""Where the drop-in differs from theirs, it is nearer to the truth."""

import copy
import math

import pytest
import torch
from pytorch_metric_learning import reducers
from torch.utils._python_dispatch import TorchDispatchMode

from .oracle import (
    BATCH,
    HEADS,
    OTHERS,
    PAIRS,
    PROXIES,
    assert_equal,
    mined,
    numbers,
    of_dtype,
    options_of,
    pair,
    run,
    weight_of,
)


def test_ntxent_does_not_saturate():
    """Theirs adds the least float32 to a probability and takes the logarithm: -87.34, and no gradient."""
    x, labels = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    references = {"ref_emb": torch.tensor([[-1.0, 1e-2], [1.0, 1e-2], [1.0, -1e-2]]), "ref_labels": torch.arange(3)}
    ours, theirs = pair("NTXentLoss", temperature=0.01)
    truth = run(theirs, x.double(), labels, **of_dtype(references, torch.float64))
    assert truth[0].item() == pytest.approx(200 + math.log(2), abs=0.02)
    got, saturated = run(ours, x, labels, **references), run(theirs, x, labels, **references)
    assert_equal([t.double() for t in got], truth, 1e-4, 1e-4)
    assert saturated[0].item() == pytest.approx(87.34, abs=0.01)
    assert truth[1].abs().max() > 0.5
    assert not saturated[1].any()


def test_two_views_with_a_small_loss_count_in_a_mean_of_what_is_above_zero():
    """Theirs rounds it to zero and drops it, so that the mean is over the other rows."""
    x = torch.tensor([[1.0, 0.0], [1.0, 0.01], [0.0, 1.0], [0.6, 0.8]])
    call = x, torch.tensor([0, 0, 1, 1])
    ours, theirs = pair("SupConLoss", temperature=0.02)
    rows = [1, 0, 3, 2]
    u = torch.nn.functional.normalize(x.double())
    logits = (u @ u.T / 0.02).fill_diagonal_(-torch.inf)
    truth = torch.nn.functional.cross_entropy(logits, torch.tensor(rows)).item()
    assert ours(*call).item() == pytest.approx(truth, rel=1e-5)
    assert theirs(*call).item() > 1.3 * truth


@pytest.mark.parametrize(("name", "margin"), [("ArcFaceLoss", {"margin": 0}), ("NormalizedSoftmaxLoss", {})])
def test_small_losses_are_not_rounded_to_zero(name, margin):
    ours, theirs = pair(name, num_classes=2, embedding_size=2, **margin)
    state = {"W": torch.tensor([[1.0, -1.0], [0.1, 0.0]])}
    for loss in (ours, theirs):
        loss.load_state_dict(state)
    x, labels = torch.tensor([[1.0, 0.2]]), torch.tensor([0])
    scale = 64 if name == "ArcFaceLoss" else 20
    unit = torch.nn.functional.normalize
    u = unit(x.double()) @ unit(state["W"].double(), dim=0)
    truth = math.log1p(math.exp(float(u[0, 1] - u[0, 0]) * scale))
    assert ours(x, labels).item() == pytest.approx(truth, rel=1e-3)
    assert theirs(x, labels).item() == 0


def test_gradients_are_finite_at_the_poles_and_at_zero():
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])
    for name in HEADS:
        ours, theirs = pair(name, num_classes=2, embedding_size=2)
        centers = getattr(ours, "sub_centers", getattr(ours, "centers_per_class", 1))
        for loss in (ours, theirs):
            loss.load_state_dict({weight_of(loss): torch.eye(2).repeat_interleave(centers, dim=1)})
        got, want = run(ours, x, torch.tensor([0, 0, 1])), run(theirs, x, torch.tensor([0, 0, 1]))
        torch.testing.assert_close(got[0], want[0])
        assert all(t.isfinite().all() for t in got)
        if name in ("LargeMarginSoftmaxLoss", "SphereFaceLoss"):  # the logits of other classes are products
            torch.testing.assert_close(got[1][:2], want[1][:2])
            continue
        assert not got[1][2].any()  # a row of zeros has no direction
        if name.endswith("ArcFaceLoss"):
            assert not want[1].abs().max() < 1e9  # at the poles before torch 2.14, and for zeros
        else:
            assert want[1][2].abs().max() > 1e9


@pytest.mark.parametrize("name", [*HEADS, *PROXIES, *PAIRS, *OTHERS])
def test_a_row_that_is_not_finite_makes_the_loss_nan(name):
    embeddings = BATCH[0].index_fill(0, torch.tensor([2]), torch.nan)
    options = {"reducer": reducers.DoNothingReducer()}  # a comparison drops NaN
    ours, theirs = (numbers(loss(embeddings, BATCH[1])) for loss in pair(name, **options, **options_of(name)))
    assert ours[0].isnan().any()
    assert bool((ours[0].isnan() >= theirs[0].isnan()).all())


def test_rows_of_an_underflowing_probability_keep_their_loss():
    """Theirs takes the logarithm of a sum of probabilities, and drops the row where that is 0."""
    x, labels = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.1]]), torch.tensor([0, 0, 1])
    for name, options in (("NCALoss", {}), ("ProxyNCALoss", {"num_classes": 2, "embedding_size": 2})):
        ours, theirs = pair(name, softmax_scale=60, **options)
        for loss in (ours, theirs):
            if options:
                loss.load_state_dict({"proxies": torch.tensor([[-1.0, 0.0], [1.0, 0.1]])})
        kept, dropped = (numbers(loss.compute_loss(x, labels, None, x, labels)) for loss in (ours, theirs))
        assert len(kept[0]) > len(dropped[0])
        unit = torch.nn.functional.normalize(x.double())
        others = (
            unit if not options else torch.nn.functional.normalize(torch.tensor([[-1.0, 0.0], [1.0, 0.1]]).double())
        )
        logits = -60 * torch.cdist(unit, others) ** 2
        if not options:
            logits.fill_diagonal_(-torch.inf)
            same = labels[:, None] == labels
        else:
            same = labels[:, None] == torch.arange(2)
        wanted = logits.logsumexp(1) - logits.masked_fill(~same, -torch.inf).logsumexp(1)
        torch.testing.assert_close(kept[0].double(), wanted[kept[1]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("indices", [None, "triplets"])
def test_swap_compares_positives_with_negatives_of_the_references(indices):
    """Theirs looks them up among the anchors, which are other rows, or too few."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (4, 9))
    labels, ref_labels = torch.arange(4) % 2, torch.arange(9) % 3
    ours, theirs = pair("TripletMarginLoss", swap=True, margin=0.4, reducer=reducers.SumReducer())
    call = {"ref_emb": y, "ref_labels": ref_labels, "indices_tuple": mined(indices, labels, ref_labels)}
    unit_x, unit_y = (torch.nn.functional.normalize(t) for t in (x, y))
    d, of_references = torch.cdist(unit_x, unit_y), torch.cdist(unit_y, unit_y)
    truth = 0.0
    for i in range(4):
        for p in range(9):
            for n in range(9):
                if labels[i] == ref_labels[p] != ref_labels[n]:
                    truth += max(0.0, float(d[i, p] - min(d[i, n], of_references[p, n])) + 0.4)
    assert ours(x, labels, **call).item() == pytest.approx(truth, rel=1e-9)
    with pytest.raises(IndexError):
        theirs(x, labels, **call)


@pytest.mark.parametrize("name", [*PROXIES, "LargeMarginSoftmaxLoss", "SphereFaceLoss", "MultiSimilarityLoss", *OTHERS])
def test_float32_is_as_near_to_float64_as_theirs(name):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(96, 24, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (96,), generator=generator)
    options = {"num_classes": 4, "embedding_size": 24} if options_of(name) else {}
    ours, theirs = pair(name, **options)
    truth = run(copy.deepcopy(theirs).double(), x, labels)
    errors = [
        [(a.double() - b).abs().max() / b.abs().max() for a, b in zip(run(loss.float(), x.float(), labels), truth)]
        for loss in (ours, theirs)
    ]
    for of_ours, of_theirs in zip(*errors):
        assert of_ours < 2 * of_theirs + 2e-6


class Largest(TorchDispatchMode):
    """The entries of the largest tensor that an operation gives."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple | list) else [result]:
            self.entries = max(self.entries, t.numel() if isinstance(t, torch.Tensor) else 0)
        return result


@pytest.mark.parametrize("name", ["TripletMarginLoss", "MarginLoss", "NTXentLoss"])
def test_neither_triplets_nor_positives_by_negatives_are_listed(name):
    rows = 48
    x, labels = torch.randn(rows, 5, generator=torch.Generator().manual_seed(0)), torch.arange(rows) // 4
    largest = []
    for loss in pair(name):
        with Largest() as seen:
            loss(x.clone().requires_grad_(), labels).backward()
        largest.append(seen.entries)
    assert largest[0] <= 2 * rows * rows
    assert largest[1] >= {"NTXentLoss": 3 * rows * rows * (rows - 4)}.get(name, rows**3)


@pytest.mark.parametrize("name", [*HEADS, *PROXIES])
def test_a_half_batch_leaves_the_parameter_as_it_is_within_autocast(name):
    dtypes = []
    for loss in pair(name, **options_of(name)):
        with torch.autocast("cpu", torch.bfloat16):
            loss(BATCH[0].bfloat16(), BATCH[1])
        dtypes.append([t.dtype for t in loss.parameters()])
    assert dtypes == [[torch.float32], [torch.bfloat16]]
