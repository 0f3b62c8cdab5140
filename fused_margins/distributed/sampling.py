"""A sample of the classes for a step, and their rows in the place of the weight within an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from .shards import Shards

_WORD = 2**64
_STEP = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_BITS = 53  # of a hash, that are compared with the rate
_REFUSED = (torch.optim.Adafactor, torch.optim.LBFGS, torch.optim.Rprop, torch.optim.SparseAdam)


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
    """From a backward to the step of the optimizer, the rows of some classes are its parameter instead of the weight.

    A forward copies the rows that it uses; its backward hands them over with their gradient, and those of several add
    up. A forward without a backward leaves no trace. The rows' part of the optimizer's state goes with them and comes
    back: whatever the optimizer does, momentum and decay too, it does to those rows alone. What it keeps is of the size
    of the weight, as it would be anyway. State dicts, and `whole`, find the weight in its place.

    Attributes:
        index: (n,) the classes of this rank whose rows are out, ascending. rows: parameter (n, ...), None between.
    """

    weight: Any  # DTensors, which nn.Parameter hides from who checks types
    rows: Any

    def __init__(
        self, weight: Tensor, shards: Shards, optimizer: torch.optim.Optimizer, after_step: Callable[[], None]
    ) -> None:
        if isinstance(optimizer, _REFUSED):
            raise TypeError(
                "optimizer: expected one that steps each number by itself, from a state that begins with zeros, got "
                f"{type(optimizer).__name__}"
            )
        self.weight, self.shards, self.optimizer, self.after_step = weight, shards, optimizer, after_step
        self.rows = None
        self.index = torch.empty(0, dtype=torch.int64)
        self._state: dict[str, Any] = {}
        self._steps = 0
        self._aside: list[tuple[Tensor, Tensor] | None] = []
        self._place(weight)
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)
        optimizer.register_state_dict_pre_hook(self.put_aside)
        optimizer.register_state_dict_post_hook(self.take_again)
        optimizer.register_load_state_dict_pre_hook(self.put_aside)
        optimizer.register_load_state_dict_post_hook(self.take_again)

    def __deepcopy__(self, memo: Any) -> None:
        return None  # no optimizer has the weight of a copy

    def take(self, index: Tensor) -> Tensor:
        """The rows of the classes of this rank at `index`, for one forward."""
        rows = self.weight.to_local().detach()[index]
        if self.weight.requires_grad:
            rows.requires_grad_().register_post_accumulate_grad_hook(partial(self._add, index, self._steps))
        return rows

    @torch.no_grad()
    def _add(self, index: Tensor, of_step: int, rows: Tensor) -> None:
        """One more gradient, of rows at `index`; after `zero_grad` those before count no more."""
        grad, rows.grad = rows.grad, None
        if of_step != self._steps:
            raise RuntimeError(
                "sample_rate: expected a backward before the next step of the optimizer, got one after it, where the "
                "sampled rows have changed"
            )
        before = None if self.rows is None else self._out()
        self._put_back()
        if before is None:
            self._hand_over(index, grad, rows.detach())  # type: ignore[arg-type]
            return
        both = torch.cat([before[0], index]).unique()
        total = rows.new_zeros(len(both), *rows.shape[1:])
        for at, part in (before, (index, grad)):
            total.index_add_(0, torch.searchsorted(both, at), part)  # type: ignore[arg-type]
        self._hand_over(both, total, self.weight.to_local().detach()[both])

    def _hand_over(self, index: Tensor, grad: Tensor, values: Tensor) -> None:
        """The rows at `index` are the optimizer's parameter, with their part of its state."""
        group, i = self._place(self.weight)
        rows: Any = nn.Parameter(self._spread(values))
        rows.grad = self._spread(grad)
        group["params"][i] = rows
        self._state = self.optimizer.state.pop(self.weight, {})
        if self._state:
            self.optimizer.state[rows] = {
                name: self._spread(value.to_local()[index]) if self._is_of_rows(value, self.weight) else value
                for name, value in self._state.items()
            }
        self.rows, self.index = rows, index
        self.weight.sampled_rows = rows  # for those who look for its gradient

    @torch.no_grad()
    def _put_back(self) -> None:
        """Rows and their state where they belong, the weight where it was."""
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

    def _before_step(self, *_: Any) -> None:
        if self.rows is not None and self.weight.grad is not None:
            raise RuntimeError(
                "weight: expected no gradient beside that of the sampled rows, got one of the whole weight, which no "
                "step would use; a regulariser takes sample_rate=1"
            )

    def _after_step(self, *_: Any) -> None:
        if self.rows is not None:
            self._put_back()
            self._steps += 1
            self.after_step()

    @torch.no_grad()
    def put_aside(self, *_: Any) -> None:
        """The weight is in its place until `take_again`."""
        self._aside.append(None if self.rows is None else self._out())
        self._put_back()

    @torch.no_grad()
    def take_again(self, *_: Any) -> None:
        """What was out is out again, with its gradient."""
        if (out := self._aside.pop()) is not None:
            self._hand_over(*out, self.weight.to_local().detach()[out[0]])

    def _out(self) -> tuple[Tensor, Tensor] | None:
        """Which rows are out, and their gradient; None if they have none any more."""
        return None if self.rows.grad is None else (self.index, self.rows.grad.to_local())

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


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Within this block the optimizers have the weights of the model's losses as parameters, whatever was sampled."""
    exchanges = [e for m in model.modules() if isinstance(e := getattr(m, "_exchange", None), Exchange)]
    for exchange in exchanges:
        exchange.put_aside()
    try:
        yield
    finally:
        for exchange in exchanges:
            exchange.take_again()
