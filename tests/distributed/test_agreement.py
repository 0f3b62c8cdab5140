"""Ranks that disagree get one error on all of them, and what a step sends is what the page says."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from fused_margins.core.ranks import exchange_device
from fused_margins.distributed import ShardedMarginSoftmaxLoss
from fused_margins.distributed.plan import DEVICES, plan
from fused_margins.functional import margin_softmax_loss, mine_positives

from . import ranks

LABELS = torch.tensor([0, 1, 2])


def made(rank: int, **options: Any) -> ShardedMarginSoftmaxLoss:
    return ShardedMarginSoftmaxLoss(5, 4, **options)


def called(rank: int, x: Tensor, labels: Tensor = LABELS, **values: Tensor) -> None:
    made(rank)(x, labels, **values)


def rows(width: int = 4, dtype: torch.dtype = torch.float32, learns: bool = True) -> Tensor:
    return torch.ones(3, width, dtype=dtype, requires_grad=learns)


def replaced(rank: int) -> None:
    loss = made(rank)
    if rank == 1:
        loss.weight = torch.nn.Parameter(torch.ones(5, 4))
    loss(rows(), LABELS)


def attached(rank: int, leaves_out: int, lacks_the_weight: int) -> None:
    loss, other = made(rank, sample_rate=0.5), torch.nn.Parameter(torch.ones(1))
    if rank != leaves_out:
        loss.attach(torch.optim.SGD([other] if rank == lacks_the_weight else loss.parameters(), lr=0.1))
    loss(rows(), LABELS)


def drifted(rank: int) -> None:
    loss = made(rank, learnable_scale=True)
    with torch.no_grad():
        loss.scale.fill_(10.0 + rank)
    loss(rows(), LABELS)


DISAGREEMENTS: dict[str, tuple[Callable[[int], Any], type[Exception], str]] = {
    "a margin": (
        lambda r: made(r, margin=0.1 + (r == 1)),
        ValueError,
        "margin: expected the same on all ranks, got 0.1 on ranks 0, 2; 1.1 on rank 1",
    ),
    "an option left out": (
        lambda r: made(r, **{} if r else {"scale": 4.0}),
        ValueError,
        "scale: expected the same on all ranks, got 4.0 on rank 0; 30.0 on ranks 1, 2",
    ),
    "the margins of classes": (
        lambda r: made(r, margin=torch.full((5,), float(r == 2))),
        ValueError,
        "margin: expected the same on all ranks, got a tensor of shape (5,) and torch.float32 with digest",
    ),
    "an option that is none": (
        lambda r: made(r, label_smoothing=2.0 * (r == 2)),
        ValueError,
        "rank 2: label_smoothing: expected a number in [0, 1], got 2.0",
    ),
    "the dtype of rows": (
        lambda r: made(r).to(torch.float64 if r == 1 else torch.float32)(
            rows(dtype=torch.float64 if r == 1 else torch.float32), LABELS
        ),
        ValueError,
        "dtype: expected the same on all ranks, got torch.float32 on ranks 0, 2; torch.float64 on rank 1",
    ),
    "the width of rows": (
        lambda r: called(r, rows(width=4 + (r == 1))),
        ValueError,
        "rank 1: weight: expected width 5 as embeddings has, got 4",
    ),
    "a gradient": (
        lambda r: called(r, rows(learns=r != 0)),
        ValueError,
        "a gradient of embeddings: expected the same on all ranks, got False on rank 0; True on ranks 1, 2",
    ),
    "scales of samples": (
        lambda r: called(r, rows(), **{"scale": torch.ones(3, 1)} if r else {}),
        ValueError,
        "values of samples: expected the same on all ranks, got None on rank 0; 'scale' on ranks 1, 2",
    ),
    "the shape of scales": (
        lambda r: called(r, rows(), scale=torch.ones(3 + (r == 2), 1)),
        ValueError,
        "rank 2: scale: expected one a sample (3, 1), got (4, 1)",
    ),
    "the dtype of labels": (
        lambda r: called(r, rows(), LABELS.float() if r == 1 else LABELS),
        TypeError,
        "rank 1: labels: expected an integer dtype, got torch.float32",
    ),
    "a label": (
        lambda r: called(r, rows(), LABELS + 2 * r),
        IndexError,
        "rank 2: labels: expected values in [0, 5) or -100 (ignored), got 5 in row 1",
    ),
    "a weight for a function of one process": (
        lambda r: margin_softmax_loss(rows(), made(r).weight, LABELS),
        TypeError,
        "weight: expected a plain tensor, got a DTensor with placements (Shard(dim=0),); to_local() gives this rank's",
    ),
    "classes for a miner of one process": (
        lambda r: mine_positives(made(r).weight, torch.arange(5)),
        TypeError,
        "embeddings: expected a plain tensor, got a DTensor with placements (Shard(dim=0),)",
    ),
    "whose weight": (
        replaced,
        RuntimeError,
        "the loss stays outside of DDP, and fully_shard takes ignored_params=set(loss.parameters())",
    ),
    "a label that is reserved": (
        lambda r: called(r, rows(), LABELS.where(LABELS != 0, -(2**63)) if r == 1 else LABELS),
        IndexError,
        "rank 1: labels: expected values in [0, 5) or -100 (ignored), got -9223372036854775808 in row 0",
    ),
    "the number of classes": (
        lambda r: ShardedMarginSoftmaxLoss(0 if r == 1 else 5, 4),
        ValueError,
        "rank 1: num_classes: expected at least 1, got 0",
    ),
    "a mesh": (
        lambda r: made(r, mesh=2 if r == 1 else None),
        TypeError,
        "rank 1: mesh: expected a DeviceMesh or None, got int",
    ),
    "a rank that does not attach": (
        lambda r: attached(r, leaves_out=1, lacks_the_weight=-1),
        RuntimeError,
        "rank 1: sample_rate: expected 1 without an optimizer, got 0.5; loss.attach(optimizer) hands it the sampled",
    ),
    "another call": (
        lambda r: made(r).predictions(rows()) if r == 1 else called(r, rows()),
        ValueError,
        "the call: expected the same on all ranks, got forward on ranks 0, 2; predictions on rank 1",
    ),
    "an optimizer of other parameters": (
        lambda r: attached(r, leaves_out=-1, lacks_the_weight=1),
        ValueError,
        "rank 1: optimizer: expected one that has the weight of the loss as a parameter",
    ),
    "rows to predict": (
        lambda r: made(r).predictions(None if r == 1 else rows()),
        TypeError,
        "rank 1: embeddings: expected a tensor, got NoneType",
    ),
    "a scale that learns": (
        drifted,
        ValueError,
        "scale: expected the same on all ranks, got 10.0 on rank 0; 11.0 on rank 1; 12.0 on rank 2",
    ),
    "margins of classes that learn elsewhere": (
        lambda r: made(r, margin=torch.nn.Parameter(torch.zeros(5))),
        TypeError,
        "margin: expected a plain tensor, of which every rank keeps a copy of its part, got a Parameter",
    ),
    "the state dict of one process": (
        lambda r: made(r).load_state_dict({"weight": torch.ones(5, 4)}),
        TypeError,
        "weight: expected a DTensor, as this module has, got a plain tensor in the state dict",
    ),
}


def disagree(rank: int) -> list[tuple[str, str]]:
    for mine, theirs in ({"scale": 64}, {"scale": 64.0}), ({"scale": 30}, {}), ({"margin": 0}, {"margin": 0.0}):
        made(rank, **(mine if rank else theirs))  # options that are the same, otherwise written
    found = []
    for call, *_ in DISAGREEMENTS.values():
        try:
            call(rank)
        except Exception as error:
            found.append((type(error).__name__, str(error)))
        else:
            found.append(("nothing", ""))
        dist.barrier()  # nobody is left behind in a collective
    return found


def test_all_ranks_are_told_which_of_them_differs_in_what(tmp_path: Path) -> None:
    found = ranks.run(disagree, 3, tmp_path)
    for i, (name, (_, kind, text)) in enumerate(DISAGREEMENTS.items()):
        for of_rank in found:
            assert of_rank[i][0] == kind.__name__, (name, of_rank[i])
            assert text in of_rank[i][1], name


def test_a_group_that_names_no_backend_exchanges_where_nccl_does(monkeypatch):
    dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert exchange_device() == torch.device("cpu")
        monkeypatch.setattr(dist, "get_backend_config", lambda group: "cuda:nccl")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert exchange_device() == torch.device("cuda")
    finally:
        dist.destroy_process_group()


def test_without_a_process_group_the_error_says_how_to_get_one():
    with pytest.raises(RuntimeError, match=r"mesh: expected a process group, got none; start the script with torchrun"):
        ShardedMarginSoftmaxLoss(5, 4)
    with pytest.raises(TypeError, match="mesh: expected a DeviceMesh or None, got int"):
        ShardedMarginSoftmaxLoss(5, 4, mesh=2)


def sent(rank: int, counts: tuple[int, ...], dtype: torch.dtype, classes: int, options: dict[str, Any]) -> list[int]:
    """Bytes that a step hands to the collectives, and receives from them: of the forward, and of the backward."""
    loss = ShardedMarginSoftmaxLoss(classes, 8, **options).to(dtype)
    x, labels = torch.ones(counts[rank], 8, dtype=dtype, requires_grad=True), torch.zeros(counts[rank]).long()
    with Counted() as counted:
        value = loss(x, labels)
        forward = counted.total
        value.backward()
    return [*forward, *(b - a for a, b in zip(forward, counted.total))]


class Counted:
    """Counts the bytes of the tensors that torch's collectives are given to send and to fill."""

    def __enter__(self) -> "Counted":
        self.total = [0, 0]
        self.named = [n for n in ("all_gather_single", "reduce_scatter_single", "all_reduce") if hasattr(dist, n)]
        self.named += [] if "all_gather_single" in self.named else ["all_gather_into_tensor", "reduce_scatter_tensor"]
        self.real = {name: getattr(dist, name) for name in self.named}
        for name in self.named:
            setattr(dist, name, self.wrapped(name))
        return self

    def wrapped(self, name: str) -> Callable[..., Any]:
        def call(first: Tensor, *args: Any, **kwargs: Any) -> Any:
            given = first if name == "all_reduce" else args[0]
            self.total = [self.total[0] + given.nbytes, self.total[1] + first.nbytes]
            return self.real[name](first, *args, **kwargs)

        return call

    def __exit__(self, *_: Any) -> None:
        for name, real in self.real.items():
            setattr(dist, name, real)


BYTES = [
    case
    for case in itertools.product(
        [(3, 3, 3), (5, 0, 2)],
        [torch.float32, torch.bfloat16, torch.float64],
        [4, 400],
        [{}, {"label_smoothing": 0.1, "learnable_scale": True}, {"equal_batches": True}],
    )
    if case[0] == (3, 3, 3) or "equal_batches" not in case[3]
]


def all_sent(rank: int) -> list[list[int]]:
    return [sent(rank, *case) for case in BYTES]


def test_the_bytes_of_a_step_do_not_depend_on_the_number_of_classes(tmp_path: Path) -> None:
    found = ranks.run(all_sent, 3, tmp_path)
    for i, (counts, dtype, classes, options) in enumerate(BYTES):
        n, width, all_rows, num_ranks = max(counts), 8, sum(counts), len(counts)
        e, a = dtype.itemsize, max(dtype.itemsize, 4)
        header = 0 if "equal_batches" in options else 16
        vectors = 3 + ("label_smoothing" in options)
        of_numbers = a if "learnable_scale" in options else 0  # the sum of class weights; the gradient of the scale
        reduced = vectors * all_rows * a + of_numbers
        expected = [
            header + n * 8 + n * width * e + reduced,
            num_ranks * (header + n * 8 + n * width * e) + reduced,
            num_ranks * n * width * a + of_numbers,
            n * width * a + of_numbers,
        ]
        if "label_smoothing" not in options and counts == (n,) * num_ranks:
            device = dataclasses.replace(DEVICES["h200"], dtype=dtype)
            planned = plan(classes, width, num_ranks, n, device, equal_batches=not header)
            assert sum(planned.sent.values()) == expected[0] + expected[2]
        for rank, got in enumerate(of_rank[i] for of_rank in found):
            assert got == expected, (rank, counts, dtype, classes, options)
