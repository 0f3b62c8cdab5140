"""The optimizer, and how its learning rate changes from step to step."""

import math
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from .config import TrainConfig
from .errors import UserError

MOMENTUM = 0.9
WARMUP_FACTOR = 16
FINAL_LEARNING_RATE = 1e-6


def build_optimizer(config: TrainConfig, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """Fused: one pass over the parameters."""
    rate, decay = config.learning_rate, config.weight_decay
    if config.optimizer == "sgd":
        return SGD(parameters, rate, momentum=MOMENTUM, nesterov=True, weight_decay=decay, fused=True)
    return Adam(parameters, rate, weight_decay=decay, fused=True)


def build_scheduler(config: TrainConfig, optimizer: Optimizer, steps_before: Callable[[int], int]) -> LRScheduler:
    """The schedule over all epochs, `steps_before(epoch)` of whose steps lie before an epoch."""
    total_steps = steps_before(config.epochs)
    if config.schedule == "one-cycle":
        if config.warmup_epochs is not None:
            raise UserError("warmup_epochs: the schedule one-cycle has none, warmup-cosine does")
        return OneCycleLR(optimizer, config.learning_rate, total_steps=total_steps)
    warmup_epochs = config.epochs // 4 if config.warmup_epochs is None else config.warmup_epochs
    if warmup_epochs >= config.epochs:
        raise UserError(f"warmup_epochs: expected fewer than the {config.epochs} epochs, got {warmup_epochs}")
    warmup_steps = steps_before(warmup_epochs)

    def factor(step: int) -> float:
        return warmup_cosine(step, config.learning_rate, warmup_steps, total_steps) / config.learning_rate

    return LambdaLR(optimizer, factor)


def set_step(scheduler: LRScheduler, step: int) -> None:
    """What the schedule says of `step`, which it knows without the steps before; step 0 is the first."""
    scheduler.load_state_dict(scheduler.state_dict() | {"last_epoch": step - 1, "_step_count": 0})
    scheduler.step()


def check_moments(moments: Mapping[int, Mapping[str, object]], optimizer: Optimizer) -> None:
    """ValueError for a stored `optimizer.state_dict()["state"]` that does not fit the parameters."""
    shapes = [parameter.shape for group in optimizer.param_groups for parameter in group["params"]]
    wanted = {"momentum_buffer"} if isinstance(optimizer, SGD) else {"step", "exp_avg", "exp_avg_sq"}
    for number, moment in moments.items():
        if moment.keys() != wanted:
            raise ValueError(f"expected {', '.join(sorted(wanted))} of each parameter")
        for name, value in moment.items():
            shape = () if name == "step" else shapes[number]
            if not isinstance(value, Tensor) or value.shape != shape or not value.is_floating_point():
                raise ValueError(f"expected {name} of shape {tuple(shape)}")
            if not value.isfinite().all():
                raise ValueError(f"{name} holds numbers that are not finite")


def warmup_cosine(step: int, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Learning rate of a step, from 0 on: linear from peak / 16 to `peak` at `warmup_steps`, then a cosine to 1e-6.

    Source: the code of Liu et al., Negative Margin Matters, 2020: GradualWarmupScheduler with multiplier 16, before a
    CosineAnnealingLR. (There the first two steps share a rate, and every later one lags by a step.)

    Example:
        >>> [round(warmup_cosine(step, 0.016, 4, 10), 6) for step in (0, 2, 4, 7, 10)]
        [0.001, 0.0085, 0.016, 0.008, 1e-06]
    """
    if step < warmup_steps:
        return peak / WARMUP_FACTOR * (1 + (WARMUP_FACTOR - 1) * step / warmup_steps)
    final = min(FINAL_LEARNING_RATE, peak)
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return final + (peak - final) * (1 + math.cos(math.pi * progress)) / 2
