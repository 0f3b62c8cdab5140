"""The optimizer, how its learning rate changes from step to step, and whether a training converged.

The rule is stated before the training: claims about its result ask for it.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from .config import Judging, TrainConfig
from .datasets import ImageSet
from .episodes import centroid_accuracy, episodes_of
from .terminal import UserError

MOMENTUM = 0.9
WARMUP_FACTOR = 16
FINAL_LEARNING_RATE = 1e-6
DECAY, DECAYED_AT = 0.1, (0.5, 0.75)
VALIDATION_WAYS = 5
# Of the rule of convergence:
AVERAGED = 5  # epochs
LEAST_SPAN = 10  # epochs, where a fifth of them is fewer
RISE = 0.005
DECAYED = 0.1  # of the highest learning rate


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
            raise UserError("warmup_epochs: the schedule one-cycle has none, warmup-cosine and warmup-steps do")
        return OneCycleLR(optimizer, config.learning_rate, total_steps=total_steps)
    warmup_epochs = config.epochs // 4 if config.warmup_epochs is None else config.warmup_epochs
    if warmup_epochs >= config.epochs:
        raise UserError(f"warmup_epochs: expected fewer than the {config.epochs} epochs, got {warmup_epochs}")
    if config.schedule == "warmup-steps" and warmup_epochs > DECAYED_AT[0] * config.epochs:
        raise UserError(f"warmup_epochs: expected at most half of the {config.epochs} epochs, got {warmup_epochs}")
    warmup_steps = steps_before(warmup_epochs)

    after_warmup = cosine if config.schedule == "warmup-cosine" else steps

    def factor(step: int) -> float:
        if step < warmup_steps:
            return warmup(step, warmup_steps)
        return after_warmup(step, config.learning_rate, warmup_steps, total_steps) / config.learning_rate

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


def warmup(step: int, warmup_steps: int) -> float:
    """Share of the peak in a linear rise from a sixteenth, from step 0 on.

    Source: the code of Liu et al., Negative Margin Matters, 2020: GradualWarmupScheduler with multiplier 16. (There the
    first two steps share a rate, and every later one lags by a step.)

    >>> [warmup(step, 4) for step in (0, 2)]
    [0.0625, 0.53125]
    """
    return (1 + (WARMUP_FACTOR - 1) * step / warmup_steps) / WARMUP_FACTOR


def cosine(step: int, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Learning rate of a step after the warm-up: half a period of a cosine from the peak to 1e-6.

    Source: the same code, which goes on with CosineAnnealingLR.

    >>> [round(cosine(step, 0.016, 4, 10), 6) for step in (4, 7, 10)]
    [0.016, 0.008, 1e-06]
    """
    final = min(FINAL_LEARNING_RATE, peak)
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return final + (peak - final) * (1 + math.cos(math.pi * progress)) / 2


def steps(step: int, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Learning rate of a step after the warm-up: divided by ten after half of all steps, and after three quarters.

    Source: He et al., Deep residual learning for image recognition, 2016, section 4.2.

    >>> [round(steps(step, 0.01, 2, 8), 6) for step in (2, 3, 4, 5, 6, 7)]
    [0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001]
    """
    return peak * DECAY ** sum(step >= part * total_steps for part in DECAYED_AT)


class Validation:
    """The same episodes every time: 5-way 1-shot by the nearest centroid, of images that the training does not see."""

    def __init__(self, images: ImageSet, num_episodes: int) -> None:
        self.images = images
        ways = min(VALIDATION_WAYS, len(images.labels.unique()))
        generator = torch.Generator().manual_seed(0)
        self.episodes = episodes_of(images.labels, ways, 1, Judging(episodes=num_episodes), generator)

    def __call__(self, embed: Callable[[ImageSet], Tensor]) -> float:
        return float(centroid_accuracy(embed(self.images), self.episodes).mean())


def stopped_early(history: Sequence[Mapping[str, Any]]) -> str | None:
    """Why a training may have stopped before it converged; None where it has converged.

    It has where the mean validation accuracy of the last five epochs is less than half a point above that of five
    epochs a fifth of the training before, ten epochs at least, and the learning rate has come down to a tenth.

    >>> epochs = [{"learning_rate": 1 - e / 40, "validation": min(e, 20) / 40} for e in range(40)]
    >>> stopped_early(epochs[:25]), stopped_early(epochs)
    ('validation accuracy rose by 20.0 points over the last 10 epochs', None)
    """
    span = max(LEAST_SPAN, math.ceil(len(history) / 5))
    if len(history) < span + AVERAGED:
        return f"{len(history)} epochs are too few to tell"
    accuracies = [row["validation"] for row in history]
    before, after = (sum(part) / AVERAGED for part in (accuracies[-AVERAGED - span : -span], accuracies[-AVERAGED:]))
    if after - before >= RISE:
        return f"validation accuracy rose by {100 * (after - before):.1f} points over the last {span} epochs"
    rates = [row["learning_rate"] for row in history]
    if rates[-1] > DECAYED * max(rates):
        return f"the learning rate is still {rates[-1]:.1e}, of {max(rates):.1e} at its highest"
    return None
