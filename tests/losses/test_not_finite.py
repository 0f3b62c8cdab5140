"""What is not finite is never a good result: the losses of easy positives are NaN, as every other loss is."""

import pytest
import torch

from fused_margins import (
    CrossBatchMemory,
    EasyPositiveInfoNCELoss,
    EasyPositiveMarginLoss,
    EasyPositiveTripletLoss,
    MagnetLoss,
    MarginSoftmaxLoss,
)
from fused_margins.core.indices import UNADMITTED

LABELS = torch.arange(12) % 4
LOSSES = {
    "triplet": EasyPositiveTripletLoss,
    "triplet-hard": lambda **o: EasyPositiveTripletLoss(positives="hard", negatives="hard", **o),
    "triplet-all": lambda **o: EasyPositiveTripletLoss(positives="all", negatives="random", **o),
    "triplet-dot": lambda **o: EasyPositiveTripletLoss(similarity="dot", normalize=False, **o),
    "margin": EasyPositiveMarginLoss,
    "margin-learnt": lambda **o: EasyPositiveMarginLoss(num_classes=4, positives="random", **o),
    "infonce": EasyPositiveInfoNCELoss,
    "infonce-one": lambda **o: EasyPositiveInfoNCELoss(negatives="semihard", **o),
    "infonce-all": lambda **o: EasyPositiveInfoNCELoss(positives="all", **o),
}
each_loss = pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES)
each_value = pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])


@each_loss
@each_value
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_row_of_a_batch_makes_the_loss_of_every_anchor(make, value, dtype):
    x = torch.randn(12, 16, dtype=dtype)
    assert make()(x, LABELS).isfinite()
    x[5, 3] = value
    assert make()(x, LABELS).isnan()
    assert make(reduction="sum")(x, LABELS).isnan()
    assert make(reduction="none")(x, LABELS).isnan().all()


@each_loss
@each_value
def test_an_anchor_that_is_none_of_the_references_is_alone(make, value):
    x, y, labels = torch.randn(4, 16), torch.randn(12, 16), torch.arange(4)
    x[1, 0] = value
    loss = make(reduction="none")(x, labels, y, LABELS)
    rows = labels.repeat_interleave(len(loss) // 4)  # pairs, where every positive makes one
    assert loss[rows != 1].isfinite().all()
    assert loss[rows == 1].isnan().all()
    assert make()(x, labels, y, LABELS).isnan()


@each_loss
@each_value
def test_references_that_somebody_could_search_and_those_that_nobody_can(make, value):
    x, y, labels = torch.randn(4, 16), torch.randn(12, 16), LABELS.clone()
    y[8] = value
    for narrow in (labels, labels.int(), labels.to(torch.uint8)):  # of the class 0, which -2**63 is in 32 bits
        assert make(reduction="none")(x, torch.arange(4), y, narrow).isnan().all()
    labels[8] = UNADMITTED
    assert make(reduction="none")(x, torch.arange(4), y, labels).isfinite().all()


@each_loss
def test_vectors_of_any_finite_length_are_finite(make):
    x = torch.randn(12, 16) * 1e18  # the square is a number, too
    assert make()(x, LABELS).isfinite()


@pytest.mark.parametrize("similarity", ["dot", "negative_squared_euclidean"])
@pytest.mark.parametrize("size", [1e20, 4e18])
def test_distances_that_are_not_finite_of_rows_that_are(similarity, size):
    """Else all columns would be at -infinity, where nobody is found: a loss of 0."""
    x = torch.randn(12, 16) * size
    options = {"similarity": similarity, "normalize": False, "negatives": "hard"}
    loss = EasyPositiveTripletLoss(**options)
    assert loss(x, LABELS).isnan()
    assert EasyPositiveTripletLoss(reduction="none", **options)(x[:4], LABELS[:4], x, LABELS).isnan().all()
    assert CrossBatchMemory(loss, 16, 24)(x, LABELS).isnan()
    assert loss(x.double(), LABELS).isfinite()


@each_loss
def test_rows_without_a_label_may_be_anything(make):
    x, labels = torch.randn(12, 16), LABELS.clone()
    expected = make()(x[:-1], labels[:-1])
    x[-1], labels[-1] = torch.nan, UNADMITTED
    torch.manual_seed(0)
    loss = make()(x, labels)
    assert loss.isfinite()
    if make in (LOSSES["triplet"], LOSSES["infonce"]):  # nothing is drawn
        torch.testing.assert_close(loss, expected)


@each_loss
def test_gradients_of_anchors_that_count_are_not_numbers_either(make):
    x = torch.randn(12, 16)
    x[5] = torch.nan
    make()(x.requires_grad_(), LABELS).backward()
    assert not x.grad[torch.arange(12) != 5].isfinite().all()


@each_value
def test_a_memory_keeps_what_is_finite_and_recovers(value):
    memory = CrossBatchMemory(EasyPositiveTripletLoss(negatives="hard"), 16, 24)
    memory(torch.randn(12, 16), LABELS)
    x = torch.randn(12, 16)
    x[5, 3] = value
    assert memory(x, LABELS).isnan()
    assert memory.embeddings.isfinite().all()
    assert (memory.labels == UNADMITTED).sum() == 1
    assert memory(torch.randn(12, 16), LABELS).isfinite()


def test_a_memory_keeps_what_is_finite_in_its_own_dtype():
    memory = CrossBatchMemory(EasyPositiveTripletLoss(negatives="hard"), 16, 24).half()
    x = torch.randn(12, 16)
    x[5] = 1e5  # infinite in float16
    assert memory(x, LABELS).isfinite()
    assert memory.embeddings.isfinite().all()
    assert (memory.labels[:12] == UNADMITTED).tolist() == [i == 5 for i in range(12)]


@each_value
def test_the_other_losses(value):
    x = torch.randn(12, 16)
    x[5, 3] = value
    assert MarginSoftmaxLoss(4, 16)(x, LABELS).isnan()
    assert MagnetLoss()(x, LABELS).isnan()
