"""InfoNCE with all negatives is one call of an op; it equals row code on the similarities, and counts the same rows."""

import pytest
import torch
from torch.nn import functional as F

from fused_margins import EasyPositiveInfoNCELoss
from fused_margins.backends import registry

TEMPERATURE = 0.3


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(8)
    labels = torch.randint(5, (30,), generator=generator)
    labels[4] = 77  # alone in its class
    return torch.randn(30, 6, generator=generator, dtype=torch.float64).requires_grad_(), labels


def by_rows(x, labels, y, column_labels, own):
    """Losses of all anchors, and which of them count."""
    u = F.normalize(x) @ F.normalize(y).T / TEMPERATURE
    same = labels[:, None] == column_labels
    mates = same & (torch.arange(len(y)) != own[:, None])
    positive = torch.where(mates, u, -torch.inf).detach().argmax(1)
    lse = torch.where(same, -torch.inf, u).logsumexp(1)
    active = mates.any(1) & (~same).any(1)
    return torch.where(active, F.softplus(lse - u.gather(1, positive[:, None])[:, 0]), 0.0), active


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("with_references", [False, True])
def test_one_call_is_row_code(device_for, batch, backend, reduction, with_references):
    device_for("contrast", backend)  # or skip, with the reason
    x, labels = batch
    references = (x.detach()[:20] + 0.1, labels[:20], torch.arange(30).where(torch.arange(30) < 20, -1))
    sides = references if with_references else (x, labels, torch.arange(30))
    each, active = by_rows(x, labels, *sides)
    assert 0 < active.sum() < 30
    theirs = {"mean": each.sum() / active.sum(), "sum": each.sum(), "none": each}[reduction]
    loss = EasyPositiveInfoNCELoss(TEMPERATURE, reduction=reduction, backend=backend)
    ours = loss(x, labels, *references) if with_references else loss(x, labels)
    torch.testing.assert_close(ours, theirs)
    ours, theirs = (torch.autograd.grad(t.sum(), x)[0] for t in (ours, theirs))
    torch.testing.assert_close(ours, theirs)


def test_it_is_one_call(monkeypatch, batch):
    calls = []
    resolve = registry.resolve
    monkeypatch.setattr(
        registry, "resolve", lambda backend, problem: calls.append(problem) or resolve(backend, problem)
    )
    EasyPositiveInfoNCELoss(TEMPERATURE, backend="reference")(*batch)
    (contrast,) = [problem for problem in calls if problem.op == "contrast"]
    assert contrast.arguments.epilogue.name == "INFO_NCE"


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_an_anchor_without_positive_or_negative_does_not_count(device_for, backend):
    device_for("contrast", backend)  # or skip, with the reason
    x = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [0.6, -0.8]], requires_grad=True)
    loss = EasyPositiveInfoNCELoss(TEMPERATURE, backend=backend)
    each = EasyPositiveInfoNCELoss(TEMPERATURE, reduction="none", backend=backend)
    alone = torch.tensor([0, 0, 1, 2])  # rows 2 and 3 have no positive
    assert each(x, alone)[2:].tolist() == [0, 0]
    torch.testing.assert_close(loss(x, alone), each(x, alone)[:2].mean())
    # References of the anchors' own class alone: no row has a negative but the last.
    references = torch.tensor([[0.9, 0.1], [0.5, 0.5]])
    values = each(x, torch.tensor([0, 0, 0, 1]), references, torch.tensor([0, 0]))
    assert values.tolist() == [0, 0, 0, 0]
    (grad,) = torch.autograd.grad(loss(x, torch.tensor([0, 0, 0, 1]), references, torch.tensor([0, 0])), x)
    assert torch.equal(grad, torch.zeros(4, 2))
    mixed = each(x, torch.tensor([0, 0, 1, 1]), references, torch.tensor([0, 1]))
    assert (mixed > 0).all()
    torch.testing.assert_close(loss(x, torch.tensor([0, 0, 1, 1]), references, torch.tensor([0, 1])), mixed.mean())


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("negatives", ["hard", "semihard"])
def test_ephn_drops_what_its_authors_drop(batch, backend, negatives):
    x, labels = batch
    x = x.detach()
    x[7] = 3 * x[6]  # a duplicate
    labels[7] = labels[6]
    x.requires_grad_()
    u = F.normalize(x) @ F.normalize(x).T
    each, dropped = [], 0
    for i, row in enumerate(u.tolist()):
        mates = [j for j in range(30) if j != i and labels[j] == labels[i] and row[j] <= 0.9999]
        positive = max(mates, key=lambda j: row[j], default=None)
        others = [j for j in range(30) if labels[j] != labels[i]]
        if positive is not None and negatives == "semihard":
            others = [j for j in others if row[j] < row[positive]]
        negative = max(others, key=lambda j: row[j], default=None)
        if positive is None or negative is None or row[positive] <= 0 or row[negative] <= 0:
            dropped += 1
            continue
        each.append(F.cross_entropy(u[i, [positive, negative]][None] / 0.1, torch.tensor([0])))
    assert 1 < dropped < 29
    ours, theirs = EasyPositiveInfoNCELoss.ephn(negatives, backend=backend)(x, labels), torch.stack(each).mean()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(t, x, retain_graph=True)[0] for t in (ours, theirs)))


def test_settings_of_dropping_that_mean_nothing():
    with pytest.raises(ValueError, match="duplicates_above: expected with positives 'easy' alone, got 'hard'"):
        EasyPositiveInfoNCELoss(positives="hard", duplicates_above=0.9)
    with pytest.raises(ValueError, match="drop_dissimilar: expected with one negative an anchor"):
        EasyPositiveInfoNCELoss(drop_dissimilar=True)
    x = torch.randn(6, 4)
    x[1, 2] = torch.nan
    assert EasyPositiveInfoNCELoss.ephn()(x, torch.arange(6) % 2).isnan()
