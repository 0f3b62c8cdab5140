"""Losses on all pairs of a batch against formulas in float64 with plain torch, and against pytorch-metric-learning."""

import pytest
import torch
from pytorch_metric_learning import losses as pml
from torch import Tensor
from torch.nn import functional as F

from fused_margins import CrossBatchMemory, MultiSimilarityLoss, NTXentLoss, SupConLoss
from fused_margins.core.indices import UNADMITTED

from .test_peers import B, D, assert_same, cosines, each_backend, each_reduction, reduced, samples


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return samples()


def supcon(u, same, different):
    others = same | different
    lse = torch.where(others, 8 * u, -torch.inf).logsumexp(1)
    each = lse - (torch.where(same, 8 * u, 0.0).sum(1) / same.sum(1).clamp(min=1))
    return each, same.any(1) & different.any(1)


def multi_similarity(u, same, different):
    far = torch.log(1 + (same * torch.exp(-2 * (u - 0.4))).sum(1)) / 2
    near = torch.log(1 + (different * torch.exp(30 * (u - 0.4))).sum(1)) / 30
    return far + near, torch.ones_like(same[:, 0])


PAIRS = {
    "SupCon": (lambda **o: SupConLoss(1 / 8, **o), supcon),
    "MultiSimilarity": (lambda **o: MultiSimilarityLoss(2, 30, 0.4, **o), multi_similarity),
}
each_pair_loss = pytest.mark.parametrize(("make", "formula"), PAIRS.values(), ids=PAIRS)


def sides(batch, references: bool):
    """(B, D), (B,), (N, D), (N,), (B,): within the batch, or with others, of whom some are the anchors themselves."""
    x, labels = batch
    own = torch.arange(B)
    if not references:
        return x, labels, x, labels, own
    generator = torch.Generator().manual_seed(6)
    y = torch.cat([x.detach()[:8], torch.randn(11, D, generator=generator, dtype=torch.float64)]).requires_grad_()
    others = torch.cat([labels[:8], torch.randint(5, (11,), generator=generator)])
    others[12] = UNADMITTED
    others[7] = (others[7] + 1) % 5  # itself, with another label
    return x, labels, y, others, own.where(own < 8, -1)


@each_backend
@each_reduction
@each_pair_loss
@pytest.mark.parametrize("references", [False, True])
def test_losses_on_all_pairs(batch, backend, reduction, make, formula, references):
    x, labels, y, others, own = sides(batch, references)
    u = cosines(x, y)
    admitted = (others != UNADMITTED) & (own[:, None] != torch.arange(len(y)))
    same = (labels[:, None] == others) & admitted
    each, counted = formula(u, same, admitted & ~same)
    loss = make(reduction=reduction, backend=backend)
    ours = loss(x, labels, y, others, own) if references else loss(x, labels)
    assert_same(ours, reduced(each, counted, reduction), x, *([y] if references else []))


def test_an_anchor_whose_only_negative_is_itself_or_nobody_is_inactive():
    x, y = torch.randn(2, 3), torch.randn(3, 3)
    each = SupConLoss(reduction="none")
    labels, own = torch.tensor([0, 0]), torch.tensor([2, -1])  # the third reference is the first anchor
    values = each(x, labels, y, torch.tensor([0, 0, 1]), own)
    assert (values[0] == 0, values[1] > 0) == (True, True)
    assert (each(x, labels, y, torch.tensor([0, 0, UNADMITTED]), own) == 0).all()
    assert (each(x, labels, y, torch.tensor([0, 0, UNADMITTED])) == 0).all()


@each_backend
@pytest.mark.parametrize("references", [False, True])
def test_ntxent_has_a_loss_for_every_pair(batch, backend, references):
    x, labels, y, others, own = sides(batch, references)
    u = 4 * cosines(x, y)
    admitted = (others != UNADMITTED) & (own[:, None] != torch.arange(len(y)))
    same = (labels[:, None] == others) & admitted
    lse = torch.where(admitted & ~same, u, -torch.inf).logsumexp(1)
    each = torch.stack([F.softplus(lse[i] - u[i, j]) for i, j in same.nonzero().tolist()])
    loss = NTXentLoss(1 / 4, reduction="none", backend=backend)
    ours = loss(x, labels, y, others, own) if references else loss(x, labels)
    assert_same(ours, each, x)
    torch.testing.assert_close(
        NTXentLoss(1 / 4, backend=backend)(x, labels), pml.NTXentLoss(temperature=1 / 4)(x, labels)
    )


def test_pair_losses_are_those_of_pytorch_metric_learning(batch):
    x, labels = batch
    for ours, theirs in (
        (SupConLoss(), pml.SupConLoss()),
        (NTXentLoss(), pml.NTXentLoss()),
        (MultiSimilarityLoss(), pml.MultiSimilarityLoss()),
    ):
        torch.testing.assert_close(ours(x, labels), theirs(x, labels))


@each_pair_loss
def test_a_memory_serves_the_losses_on_all_pairs(batch, make, formula):
    x, labels = batch
    memory = CrossBatchMemory(make(), D, 30).double()
    memory(x, labels)
    references, others = torch.cat([x, x]).detach(), torch.cat([labels, labels])
    expected = make()(x, labels, references, others, torch.arange(B))
    torch.testing.assert_close(memory.eval()(x, labels), expected)


@each_pair_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_is_no_good_pair(make, formula, dtype):
    x, labels = torch.randn(12, 16, dtype=dtype), torch.arange(12) % 4
    assert make()(x, labels).isfinite()
    x[5, 3] = torch.nan
    assert make()(x, labels).isnan()
    y, others = torch.randn(12, 16, dtype=dtype), labels.clone()
    each = make(reduction="none")(x, labels, y, others)
    assert each[5].isnan()
    assert each[torch.arange(12) != 5].isfinite().all()
    assert make()(y, labels, y[:0], others[:0]) == 0
