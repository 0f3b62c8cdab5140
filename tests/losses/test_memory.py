"""The memory across batches: what it holds, whom an anchor may meet there, and that a resumed run goes on."""

import copy

import hypothesis.strategies as st
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from hypothesis import given
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fused_margins import CrossBatchMemory, EasyPositiveMarginLoss, EasyPositiveTripletLoss
from fused_margins.core.indices import UNADMITTED
from tests.forks import Forked, runs_backward


class Spy(EasyPositiveTripletLoss):
    """Remembers the references that it was given, and the positives that it chose."""

    def forward(self, embeddings, labels, reference_embeddings, reference_labels, self_index):
        sides = self._sides(embeddings, labels, reference_embeddings, reference_labels, self_index)
        holds = reference_labels != UNADMITTED
        self.references = list(zip(reference_embeddings[holds, 0].tolist(), reference_labels[holds].tolist()))
        place = torch.cat([holds.cumsum(0) - 1, torch.tensor([-1])])  # among those that are searched; the last: none
        self.self_index, self.chosen = (place[i].tolist() for i in (self_index, self._find_positives(sides).reference))
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
    with pytest.raises(TypeError, match="loss: expected one of the losses on pairs of a batch, got Linear"):
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
    assert "embedding_size=2, size=5" in repr(memory)


def test_what_is_not_filled_is_nobodys_positive_or_negative():
    """Also where other rows than the memory's own were never written, as after a broadcast."""
    x, labels = torch.eye(4), torch.tensor([0, 0, 1, 1])
    for positives in ("easy", "hard", "random", "all"):
        for negatives in ("hard", "semihard", "random", "distance-weighted"):
            loss = EasyPositiveTripletLoss(positives=positives, negatives=negatives, reduction="none")
            memory = CrossBatchMemory(loss, 4, 64)
            memory.embeddings.normal_()
            assert torch.equal(memory(x, labels), loss(x, labels))


def test_tensors_alone_hold_the_memory():
    memory = CrossBatchMemory(EasyPositiveTripletLoss(), 4, 6)
    shapes = {name: t.shape for name, t in memory.state_dict().items()}
    memory(torch.randn(5, 4), torch.arange(5))
    state = memory.state_dict()
    assert all(isinstance(t, Tensor) and t.shape == shapes[name] for name, t in state.items())
    saved = safetensors.torch.save(state)
    fresh = CrossBatchMemory(EasyPositiveTripletLoss(), 4, 6)
    fresh.load_state_dict(safetensors.torch.load(saved))
    assert all(torch.equal(t, state[name]) for name, t in fresh.state_dict().items())
    assert fresh.seen == 5


def test_a_copy_that_averages_takes_the_memory_along():
    memory = CrossBatchMemory(EasyPositiveTripletLoss(), 4, 6)
    model = torch.nn.ModuleList([torch.nn.Linear(4, 4), memory])
    copied = torch.optim.swa_utils.AveragedModel(model)
    for _ in range(3):
        memory(torch.randn(4, 4), torch.arange(4))
        copied.update_parameters(model)
    assert all(torch.equal(t, copied.module[1].state_dict()[name]) for name, t in memory.state_dict().items())


def test_a_state_dict_of_an_earlier_version():
    memory = CrossBatchMemory(EasyPositiveTripletLoss(), 2, 4)
    state = {"embeddings": torch.zeros(4, 2), "labels": torch.zeros(4).long(), "sample_ids": torch.full((4,), -1)}
    memory.load_state_dict(state | {"_extra_state": {"seen": 3}})
    assert memory.labels.tolist() == [0, 0, 0, UNADMITTED]
    assert memory.seen == 3
    assert state["labels"].tolist() == [0] * 4


def test_reset_forgets_also_after_to_empty():
    with torch.device("meta"):
        memory = CrossBatchMemory(EasyPositiveTripletLoss(), 4, 6)
    memory.to_empty(device="cpu").reset_parameters()
    x, labels = torch.eye(4), torch.tensor([0, 0, 1, 1])
    assert torch.equal(memory(x, labels), memory.loss(x, labels))
    memory.reset_parameters()
    assert torch.equal(memory(x, labels), memory.loss(x, labels))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_is_refused_where_it_would_compute_something_else(use_reentrant):
    def loss_within(module):
        def function(x):
            return module(x, torch.arange(8) % 2).exp()  # exp: its backward asks for the result

        x = torch.randn(8, 4, requires_grad=True)
        checkpoint(function, x, use_reentrant=use_reentrant).backward()
        return x.grad

    memory = CrossBatchMemory(EasyPositiveTripletLoss(), 4, 6)
    with pytest.raises(RuntimeError, match="CrossBatchMemory: expected a call outside of a backward"):
        loss_within(memory)
    assert loss_within(memory.eval()).isfinite().all()
    drawing = EasyPositiveMarginLoss(generator=torch.Generator())
    with pytest.raises(RuntimeError, match="EasyPositiveMarginLoss with a generator: expected a call outside"):
        loss_within(drawing)
    drawing.generator = None  # torch's own is put back by the checkpoint
    assert loss_within(drawing).isfinite().all()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.memory = nn.Linear(4, 4), CrossBatchMemory(EasyPositiveTripletLoss(), 4, 16)

    def forward(self, x, labels):
        return self.memory(self.net(x), labels)


def train_with_another(rank, rendezvous):
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    torch.manual_seed(rank)
    model, kept_by_first = Model(), rendezvous.with_suffix(".memory")
    both = nn.parallel.DistributedDataParallel(model)
    for step in range(3):
        x, rows = torch.randn(8, 4), 4 + 4 * rank  # other rows, and another number of them
        both(x[:rows], torch.arange(rows) % 2).backward()
        if step == 1 and rank == 0:
            torch.save(model.memory.state_dict(), kept_by_first)
    dist.barrier()
    if rank == 1:  # the last broadcast was that of what process 0 had after the second step
        before, after = torch.load(kept_by_first), model.memory.state_dict()
        kept = torch.arange(8)
        assert torch.equal(after["embeddings"][kept], before["embeddings"][kept])
        assert torch.equal(after["labels"][kept], before["labels"][kept])
        assert (before["seen"], after["seen"]) == (8, 16)
    dist.destroy_process_group()


@runs_backward
def test_a_broadcast_of_buffers_gives_all_processes_the_memory_of_the_first(tmp_path):
    processes = [Forked(train_with_another, rank, tmp_path / "rendezvous") for rank in range(2)]
    for code, printed in [process.result() for process in processes]:
        assert code == 0, printed
