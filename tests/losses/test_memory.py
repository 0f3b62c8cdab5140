"""The memory across batches: what it holds, whom an anchor may meet there, and that a resumed run goes on."""

import copy

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from fused_margins import CrossBatchMemory, EasyPositiveMarginLoss, EasyPositiveTripletLoss


class Spy(EasyPositiveTripletLoss):
    """Remembers the references that it was given, and the positives that it chose."""

    def forward(self, embeddings, labels, reference_embeddings, reference_labels, self_index):
        sides = self._sides(embeddings, labels, reference_embeddings, reference_labels, self_index)
        self.references = list(zip(reference_embeddings[:, 0].tolist(), reference_labels.tolist()))
        self.self_index, self.chosen = self_index.tolist(), self._find_positives(sides).reference.tolist()
        return super().forward(embeddings, labels, reference_embeddings, reference_labels, self_index)


def spied(size: int, **options) -> CrossBatchMemory:
    options = {"similarity": "negative_squared_euclidean", "normalize": False} | options
    return CrossBatchMemory(Spy(**options), embedding_size=1, size=size)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None]


steps = st.lists(st.lists(st.integers(0, 9), min_size=0, max_size=6), min_size=1, max_size=5)


@given(
    steps=steps, size=st.integers(1, 12), with_ids=st.booleans(), positives=st.sampled_from(["easy", "hard", "random"])
)
def test_references_and_positives_are_those_of_loops(steps, size, with_ids, positives):
    """Sample s has class s % 3; its embedding is another number at every visit."""
    memory, past = spied(size, positives=positives), []
    generator = torch.Generator().manual_seed(0)
    for samples in steps:
        values = torch.randint(1000, (len(samples),), generator=generator).float()
        labels = [s % 3 for s in samples]
        memory(values[:, None], torch.tensor(labels).long(), torch.tensor(samples).long() if with_ids else None)
        visits = list(zip(values.tolist(), labels, samples))
        expected, owners = [], []
        for n, (v, l, s) in enumerate(visits + past[::-1][:size]):
            owner = s if with_ids else n
            if owner not in owners:
                expected.append((v, l))
                owners.append(owner)
        spy = memory.loss
        assert spy.references == expected
        for n, (v, l, s) in enumerate(visits):
            assert owners[spy.self_index[n]] == (s if with_ids else n)
            mates = [j for j, (_, other) in enumerate(expected) if other == l and owners[j] != (s if with_ids else n)]
            distance = [abs(v - expected[j][0]) for j in mates]
            if not mates:
                assert spy.chosen[n] == -1
            else:
                wanted = {"easy": min(distance), "hard": max(distance)}.get(positives)
                assert spy.chosen[n] in mates
                assert wanted is None or abs(v - expected[spy.chosen[n]][0]) == wanted
        past += visits


def test_an_anchor_keeps_its_positive_though_the_batch_is_remembered():
    # Trap: enqueued first and searched next, the batch holds every anchor, which then loses its positive to itself.
    memory = spied(8)
    memory(numbers(0, 1, 5), torch.tensor([0, 0, 1]))
    assert memory.loss.chosen == [1, 0, -1]
    memory(numbers(0, 1, 5), torch.tensor([0, 0, 1]))  # without ids these are other samples: the twins of the first
    assert memory.loss.chosen == [5, 4, 3]
    known = spied(8)
    for _ in range(3):
        known(numbers(0, 1, 5), torch.tensor([0, 0, 1]), torch.tensor([10, 11, 12]))
        assert known.loss.chosen == [1, 0, -1]
        assert known.loss.references == [(0.0, 0), (1.0, 0), (5.0, 1)]


def test_a_sample_twice_in_a_batch_is_one_sample_to_its_id():
    memory = spied(8)
    memory(numbers(0, 0.1, 4), torch.tensor([0, 0, 0]), torch.tensor([7, 7, 8]))
    assert memory.loss.self_index == [0, 0, 1]
    assert memory.loss.chosen == [1, 1, 0]
    memory(numbers(0, 0.1), torch.tensor([0, 0]), torch.tensor([-1, -5]))  # no ids: nobody's twins
    assert memory.loss.self_index == [0, 1]
    assert memory.loss.chosen == [1, 3]  # 3: the 0.1 of above
    memory(numbers(0, 0.1), torch.tensor([0, 0]), torch.tensor([-1, -1]))
    assert memory.loss.self_index == [0, 1]
    assert len(memory.loss.references) == 6  # two new ones, the two before, and the samples 7 and 8
    assert memory.sample_ids[:5].tolist() == [7, 7, 8, -1, -1]


def test_the_ring_keeps_the_last_ones():
    memory = spied(4)
    place = memory.embeddings.data_ptr()
    for first, count in ((0, 3), (3, 3), (6, 0), (6, 7)):
        memory(numbers(*range(first, first + count)), torch.zeros(count).long())
        last = set(range(max(0, first + count - 4), first + count))
        assert set(memory.embeddings[: memory.seen, 0].tolist()) == last
    assert memory.embeddings.data_ptr() == place
    memory.eval()(numbers(99), torch.tensor([0]))
    assert memory.seen == 13
    assert 99 not in memory.embeddings


@pytest.mark.parametrize("stop", [0, 1, 3])
def test_a_restored_memory_goes_on_with_the_same_bits(stop, tmp_path):
    def make():
        return CrossBatchMemory(EasyPositiveMarginLoss(5, generator=torch.Generator()), embedding_size=6, size=20)

    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(8, 6, generator=generator), torch.randint(5, (8,), generator=generator)) for _ in range(6)]
    data = [(x, labels, torch.arange(8) + 3 * step) for step, (x, labels) in enumerate(data)]
    memory, restored = make(), make()
    for batch in data[:stop]:
        memory(*batch)
    torch.save({"memory": memory.state_dict(), "generator": memory.loss.generator.get_state()}, tmp_path / "state")
    expected = [memory(*batch) for batch in data[stop:]]
    state = torch.load(tmp_path / "state", weights_only=True)
    restored.load_state_dict(state["memory"])
    restored.loss.generator.set_state(state["generator"])
    assert all(torch.equal(restored(*batch), loss) for batch, loss in zip(data[stop:], expected))
    assert copy.deepcopy(memory).seen == 48


def test_gradients_reach_the_batch_alone():
    memory = CrossBatchMemory(EasyPositiveTripletLoss(negatives="hard"), embedding_size=3, size=6)
    steps = [torch.randn(6, 3, requires_grad=True) for _ in range(2)]
    for x in steps:
        loss = memory(x, torch.tensor([0, 0, 1, 1, 2, 2]))
    loss.backward()
    assert steps[0].grad is None
    assert steps[1].grad.abs().sum() > 0
    assert not memory.embeddings.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype):
    memory = CrossBatchMemory(EasyPositiveTripletLoss(), embedding_size=3, size=6).to(
        torch.promote_types(dtype, torch.float)
    )
    for _ in range(2):
        x = torch.randn(4, 3, dtype=dtype)
        assert memory(x, torch.tensor([0, 0, 1, 1], dtype=torch.int16)).isfinite()
    assert torch.equal(memory.embeddings[(torch.arange(4) + 4) % 6].to(dtype), x)
    assert memory.to("meta").embeddings.device.type == "meta"


def test_bad_settings_and_input():
    loss = EasyPositiveTripletLoss()
    with pytest.raises(TypeError, match="loss: expected one of the easy-positive losses, got Linear"):
        CrossBatchMemory(torch.nn.Linear(2, 2), 2)
    with pytest.raises(ValueError, match="size: expected at least 1, got 0"):
        CrossBatchMemory(loss, 2, 0)
    with pytest.raises(ValueError, match="embedding_size: expected at least 1"):
        CrossBatchMemory(loss, 0)
    memory, x, labels = CrossBatchMemory(loss, 2, 5), torch.randn(3, 2), torch.zeros(3).long()
    with pytest.raises(ValueError, match="embeddings: expected width 2 as the memory has, got 3"):
        memory(torch.randn(3, 3), labels)
    with pytest.raises(TypeError, match="embeddings: expected a tensor, got list"):
        memory([1.0], labels)
    with pytest.raises(TypeError, match="embeddings: expected a floating dtype"):
        memory(x.long(), labels)
    with pytest.raises(TypeError, match="labels: expected an integer dtype"):
        memory(x, labels.float())
    with pytest.raises(ValueError, match=r"sample_ids: expected shape \(3,\), got \(2,\)"):
        memory(x, labels, labels[:2])
    assert memory.seen == 0
    assert "embedding_size=2, size=5, seen=0" in repr(memory)
