"""Steps on a sample of the classes against one process that steps the same rows by hand, and leaves all others."""

import copy
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from fused_margins.distributed import ShardedMarginSoftmaxLoss, clip_grad_norm_, load_checkpoint, save_checkpoint
from fused_margins.distributed.sampling import draw
from fused_margins.functional import margin_softmax_loss

from . import ranks
from .test_recipes import whole

CLASSES, WIDTH, RATE, SEED, STEPS, LR = 23, 4, 0.3, 7, 6, 0.1
MARGIN = torch.linspace(-0.2, 0.3, CLASSES, dtype=torch.float64)


def batches(step: int) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(step)
    labels = torch.randint(CLASSES, (6,), generator=draws)
    labels[0] = -100
    return torch.randn(6, WIDTH, dtype=torch.float64, generator=draws), labels


def begun() -> Tensor:
    return torch.randn(CLASSES, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(9))


def by_hand(optimizer: str, halves: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """The weight after each step, and the classes that the step had."""
    weight, first, second = begun(), torch.zeros(CLASSES, WIDTH).double(), torch.zeros(CLASSES, WIDTH).double()
    for step in range(STEPS):
        parts = [batches(step), batches(step + 50)][: 1 + halves]
        used, grad = torch.empty(0, dtype=torch.int64), torch.zeros_like(weight)
        for x, labels in parts:
            own = torch.cat([draw(0, CLASSES, RATE, SEED, step), labels[labels >= 0]]).unique()
            rows = weight[own].requires_grad_()
            column = torch.where(labels < 0, labels, torch.searchsorted(own, labels))
            margin_softmax_loss(x, rows, column, scale=8.0, margin=MARGIN[own]).backward()
            grad[own] += rows.grad
            used = torch.cat([used, own]).unique()
        rows, g = weight[used], grad[used]
        if optimizer == "SGD":
            g = g + 0.01 * rows
            first[used] = 0.9 * first[used] + g
            weight[used] = rows - LR * first[used]
        else:
            first[used], second[used] = 0.9 * first[used] + 0.1 * g, 0.999 * second[used] + 0.001 * g**2
            mean, square = first[used] / (1 - 0.9 ** (step + 1)), second[used] / (1 - 0.999 ** (step + 1))
            weight[used] = rows * (1 - LR * 0.01) - LR * mean / (square.sqrt() + 1e-8)
        yield weight.clone(), used


def made(optimizer: str, **options: Any) -> tuple[ShardedMarginSoftmaxLoss, torch.optim.Optimizer]:
    options = {"scale": 8.0, "margin": MARGIN, "sample_rate": RATE, "sample_seed": SEED} | options
    loss = ShardedMarginSoftmaxLoss(CLASSES, WIDTH, **options).double()
    with torch.no_grad():
        loss.weight.to_local().copy_(loss._shards.part(begun()).to_local())
    kind = {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW}[optimizer]
    more = {"momentum": 0.9} if optimizer == "SGD" else {}
    steps = kind(loss.parameters(), LR, weight_decay=0.01, **more)
    loss.attach(steps)
    return loss, steps


def step(rank: int, loss: ShardedMarginSoftmaxLoss, optimizer: torch.optim.Optimizer, at: int, halves: bool) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for batch in [batches(at), batches(at + 50)][: 1 + halves]:
        x, labels = (torch.tensor_split(t, dist.get_world_size())[rank] for t in batch)
        scaler.scale(loss(x, labels)).backward()
    scaler.unscale_(optimizer)
    assert clip_grad_norm_(loss.parameters(), torch.inf) > 0
    scaler.step(optimizer)
    optimizer.zero_grad()


def all_steps(rank: int, folder: str) -> list[list[Tensor]]:
    found = []
    for optimizer, halves in CASES:
        loss, steps = made(optimizer)
        found.append([])
        for at in range(STEPS):
            if at == 3:  # goes on in a loss and an optimizer made anew
                save_checkpoint(folder, loss, steps)
                loss, steps = made(optimizer)
                load_checkpoint(folder, loss, steps)
            step(rank, loss, steps, at, halves)
            assert steps.param_groups[0]["params"][0] is loss.weight
            found[-1].append(whole(loss.weight).clone())
    return found


CASES = list(itertools.product(["SGD", "AdamW"], [False, True]))


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_rows_of_the_sample_step_and_no_others(num_ranks: int, tmp_path: Path) -> None:
    found = ranks.run(all_steps, num_ranks, tmp_path, str(tmp_path / "checkpoint"))
    for i, (optimizer, halves) in enumerate(CASES):
        for at, (weight, used) in enumerate(by_hand(optimizer, halves)):
            for of_rank in found:
                name = f"{optimizer}, step {at}, {'two batches' if halves else 'one batch'}"
                torch.testing.assert_close(of_rank[i][at], weight, msg=lambda text, n=name: f"{n}: {text}")
                moved = (of_rank[i][at] != (of_rank[i][at - 1] if at else begun())).any(1)
                assert not moved[~torch.isin(torch.arange(CLASSES), used)].any(), name
        assert 0 < len(used) < CLASSES


def exact(rank: int) -> list[Tensor]:
    """At rate 1, and without a gradient at any rate, all classes count."""
    x, labels = batches(0)
    found = []
    for rate in (1.0, 1.0 - 1e-12, RATE):
        loss, _ = made("SGD", sample_rate=rate)
        with torch.set_grad_enabled(rate != RATE):
            found.append(loss(x, labels).detach())
    return found


def refused(rank: int) -> list[str]:
    x, labels = batches(0)
    options: dict[str, Any] = {"sample_rate": 0.5}
    mistakes = [
        lambda: ShardedMarginSoftmaxLoss(CLASSES, WIDTH, **options).double()(x, labels),
        lambda: ShardedMarginSoftmaxLoss(CLASSES, WIDTH, label_smoothing=0.1, **options),
        lambda: ShardedMarginSoftmaxLoss(CLASSES, WIDTH, sample_rate=0.0),
        lambda: made("SGD")[0].attach(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])),
    ]
    found = []
    for mistake in mistakes:
        with pytest.raises((RuntimeError, ValueError)) as raised:
            mistake()
        found.append(str(raised.value))
    return found


def both(rank: int) -> Any:
    return exact(rank), refused(rank)


def test_exact_at_rate_one_and_refusals(tmp_path: Path) -> None:
    ((values, texts),) = ranks.run(both, 1, tmp_path)
    x, labels = batches(0)
    for value in values:
        torch.testing.assert_close(value, margin_softmax_loss(x, begun(), labels, scale=8.0, margin=MARGIN))
    expected = [
        "sample_rate: expected 1 without an optimizer, got 0.5; loss.attach(optimizer) hands it the sampled rows",
        "label_smoothing: expected 0 where classes are sampled, got 0.1",
        "sample_rate: expected a number in (0, 1], got 0.0",
        "optimizer: expected one that has the weight of the loss as a parameter, got one without it",
    ]
    assert [text.removeprefix("rank 0: ") for text in texts] == expected


def left(rank: int, folder: str) -> dict[str, Any]:
    """Weights after a step of two batches, whatever else was called, and what is refused."""
    (x, labels), (x2, labels2) = batches(0), batches(50)
    found: dict[str, Any] = {}

    def after(name: str, call: Callable[[ShardedMarginSoftmaxLoss, torch.optim.Optimizer], Any]) -> None:
        loss, optimizer = made("AdamW")
        loss(x2, labels2).backward()
        optimizer.step()
        optimizer.zero_grad()
        call(loss, optimizer)
        optimizer.step()
        found[name] = whole(loss.weight).clone()
        assert optimizer.param_groups[0]["params"][0] is loss.weight

    def both(loss: ShardedMarginSoftmaxLoss) -> None:
        loss(x, labels).backward()
        loss(x2, labels2).backward()

    def logged(loss: ShardedMarginSoftmaxLoss, _: Any) -> None:
        value = loss(x, labels) + loss(x2, labels2)
        loss(*batches(99))  # a value that is shown
        value.backward()

    def skipped(loss: ShardedMarginSoftmaxLoss, optimizer: torch.optim.Optimizer) -> None:
        loss(*batches(99)).backward()
        optimizer.zero_grad()  # as after a step that a GradScaler skips
        save_checkpoint(folder, loss, optimizer)
        both(loss)

    def saved(loss: ShardedMarginSoftmaxLoss, optimizer: torch.optim.Optimizer) -> None:
        loss(x, labels).backward()
        save_checkpoint(folder, loss, optimizer)
        kept = optimizer.state_dict()["state"].get(0, {})
        assert all(value.shape == loss.weight.shape for value in kept.values() if value.dim())
        loss(x2, labels2).backward()
        load_checkpoint(folder, loss, optimizer)

    for name, call in {
        "in turn": lambda loss, _: both(loss),
        "a sum": logged,
        "skipped": skipped,
        "saved": saved,
    }.items():
        after(name, call)
    loss, optimizer = made("SGD")
    value = loss(x, labels)
    (loss(x, labels) + loss.weight.to_local().square().sum()).backward()
    with pytest.raises(RuntimeError, match="weight: expected no gradient beside that of the sampled rows"):
        optimizer.step()
    loss.weight.grad = None
    optimizer.step()
    with pytest.raises(RuntimeError, match="sample_rate: expected a backward before the next step of the optimizer"):
        value.backward()
    assert copy.deepcopy(loss)._exchange is None
    with pytest.raises(TypeError, match=r"optimizer: expected one that steps each number by itself.*, got Rprop"):
        loss.attach(torch.optim.Rprop(loss.parameters()))
    return found


def test_what_else_is_called_before_a_step_loses_no_gradient(tmp_path: Path) -> None:
    for of_rank in ranks.run(left, 2, tmp_path, str(tmp_path / "checkpoint")):
        assert (of_rank["in turn"] != begun()).any()
        for name, weight in of_rank.items():
            torch.testing.assert_close(weight, of_rank["in turn"], msg=lambda text, n=name: f"{n}: {text}")


def test_classes_are_drawn_at_their_rate_whatever_the_shards():
    every = draw(0, 100_000, 0.1, seed=3, step=5)
    assert len(every) == pytest.approx(10_000, abs=400)
    parts = [draw(first, first + 12_500, 0.1, seed=3, step=5) for first in range(0, 100_000, 12_500)]
    assert torch.equal(every, torch.cat(parts))
    assert len(draw(0, 1000, 1.0, seed=3, step=5)) == 1000
    for other in (draw(0, 100_000, 0.1, seed=4, step=5), draw(0, 100_000, 0.1, seed=3, step=6)):
        assert torch.isin(other, every).sum() == pytest.approx(1000, abs=150), "steps and seeds are independent"
    gaps = every.diff().double()
    assert gaps.mean() == pytest.approx(10, rel=0.05)
    assert gaps.var() == pytest.approx(90, rel=0.1), "as of independent draws"
