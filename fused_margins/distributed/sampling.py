"""A sample of the classes for a step, and their rows in the place of the weight within an optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from .shards import Shards

_WORD = 2**64
_STEP = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_BITS = 53  # of a hash, that are compared with the rate


def draw(first: int, stop: int, rate: float, seed: int, step: int, device: torch.device | str = "cpu") -> Tensor:
    """The classes of [first, stop) that step `step` samples, ascending: each with probability `rate`, by its own hash.

    Source: Steele, Lea and Flood, Fast splittable pseudorandom number generators, 2014, figure 16, the mixing function
    with the constants of Stafford's variant 13.
    """
    key = _mixed(torch.tensor(_signed(seed * _STEP + step), dtype=torch.int64)).item()
    classes = torch.arange(first, stop, device=device)
    hashed = _mixed(_mixed(classes * _signed(_STEP)) + int(key))
    return classes[(hashed & (2**_BITS - 1)) < int(rate * 2**_BITS)]


def _signed(word: int) -> int:
    word %= _WORD
    return word - _WORD if word >= _WORD // 2 else word


def _mixed(z: Tensor) -> Tensor:
    """Of 64 bits each; shifts bring zeros in, not the sign, and products wrap around."""
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * _signed(_FIRST)
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * _signed(_SECOND)
    return z ^ (z >> 31 & (1 << 33) - 1)


class Exchange:
    """From a forward to the step of the optimizer, the rows of some classes are its parameter instead of the weight.

    Their part of the optimizer's state goes with them and comes back: whatever the optimizer does, momentum and decay
    too, it does to those rows alone. What it keeps is of the size of the weight, as it would be anyway.

    Attributes:
        index: (n,) the classes of this rank whose rows are out, ascending. rows: parameter (n, ...), None between.
    """

    weight: Any  # DTensors, which nn.Parameter hides from who checks types
    rows: Any

    def __init__(
        self, weight: Tensor, shards: Shards, optimizer: torch.optim.Optimizer, after_step: Callable[[], None]
    ) -> None:
        self.weight, self.shards, self.optimizer, self.after_step = weight, shards, optimizer, after_step
        self.rows = None
        self.index = torch.empty(0, dtype=torch.int64)
        self._state: dict[str, Any] = {}
        self._place(weight)
        optimizer.register_step_post_hook(self._put_back)

    def take(self, index: Tensor) -> Tensor:
        """The rows of the classes of this rank at `index`, for one more forward before the next step.

        Rows that are out with a gradient stay out: gradients of several batches add up. Of others nothing is left.
        """
        before, grad = self.index, None if self.rows is None else self.rows.grad
        if grad is not None:
            index = torch.cat([index, before]).unique()
        if self.rows is None:
            self._state = self.optimizer.state.pop(self.weight, {})
        local = self.weight.to_local().detach()
        rows: Any = nn.Parameter(self._spread(local[index]))
        if grad is not None:
            rows.grad = torch.zeros_like(rows)
            rows.grad.to_local()[torch.searchsorted(index, before)] = grad.to_local()
        group, i = self._place(self.weight if self.rows is None else self.rows)
        group["params"][i] = rows
        if self.rows is not None:
            self.optimizer.state.pop(self.rows, None)
        if self._state:
            self.optimizer.state[rows] = {
                name: self._spread(value.to_local()[index]) if self._is_of_rows(value, self.weight) else value
                for name, value in self._state.items()
            }
        self.rows, self.index = rows, index
        self.weight.sampled_rows = rows  # for those who look for its gradient
        return rows.to_local()

    @torch.no_grad()
    def _put_back(self, *_: Any) -> None:
        """After a step: rows and their state where they belong, the weight where it was."""
        if self.rows is None:
            return
        rows, weight = self.rows, self.weight
        weight.to_local()[self.index] = rows.to_local()
        for name, value in self.optimizer.state.pop(rows, {}).items():
            if not self._is_of_rows(value, rows):
                self._state[name] = value
                continue
            if name not in self._state:
                self._state[name] = torch.zeros_like(weight, dtype=value.dtype)
            self._state[name].to_local()[self.index] = value.to_local()
        group, i = self._place(rows)
        group["params"][i] = weight
        if self._state:
            self.optimizer.state[weight] = self._state
        self.rows, self._state = None, {}
        del weight.sampled_rows
        self.after_step()

    def _spread(self, local: Tensor) -> DTensor:
        """As a DTensor, though ranks have different numbers of rows: overflows and norms are then those of all."""
        return DTensor.from_local(local, self.shards.mesh, [Shard(0)], run_check=False)

    def _is_of_rows(self, value: Any, like: Tensor) -> bool:
        return isinstance(value, DTensor) and value.shape == like.shape

    def _place(self, parameter: Tensor) -> tuple[dict[str, Any], int]:
        """Its group and its number there; groups are others after a state dict has been loaded."""
        for group in self.optimizer.param_groups:
            for i, other in enumerate(group["params"]):
                if other is parameter:
                    return group, i
        raise ValueError("optimizer: expected one that has the weight of the loss as a parameter, got one without it")
