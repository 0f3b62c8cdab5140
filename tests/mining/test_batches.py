"""Batches of classes, and what batches lack."""

from collections import Counter

import pytest
import torch

from fused_margins import ClassBalancedBatches, EasyPositiveTripletLoss
from fused_margins.mining import batch_lacks

LABELS = torch.tensor([5, 5, 5, 5, 2, 2, 2, 9, 9, 7]).to(torch.int32)


def test_classes_and_samples_take_turns():
    batches = ClassBalancedBatches(LABELS, 3, 2, num_batches=40, generator=torch.Generator().manual_seed(0))
    assert len(batches) == 40
    seen, classes = Counter(), Counter()
    for batch in batches:
        assert len(set(batch)) == len(batch)
        found = Counter(LABELS[batch].tolist())
        assert len(found) == 3
        assert all(count == (1 if label == 7 else 2) for label, count in found.items())
        seen.update(batch)
        classes.update(found.keys())
        assert max(classes.values()) - min(classes[label] for label in (5, 2, 9, 7)) <= 1
    for label in (5, 2, 9):
        counts = [seen[i] for i, of in enumerate(LABELS.tolist()) if of == label]
        assert max(counts) - min(counts) <= 1
    again = ClassBalancedBatches(LABELS, 3, 2, num_batches=40, generator=torch.Generator().manual_seed(0))
    assert list(again) == list(
        ClassBalancedBatches(LABELS, 3, 2, num_batches=40, generator=torch.Generator().manual_seed(0))
    )
    assert len(ClassBalancedBatches(LABELS, 2, 2)) == 2


def test_every_anchor_of_a_loader_has_a_positive():
    labels = torch.arange(5).repeat_interleave(4)
    data = torch.utils.data.TensorDataset(torch.randn(20, 3), labels)
    for x, y in torch.utils.data.DataLoader(data, batch_sampler=ClassBalancedBatches(labels, 2, 3)):
        assert str(batch_lacks(y)) == "0 of 6 anchors have no positive, 0 no negative"
        assert EasyPositiveTripletLoss()(x, y).isfinite()


def test_what_a_batch_lacks():
    lacking = batch_lacks(torch.tensor([3, 3]))
    assert str(lacking) == "0 of 2 anchors have no positive, 2 no negative"
    lacking = batch_lacks(torch.tensor([3, 4]), torch.tensor([3, 3, 5]), torch.tensor([0, -1]))
    assert lacking.positive.tolist() == [False, True]
    assert lacking.negative.tolist() == [False, False]
    assert batch_lacks(torch.tensor([3, 4]), torch.tensor([3]), torch.tensor([0, -1])).positive.tolist() == [True, True]
    assert batch_lacks(torch.tensor([3]), torch.tensor([], dtype=torch.int64)).positive.tolist() == [True]
    assert batch_lacks(torch.tensor([], dtype=torch.int64)).positive.shape == (0,)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ClassBalancedBatches(LABELS.float(), 2, 2), TypeError, "labels: expected"),
        (lambda: ClassBalancedBatches(torch.zeros(4, dtype=torch.int64), 2, 2), ValueError, "labels: expected two"),
        (lambda: ClassBalancedBatches(LABELS, 5, 2), ValueError, "classes_per_batch: expected at most 4, got 5"),
        (lambda: ClassBalancedBatches(LABELS, 2, 1), ValueError, "samples_per_class: expected .* 2.*, got 1"),
        (lambda: ClassBalancedBatches(LABELS, 2, 2, num_batches=0), ValueError, "num_batches: expected .* 1.*, got 0"),
        (lambda: ClassBalancedBatches(LABELS, 2, 2, generator=3), TypeError, "generator: expected"),
        (lambda: batch_lacks([1, 2]), TypeError, "labels: expected"),
        (lambda: batch_lacks(torch.zeros(2, 2, dtype=torch.int64)), ValueError, "labels: expected"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
