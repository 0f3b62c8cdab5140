"""Losses and miners on the rows of all ranks against one process that has all rows."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist

from fused_margins import (
    CrossBatchMemory,
    EasyPositiveInfoNCELoss,
    EasyPositiveMarginLoss,
    EasyPositiveTripletLoss,
    MultiSimilarityLoss,
    NTXentLoss,
    SupConLoss,
    functional,
)
from fused_margins.distributed import GlobalBatchLoss, mine_negatives, mine_positives, ring

from . import ranks

WIDTH = 5
LOSSES: dict[str, Callable[[], nn.Module]] = {
    "triplet": EasyPositiveTripletLoss,
    "triplet, hard, dot": lambda: EasyPositiveTripletLoss(
        0.5, "hard", "hard", similarity="dot", normalize=False, reduction="sum"
    ),
    "triplet, all, hard": lambda: EasyPositiveTripletLoss(0.5, "hard", "all", reduction="none"),
    "margin": lambda: EasyPositiveMarginLoss(negatives="hard"),
    "margin that learns": lambda: EasyPositiveMarginLoss(3, 0.4, negatives="semihard"),
    "InfoNCE": EasyPositiveInfoNCELoss,
    "InfoNCE, none": lambda: EasyPositiveInfoNCELoss(0.5, "hard", reduction="none"),
    "InfoNCE, EPSHN": lambda: EasyPositiveInfoNCELoss.ephn("semihard"),
    "NTXent": NTXentLoss,
    "NTXent, none": lambda: NTXentLoss(0.5, reduction="none"),
    "SupCon": SupConLoss,
    "SupCon, none": lambda: SupConLoss(0.3, reduction="none"),
    "MultiSimilarity": MultiSimilarityLoss,
    "MultiSimilarity, sum": lambda: MultiSimilarityLoss(reduction="sum"),
}
DRAWN: dict[str, Callable[[], nn.Module]] = {  # on `forced` rows, which leave nothing to chance
    "triplet, random": lambda: EasyPositiveTripletLoss(0.9, "random", "random", reduction="sum"),
    "margin, distance-weighted": lambda: EasyPositiveMarginLoss(reduction="sum"),
    "InfoNCE, all, random": lambda: EasyPositiveInfoNCELoss(0.5, "all", negatives="random"),
}
# At SupCon's own temperature the gradient of so few rows is the rounding of parts that cancel.
in_float32 = functools.partial(SupConLoss, 0.3)
ONE_TO_GATHER = ("margin, distance-weighted", "InfoNCE, all, random")
SHAPES = {2: [(6, 3), (0, 7)], 3: [(4, 0, 5), (1, 1, 1), (0, 0, 0)]}
FORCED = {2: [(1, 2)], 3: [(2, 0, 1)]}


class Case(NamedTuple):
    """Rows of each rank, and how they are brought together."""

    make: Callable[[], nn.Module]
    counts: tuple[int, ...]
    gather: bool
    forced: bool = False
    dtype: torch.dtype = torch.float64

    def draw(self) -> tuple[Tensor, Tensor]:
        draws = torch.Generator().manual_seed(4)
        rows = sum(self.counts)
        x = torch.randn(rows, WIDTH, dtype=self.dtype, generator=draws)
        if self.forced:
            return x, torch.tensor([0, 0, 1])
        labels = torch.randint(3, (rows,), generator=draws)
        if rows > 6:  # equal ones tie: the first in the order of the ranks counts
            x[5], labels[5] = x[1], labels[1]
        return x, labels


def cases(num_ranks: int) -> Iterator[tuple[str, Case]]:
    for gather in (True, False):
        for counts in SHAPES[num_ranks]:
            for name, make in LOSSES.items():
                yield f"{name}, {counts}, gather={gather}", Case(make, counts, gather)
            yield f"float32, {counts}, gather={gather}", Case(in_float32, counts, gather, dtype=torch.float32)
        for counts in FORCED[num_ranks]:
            for name, make in DRAWN.items():
                if gather or name not in ONE_TO_GATHER:
                    yield f"{name}, {counts}, gather={gather}", Case(make, counts, gather, forced=True)


def step(loss: nn.Module, x: Tensor, labels: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """The loss, the gradients of it, or of the losses with weights, and of parameters."""
    x = x.clone().requires_grad_()
    value = loss(x, labels)
    (value * weight[: len(value)] if value.dim() else value * 3).sum().backward()
    return {"loss": value.detach(), "embeddings": x.grad} | {n[-4:]: p.grad for n, p in loss.named_parameters()}


def on_ranks(rank: int, num_ranks: int) -> list[dict[str, Tensor]]:
    found = []
    for name, case in cases(num_ranks):
        try:
            loss = GlobalBatchLoss(case.make(), gather=case.gather).to(case.dtype)
            x, labels = (t.split(case.counts)[rank] for t in case.draw())
            found.append(step(loss, x, labels, torch.full((100,), 1.0 + rank)))
        except BaseException as error:
            raise RuntimeError(f"in case {name!r}") from error
    return found


def in_one_process(case: Case) -> tuple[dict[str, Tensor], Tensor]:
    """The same, and of each loss that is not reduced its rank."""
    x, labels = case.draw()
    loss = case.make().to(case.dtype)
    value = loss(x, labels)
    rank = torch.arange(len(case.counts)).repeat_interleave(torch.tensor(case.counts))
    if value.dim() and len(value) != len(x):  # of pairs, in the order of their anchors
        same = labels[:, None] == labels
        rank = rank.repeat_interleave(same.sum(1) - 1)
    return step(loss, x, labels, 1.0 + rank), rank


@pytest.mark.parametrize("num_ranks", SHAPES)
def test_loss_and_gradients_are_those_of_one_process(num_ranks: int, tmp_path: Path) -> None:
    found = ranks.run(on_ranks, num_ranks, tmp_path, num_ranks)
    for i, (name, case) in enumerate(cases(num_ranks)):
        expected, of_rank = in_one_process(case)
        for rank in range(num_ranks):
            assert found[rank][i].keys() == expected.keys(), name
            for what, want in expected.items():
                if what == "embeddings":
                    want = want.split(case.counts)[rank]
                elif what == "loss" and want.dim():
                    want = want[of_rank == rank]
                torch.testing.assert_close(
                    found[rank][i][what],
                    want,
                    rtol=1e-10 if case.dtype == torch.float64 else 2e-5,
                    atol=1e-12 if case.dtype == torch.float64 else 1e-6,
                    msg=lambda text, w=what, n=name, r=rank: f"{w} of {n} on rank {r}: {text}",
                )


COUNTS = (3, 0, 4)


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(COUNTS), WIDTH, dtype=torch.float64, generator=draws)
    return x, torch.randint(3, (sum(COUNTS),), generator=draws)


def own(rank: int, *tensors: Tensor) -> list[Tensor]:
    return [t.split(COUNTS)[rank] for t in tensors]


def mined(rank: int) -> list[Tensor]:
    x, labels = own(rank, *batch())
    hard = mine_positives(x, labels, strategy="hard", similarity="dot")
    return [*mine_positives(x, labels), *hard, *mine_negatives(x, labels, strategy="semihard", similarity="dot")]


def remembered(rank: int | None, with_ids: bool) -> list[Tensor]:
    """Losses and gradients of some steps with a memory, and what it holds after them; None: in one process."""
    memory = CrossBatchMemory(NTXentLoss(), WIDTH, size=10).double()
    loss = memory if rank is None else GlobalBatchLoss(memory)
    found = []
    for seed in range(4):
        x, labels = batch(seed)
        ids = torch.arange(len(x)) + 2 * seed if with_ids else None
        if rank is not None:
            x, labels = own(rank, x, labels)
            ids = None if ids is None else own(rank, ids)[0]
        x.requires_grad_()
        value = loss(x, labels, ids)
        value.backward()
        found += [value.detach(), x.grad]
    return [*found, *memory.state_dict().values()]


def second_order(rank: int | None) -> Tensor:
    x, labels = batch() if rank is None else own(rank, *batch())
    x.requires_grad_()
    value = SupConLoss()(x, labels) if rank is None else GlobalBatchLoss(SupConLoss())(x, labels)
    (grad,) = torch.autograd.grad(value, x, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), x)
    return second


def scaled(rank: int) -> list[Tensor]:
    """Gradients that DDP will divide, of rows that come in another dtype under autocast."""
    x, labels = own(rank, *batch())
    x.requires_grad_()
    GlobalBatchLoss(SupConLoss(), embedding_gradient_scale=2.0)(x, labels).backward()
    found = [x.grad]
    for gather in (True, False):
        x = x.detach().float().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            value = GlobalBatchLoss(SupConLoss(), gather=gather)(x, labels)
        value.backward()
        found += [value.detach(), x.grad]
    return found


def damaged(rank: int, gather: bool) -> float:
    x, labels = own(rank, *batch())
    x[:1] = torch.nan if rank == 2 else x[:1]
    return GlobalBatchLoss(EasyPositiveTripletLoss(), gather=gather)(x, labels).item()


def in_a_group(rank: int) -> list[float]:
    """Ranks 0 and 2, which have all rows, as a group of their own."""
    group = dist.new_group([0, 2])
    x, labels = own(rank, *batch())
    losses = [] if rank == 1 else [GlobalBatchLoss(SupConLoss(), gather=g, group=group) for g in (True, False)]
    return [loss(x, labels).item() for loss in losses]


def bytes_sent(rank: int) -> list[int]:
    """Of a sum over the references in a ring: by its forward, and by both."""
    real, sent = dist.batch_isend_irecv, [0]

    def counted(todo: list[dist.P2POp]) -> Any:
        sent[0] += sum(p.tensor.nbytes for p in todo if p.op is dist.isend)
        return real(todo)

    dist.batch_isend_irecv = counted
    try:
        x = torch.randn(3, WIDTH, requires_grad=True)
        labels = torch.arange(3)
        around = ring.Ring(x, labels, labels.repeat(3), (3, 3, 3), None)
        total = around.sum_of_positives().sum()
        found = list(sent)
        total.backward()
        return [*found, *sent]
    finally:
        dist.batch_isend_irecv = real


DISAGREEMENTS: dict[str, tuple[Callable[[int], Any], type[Exception], str]] = {
    "a loss": (
        lambda r: GlobalBatchLoss(SupConLoss() if r else NTXentLoss()),
        ValueError,
        "loss: expected the same on all ranks, got 'NTXentLoss' on rank 0; 'SupConLoss' on ranks 1, 2",
    ),
    "a temperature": (
        lambda r: GlobalBatchLoss(SupConLoss(0.1 + (r == 1))),
        ValueError,
        "temperature: expected the same on all ranks, got 0.1 on ranks 0, 2; 1.1 on rank 1",
    ),
    "a flag": (
        lambda r: GlobalBatchLoss(SupConLoss(), gather=None if r == 2 else True),
        TypeError,
        "rank 2: gather: expected True or False, got None",
    ),
    "the dtype of rows": (
        lambda r: GlobalBatchLoss(SupConLoss())(torch.ones(2, 3).to(torch.float16 if r else torch.float32), IDS),
        ValueError,
        "dtype: expected the same on all ranks, got torch.float32 on rank 0; torch.float16 on ranks 1, 2",
    ),
    "labels": (
        lambda r: GlobalBatchLoss(SupConLoss())(torch.ones(2, 3), IDS[: 1 + (r != 1)]),
        ValueError,
        "rank 1: labels: expected shape (2,), got (1,)",
    ),
    "a class": (
        lambda r: GlobalBatchLoss(EasyPositiveMarginLoss(4))(torch.ones(2, 3), IDS + r),
        IndexError,
        "rank 2: labels: expected values in [0, 4)",
    ),
    "ids": (
        lambda r: GlobalBatchLoss(CrossBatchMemory(SupConLoss(), 3))(torch.ones(2, 3), IDS, IDS if r else None),
        ValueError,
        "sample_ids: expected the same on all ranks, got None on rank 0; 'given' on ranks 1, 2",
    ),
    "rows of a miner": (
        lambda r: mine_positives(torch.ones(2, 3 + r), IDS),
        ValueError,
        "width: expected the same on all ranks, got 3 on rank 0; 4 on rank 1; 5 on rank 2",
    ),
    "a strategy of a miner": (
        lambda r: mine_negatives(torch.ones(2, 3), IDS, strategy="soft" if r == 1 else "hard"),
        ValueError,
        "rank 1: strategy: expected one of 'hard', 'semihard', got 'soft'",
    ),
    "bounds of a miner": (
        lambda r: mine_negatives(torch.ones(2, 3), IDS, positive_similarity=torch.ones(2 + (r == 1))),
        ValueError,
        "rank 1: positive_similarity: expected a tensor of shape (2,), got (3,)",
    ),
}
IDS = torch.tensor([1, 2])


def disagree(rank: int) -> list[tuple[str, str]]:
    found = []
    for call, *_ in DISAGREEMENTS.values():
        try:
            call(rank)
            found.append(("nothing", ""))
        except Exception as error:
            found.append((type(error).__name__, str(error)))
        dist.barrier()
    return found


def single_cases(rank: int) -> dict[str, Any]:
    return {
        "mined": mined(rank),
        "remembered": [remembered(rank, with_ids) for with_ids in (False, True)],
        "second": second_order(rank),
        "scaled": scaled(rank),
        "damaged": [damaged(rank, gather) for gather in (True, False)],
        "group": in_a_group(rank),
        "sent": bytes_sent(rank),
        "errors": disagree(rank),
    }


def test_what_else_there_is(tmp_path: Path) -> None:
    found = ranks.run(single_cases, 3, tmp_path)
    x, labels = batch()
    hard = functional.mine_positives(x, labels, strategy="hard", similarity="dot")
    semihard = functional.mine_negatives(x, labels, strategy="semihard", similarity="dot")
    loss = SupConLoss()
    learning = x.clone().requires_grad_()
    value = loss(learning, labels)
    value.backward()
    for rank, of_rank in enumerate(found):
        expected = own(rank, *functional.mine_positives(x, labels), *hard, *semihard)
        torch.testing.assert_close(of_rank["mined"], expected)
        for with_ids in (False, True):
            whole = remembered(None, with_ids)
            whole[1:8:2] = own(rank, *whole[1:8:2])
            torch.testing.assert_close(of_rank["remembered"][with_ids], whole)
        torch.testing.assert_close(of_rank["second"], own(rank, second_order(None))[0])
        (grad,) = own(rank, learning.grad)
        twice, *narrow = of_rank["scaled"]
        torch.testing.assert_close(twice, 2 * grad)
        for got in narrow[::2]:
            torch.testing.assert_close(got, value.detach().float(), rtol=0.05, atol=0.05)
        for got in narrow[1::2]:
            torch.testing.assert_close(got, grad.float(), rtol=0.1, atol=0.05)
        assert all(d != d for d in of_rank["damaged"]), "no NaN"
        assert of_rank["group"] == ([] if rank == 1 else pytest.approx([value.item()] * 2))
        forward = 2 * 3 * WIDTH * 4
        assert of_rank["sent"] == [forward, forward + forward + 3 * 3 * WIDTH * 4]
        for (name, (_, kind, text)), got in zip(DISAGREEMENTS.items(), of_rank["errors"]):
            assert got[0] == kind.__name__, (name, got)
            assert text in got[1], (name, got)


REFUSED = {
    "a memory": lambda: CrossBatchMemory(SupConLoss(), 3),
    "'distance-weighted'": EasyPositiveMarginLoss,
    "one of each pair": lambda: EasyPositiveTripletLoss(positives="all"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_ring_refuses_what_takes_all_references_at_once(reason: str) -> None:
    with pytest.raises(ValueError, match=f"gather: expected True with .*{reason}.*, got False"):
        GlobalBatchLoss(REFUSED[reason](), gather=False)


def test_without_a_process_group_the_call_is_that_of_the_loss():
    x, labels = batch()
    assert torch.equal(GlobalBatchLoss(SupConLoss(), gather=False)(x, labels), SupConLoss()(x, labels))
    memory = GlobalBatchLoss(CrossBatchMemory(NTXentLoss(), WIDTH, 8).double())
    memory(x, labels, torch.arange(len(x)))
    assert memory.loss.seen == len(x)
    with pytest.raises(TypeError, match="loss: expected one of the losses on pairs of a batch, got Linear"):
        GlobalBatchLoss(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="sample_ids: expected None with a loss that remembers nothing"):
        GlobalBatchLoss(SupConLoss())(x, labels, labels)
