"""What batches hold, and that a sampler continues from its state."""

import pytest
import torch

from fused_margins.fewshot.objectives import BalancedBatches, ShuffledBatches

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


@pytest.mark.parametrize("classes_per_batch", [1, 2, 3, 4])
@pytest.mark.parametrize("samples_per_class", [1, 2, 3, 5])
def test_classes_and_samples_take_turns(classes_per_batch, samples_per_class):
    sampler = BalancedBatches(LABELS, classes_per_batch, samples_per_class, _generator())
    seen, draws = torch.zeros(32, dtype=torch.int64), torch.zeros(6, dtype=torch.int64)
    for _ in range(40):
        batch = sampler.next_batch()
        seen += torch.bincount(batch, minlength=32)
        draws[LABELS[batch].unique()] += 1
        assert len(LABELS[batch].unique()) == classes_per_batch
        of_classes = draws[LABELS.unique()]
        assert of_classes.max() - of_classes.min() <= 1
        for label in LABELS.unique():
            of_samples = seen[label == LABELS]
            assert of_samples.max() - of_samples.min() <= 1


def test_batches_repeat_no_sample_across_the_end_of_a_turn():
    sampler = BalancedBatches(torch.zeros(5, dtype=torch.int64), 1, 3, _generator())
    assert all(len(sampler.next_batch().unique()) == 3 for _ in range(30))


def test_balanced_batches_are_drawn_anew_every_turn():
    sampler = BalancedBatches(torch.arange(40) // 4, 10, 4, _generator())
    turns = [sampler.next_batch() for _ in range(6)]
    assert all(torch.equal(turn.sort().values, torch.arange(40)) for turn in turns)
    assert len({tuple(turn.tolist()) for turn in turns}) == 6
    assert len({tuple(classes.tolist()) for classes in (turn // 4 for turn in turns)}) == 6


def test_a_state_of_a_thousand_classes_is_two_entries():
    sampler = BalancedBatches(torch.arange(3000) % 1000, 8, 2, _generator())
    for _ in range(5):
        sampler.next_batch()
    state = sampler.state_dict()
    assert len(state["left"]) == 1000 - 40 + 40  # classes left, and one sample left of each of 40 classes
    assert sum(state["sizes"]) == len(state["left"])


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
