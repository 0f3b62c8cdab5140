"""Saved on some ranks, loaded on others: training goes on to the same numbers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_margins import parameter_groups
from fused_margins.distributed import ShardedMarginSoftmaxLoss, load_checkpoint, save_checkpoint

from . import ranks
from .test_recipes import whole

CLASSES = 9
OPTIMIZERS = {
    "SGD": lambda groups: torch.optim.SGD(groups, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda groups: torch.optim.AdamW(groups),
}
LOSSES: list[dict[str, Any]] = [
    {"margin": torch.linspace(-0.2, 0.4, CLASSES), "learnable_margin": True, "learnable_scale": True},
    {"margin_type": "angular", "margin": 0.4, "centers_per_class": 2, "class_weight": torch.arange(1.0, CLASSES + 1)},
]
CASES = list(zip(OPTIMIZERS, LOSSES))


def made(optimizer: str, options: dict[str, Any], seed: int) -> tuple[nn.ModuleDict, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    both = nn.ModuleDict({"model": nn.Linear(4, 6), "loss": ShardedMarginSoftmaxLoss(CLASSES, 6, **options)})
    both.double()
    return both, OPTIMIZERS[optimizer](parameter_groups(both["model"], both["loss"], lr=0.1))


def train(rank: int, num_ranks: int, both: nn.ModuleDict, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Ten rows a step, on any number of ranks; gradients of the backbone are summed, as its wrapper would do."""
    for step in steps:
        draws = torch.Generator().manual_seed(step)
        x, labels = (
            torch.randn(10, 4, dtype=torch.float64, generator=draws),
            torch.randint(CLASSES, (10,), generator=draws),
        )
        x, labels = (torch.tensor_split(t, num_ranks)[rank] for t in (x, labels))
        optimizer.zero_grad()
        both["loss"](both["model"](x), labels).backward()
        for parameter in both["model"].parameters():
            torch.distributed.all_reduce(parameter.grad)
        optimizer.step()


def saved(rank: int, num_ranks: int, folder: str) -> list[list[Tensor]]:
    """Parameters after ten steps, of which a checkpoint has the first five."""
    found = []
    for i, case in enumerate(CASES):
        both, optimizer = made(*case, seed=0)
        train(rank, num_ranks, both, optimizer, range(3))
        save_checkpoint(f"{folder}/{i}", both, optimizer, step=3)
        train(rank, num_ranks, both, optimizer, range(3, 5))
        save_checkpoint(f"{folder}/{i}", both, optimizer, step=5)
        train(rank, num_ranks, both, optimizer, range(5, 8))
        found.append([whole(p) for p in both.parameters()])
    return found


def resumed(rank: int, num_ranks: int, folder: str) -> list[list[Tensor]]:
    found = []
    for i, case in enumerate(CASES):
        both, optimizer = made(*case, seed=1)
        more = load_checkpoint(f"{folder}/{i}", both, optimizer, step=0)
        assert more == {"step": 5}
        train(rank, num_ranks, both, optimizer, range(more["step"], 8))
        found.append([whole(p) for p in both.parameters()])
    return found


def test_a_checkpoint_of_four_ranks_goes_on_on_other_numbers_of_them(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    expected = ranks.run(saved, 4, tmp_path, 4, str(folder))[0]
    assert sorted(p.name for p in folder.iterdir()) == [str(i) for i in range(len(CASES))], "parts were left behind"
    for num_ranks in (3, 1, 5):
        for of_rank in ranks.run(resumed, num_ranks, tmp_path, num_ranks, str(folder)):
            for (optimizer, options), got, want in zip(CASES, of_rank, expected):
                name = f"{optimizer}, {sorted(options)} on {num_ranks} ranks"
                torch.testing.assert_close(got, want, msg=lambda text, n=name: f"{n}: {text}")


def test_a_checkpoint_that_is_not_whole_is_none(tmp_path: Path) -> None:
    (tmp_path / "last.part").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"folder: expected a checkpoint, got .*last, in which there is no whole"
    ):
        load_checkpoint(tmp_path / "last", nn.Linear(2, 2))


def refused(rank: int, folder: str) -> list[str]:
    """What a load says that finds something else, and a save of ranks that differ."""
    both, optimizer = made("AdamW", {}, seed=0)
    save_checkpoint(f"{folder}/a", both, optimizer, step=1)
    other = nn.ModuleDict({"model": nn.Linear(4, 6), "loss": ShardedMarginSoftmaxLoss(CLASSES + 1, 6)}).double()
    save_checkpoint(f"{folder}/model", both)
    calls: list[Callable[[], Any]] = [
        lambda: load_checkpoint(f"{folder}/a", both, optimizer, epoch=0),
        lambda: load_checkpoint(f"{folder}/a", other),
        lambda: load_checkpoint(f"{folder}/model", both, optimizer),
        lambda: save_checkpoint(f"{folder}/b{rank}", both),
        lambda: save_checkpoint(f"{folder}/c", both, step=rank),
        lambda: load_checkpoint(f"{folder}/{'ab'[rank]}", both),
    ]
    found = []
    for call in calls:
        with pytest.raises((RuntimeError, ValueError, FileNotFoundError)) as raised:
            call()
        found.append(str(raised.value))
    return found


def test_what_is_not_as_it_was_saved_is_named_at_the_front(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for said in ranks.run(refused, 2, tmp_path, str(folder)):
        for text, words in zip(
            said,
            [
                ("folder: expected what the model, the optimizers and more have, got", "more.epoch"),
                ("folder: expected what the model, the optimizers and more have, got", "model.loss.weight"),
                ("folder: expected what the model, the optimizers and more have, got", "optimizers.state"),
                ("folder: expected the same on all ranks, got '", "b0' on rank 0"),
                ("step: expected the same on all ranks, got 0 on rank 0; 1 on rank 1", ""),
                ("rank 1: folder: expected a checkpoint, got", "in which there is no whole one"),
            ],
            strict=True,
        ):
            assert text.startswith(words[0]), text
            assert words[1] in text, text
            assert len(text.splitlines()) == 1, text
    assert sorted(p.name for p in folder.iterdir()) == ["a", "model"]
