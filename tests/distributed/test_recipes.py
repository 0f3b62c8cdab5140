"""A backbone of plain tensors or of FSDP's beside a weight that is a DTensor: whole trainings against one process."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fused_margins import MarginSoftmaxLoss, parameter_groups
from fused_margins.distributed import ShardedMarginSoftmaxLoss, clip_grad_norm_

from . import ranks

CLASSES, COUNTS, STEPS = 5, (3, 4), 3
OPTIONS: dict[str, Any] = {"margin": 0.3, "margin_type": "angular", "scale": 8.0, "learnable_scale": True}
MAX_NORM = 0.5


def backbone() -> nn.Module:
    draws = torch.Generator().manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, generator=draws)
    return model


def head(kind: Callable[..., MarginSoftmaxLoss], **options: Any) -> MarginSoftmaxLoss:
    loss = kind(CLASSES, 6, **OPTIONS, **options).double()
    values = torch.randn(CLASSES, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        if isinstance(loss, ShardedMarginSoftmaxLoss):
            loss.weight.to_local().copy_(loss._shards.part(values).to_local())
        else:
            loss.weight.copy_(values)
    return loss


def batch(step: int) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(step)
    x = torch.randn(sum(COUNTS), 4, dtype=torch.float64, generator=draws)
    return x, torch.randint(CLASSES, (sum(COUNTS),), generator=draws)


def whole(parameter: Tensor) -> Tensor:
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach()


def in_one_process(clips: bool, halves: bool) -> list[Tensor]:
    """Parameters after some steps, and the norms before clipping."""
    model, loss = backbone(), head(MarginSoftmaxLoss)
    optimizer = torch.optim.SGD(parameter_groups(model, loss, lr=0.1), momentum=0.9)
    norms = []
    for step in range(STEPS):
        optimizer.zero_grad()
        for at in (step, step + 10)[: 1 + halves]:
            x, labels = batch(at)
            loss(model(x), labels).backward()
        parameters = [*model.parameters(), *loss.parameters()]
        norms += [nn.utils.clip_grad_norm_(parameters, MAX_NORM if clips else torch.inf)]
        optimizer.step()
    return [whole(p) for p in parameters] + norms


def plain(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(DistributedDataParallel(model), backend="aot_eager")


def with_fsdp(model: nn.Module) -> nn.Module:
    for layer in (model[0], model[2]):  # type: ignore[index]
        fully_shard(layer)
    return fully_shard(model)


class Both(nn.Module):
    """The loss within the module that FSDP takes."""

    def __init__(self, model: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.loss(self.model(x), labels)


def train(rank: int, wrap: Callable[[nn.Module], nn.Module] | None, clips: bool, halves: bool, apart: bool) -> Any:
    """The same with two ranks. apart: two optimizers and a GradScaler. wrap: None for a loss within FSDP's module."""
    loss = head(ShardedMarginSoftmaxLoss, embedding_gradient_scale=2)
    model = backbone()
    both = Both(model if wrap is None else wrap(model), loss)
    if wrap is None:
        fully_shard(both, ignored_params=set(loss.parameters()))
    groups = parameter_groups(both.model, loss, lr=0.1)
    optimizers = [torch.optim.SGD([g] if apart else groups, momentum=0.9) for g in (groups if apart else [None])]
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=apart)
    norms = []
    for step in range(STEPS):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for at in (step, step + 10)[: 1 + halves]:
            x, labels = (t.split(COUNTS)[rank] for t in batch(at))
            with both.model.no_sync() if halves and at == step else nullcontext():
                scaler.scale(both(x, labels)).backward()
        for optimizer in optimizers:
            if apart:
                scaler.unscale_(optimizer)
        parameters = [*both.model.parameters(), *loss.parameters()]
        norms += [clip_grad_norm_(parameters, MAX_NORM if clips else torch.inf)]
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
    return [whole(p) for p in parameters] + norms


RECIPES: dict[str, tuple[Any, ...]] = {
    "DDP": (plain, False, False, False),
    "DDP, clipped": (plain, True, False, False),
    "DDP, compiled": (compiled, False, False, False),
    "DDP, accumulated, clipped": (plain, True, True, False),
    "DDP, a GradScaler of two optimizers, clipped": (plain, True, False, True),
    "FSDP2": (with_fsdp, False, False, False),
    "FSDP2, clipped": (with_fsdp, True, False, False),
    "FSDP2 around the loss": (None, True, False, False),
}


def all_recipes(rank: int) -> list[Any]:
    return [train(rank, *recipe) for recipe in RECIPES.values()]


def test_trainings_are_those_of_one_process(tmp_path: Path) -> None:
    found = ranks.run(all_recipes, 2, tmp_path)
    for i, (name, (_, clips, halves, _)) in enumerate(RECIPES.items()):
        for of_rank in found:
            for got, want in zip(of_rank[i], in_one_process(clips, halves), strict=True):
                torch.testing.assert_close(got, want, msg=lambda text, n=name: f"{n}: {text}")


def overflow(rank: int) -> tuple[Tensor, Tensor, float]:
    """One rank's part of the gradient overflows: no rank steps, and all halve the scale."""
    loss = head(ShardedMarginSoftmaxLoss)
    optimizer, scaler = torch.optim.SGD(loss.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=64.0)
    before = whole(loss.weight).clone()
    x, labels = batch(0)
    scaler.scale(loss(backbone()(x), labels)).backward()
    if rank == 1:
        loss.weight.grad.to_local()[0, 0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    return before, whole(loss.weight), scaler.get_scale()


def narrow(rank: int) -> tuple[float, torch.dtype]:
    """Under autocast the embeddings travel in bfloat16, and the parameters stay what they are."""
    loss, model = head(ShardedMarginSoftmaxLoss).float(), backbone().float()
    x, labels = (t.split(COUNTS)[rank] for t in batch(0))
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(model(x.float()), labels)
    value.backward()
    return value.item(), loss.weight.grad.dtype


def in_bfloat16(rank: int) -> tuple[float, torch.dtype]:
    """FSDP computes in bfloat16, and the loss in the dtype of its weight."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model, loss = fully_shard(backbone().float(), mp_policy=policy), head(ShardedMarginSoftmaxLoss).float()
    x, labels = (t.split(COUNTS)[rank] for t in batch(0))
    value = loss(model(x.float()).float(), labels)
    value.backward()
    return value.item(), loss.weight.grad.dtype


def mixed(rank: int) -> dict[str, str]:
    """What each mistake says."""
    loss, model = head(ShardedMarginSoftmaxLoss), backbone()
    x, labels = (t.split(COUNTS)[rank] for t in batch(0))
    both = [*model.parameters(), *loss.parameters()]
    loss(model(x), labels).backward()
    mistakes: dict[str, Callable[[], Any]] = {
        "clip": lambda: nn.utils.clip_grad_norm_(both, 1.0),
        "foreach": lambda: torch.optim.SGD(both, 0.1, foreach=True).step(),
        "fused": lambda: torch.optim.AdamW(both, 0.1, fused=True).step(),
        "GradScaler": lambda: scaled(loss(model(x), labels)).unscale_(torch.optim.SGD(both, 0.1)),
        "DDP around both": lambda: DistributedDataParallel(Both(model, loss)),
        "DDP around the loss": lambda: DistributedDataParallel(head(ShardedMarginSoftmaxLoss)),
        "fully_shard around both": lambda: fully_shard(Both(backbone(), ShardedMarginSoftmaxLoss(CLASSES, 6))),
        "fully_shard but the weight": lambda: fully_shard(
            learning := head(ShardedMarginSoftmaxLoss), ignored_params={learning.weight}
        ),
    }
    found = {}
    for name, mistake in mistakes.items():
        try:
            mistake()
        except Exception as error:
            found[name] = str(error)
        dist.barrier()
    return found


def scaled(value: Tensor) -> torch.amp.GradScaler:
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(value).backward()
    return scaler


def single_cases(rank: int) -> tuple[Any, ...]:
    return overflow(rank), narrow(rank), in_bfloat16(rank), mixed(rank)


def test_overflows_autocast_and_mistakes(tmp_path: Path) -> None:
    for (before, after, scale), (value, dtype), (of_fsdp, _), mistakes in ranks.run(single_cases, 2, tmp_path):
        assert torch.equal(before, after)
        assert scale == 32.0
        model, loss = backbone().float(), head(MarginSoftmaxLoss).float()
        x, labels = batch(0)
        with torch.autocast("cpu", torch.bfloat16):
            expected = loss(model(x.float()), labels)
        assert value == pytest.approx(expected.item(), rel=1e-3)
        assert of_fsdp == pytest.approx(expected.item(), rel=2e-2)
        assert dtype == torch.float32
        assert len(mistakes) == 8
        for name in ("DDP around both", "DDP around the loss"):
            assert mistakes.pop(name)  # torch's words depend on the sizes
        assert mistakes.pop("fully_shard around both").startswith("Invariant encountered: value was None")
        assert "scalar parameters" in mistakes.pop("fully_shard but the weight")
        assert all("mixed torch.Tensor and DTensor" in text for text in mistakes.values()), mistakes


def test_a_norm_whose_square_is_beyond_float32():
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    for parameter, grad in zip(parameters, (3e25, 4e25)):
        parameter.grad = torch.full((1,), grad)
    norm = clip_grad_norm_(parameters, 5.0)
    assert (norm.dtype, norm.item()) == (torch.float32, pytest.approx(5e25))
    assert [p.grad.item() for p in parameters] == pytest.approx([3.0, 4.0])
