"""What batches hold, and that a sampler continues from its state."""

import pytest
import torch

from fused_margins.fewshot.samplers import BalancedBatches, ShuffledBatches

LABELS = torch.tensor([0] * 10 + [1] * 7 + [2] * 3 + [5] * 12)


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("num_samples", "batch_size"), [(10, 4), (129, 128), (128, 128), (5, 128), (7, 2)])
def test_shuffled_batches_show_every_image_once_in_nearly_equal_parts(num_samples, batch_size):
    sampler = ShuffledBatches(num_samples, batch_size, _generator())
    for _ in range(2):
        batches = [sampler.next_batch() for _ in range(len(sampler))]
        assert torch.equal(torch.cat(batches).sort().values, torch.arange(num_samples))
        sizes = [len(b) for b in batches]
        assert max(sizes) <= batch_size
        assert max(sizes) - min(sizes) <= 1


def test_epochs_differ_and_the_seed_decides():
    sampler = ShuffledBatches(50, 50, _generator())
    first, second = sampler.next_batch(), sampler.next_batch()
    assert not torch.equal(first, second)
    assert torch.equal(ShuffledBatches(50, 50, _generator()).next_batch(), first)


def test_balanced_batches_hold_classes_of_equal_size_without_repetition():
    sampler = BalancedBatches(LABELS, classes_per_batch=3, samples_per_class=3, generator=_generator())
    for _ in range(20):
        batch = sampler.next_batch()
        assert len(batch) == 9
        assert len(batch.unique()) == 9
        assert LABELS[batch].unique(return_counts=True)[1].tolist() == [3, 3, 3]


def test_balanced_batches_repeat_samples_only_of_small_classes():
    sampler = BalancedBatches(LABELS, classes_per_batch=4, samples_per_class=6, generator=_generator())
    batch = sampler.next_batch()
    for label, members in ((0, 6), (1, 6), (5, 6)):
        assert len(batch[LABELS[batch] == label].unique()) == members
    small = batch[LABELS[batch] == 2]
    assert len(small) == 6
    assert len(small.unique()) <= 3


def test_balanced_batches_reach_every_class_and_take_no_more_than_there_are():
    sampler = BalancedBatches(LABELS, classes_per_batch=9, samples_per_class=2, generator=_generator())
    assert LABELS[sampler.next_batch()].unique().tolist() == [0, 1, 2, 5]
    assert len(sampler) == 32 // 8


@pytest.mark.parametrize("taken", [0, 1, 2, 3, 5])
@pytest.mark.parametrize(
    "make",
    [
        lambda: ShuffledBatches(10, 4, _generator(1)),
        lambda: BalancedBatches(LABELS, 2, 3, _generator(1)),
    ],
)
def test_a_restored_sampler_goes_on_with_the_same_batches(make, taken):
    sampler, restored = make(), make()
    for _ in range(taken):
        sampler.next_batch()
    state, generator_state = sampler.state_dict(), sampler.generator.get_state()
    expected = [sampler.next_batch() for _ in range(5)]
    restored.load_state_dict(state)
    restored.generator.set_state(generator_state)
    assert all(torch.equal(restored.next_batch(), batch) for batch in expected)
