"""What a field of an op's arguments can be: how it is checked, how a schema writes it, whether it is differentiable.

An op annotates the fields of one NamedTuple with these; `fused_margins.ops.op` makes everything else of them. Axes are
names: "rows", "columns", "width", or the name of an integer option.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core import checks
from ..core.enums import Option, Reduction
from ..core.similarity import accumulation_dtype


@dataclass(frozen=True)
class Field:
    """One argument. `check` gives the value as the kernels take it, or raises an error that says its name."""

    axes: tuple[str, ...] = ()
    differentiable: bool = field(default=False, kw_only=True)

    is_tensor = True
    schema = "Tensor"
    example_dtype: ClassVar[torch.dtype | None] = None  # None: that of the embeddings

    def check(self, name: str, value: Any, x: Tensor, size: int) -> Any:
        """name: as the caller knows it. x: the op's first field, checked. size: of the axis."""
        raise NotImplementedError

    def example(self, sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor without data."""
        return torch.empty(tuple(sizes), dtype=self.example_dtype or dtype, device="meta")


@dataclass(frozen=True)
class Embeddings(Field):
    """A matrix of any strides, in the dtype that all embeddings of the call have; `checks.matrices` checks them."""


@dataclass(frozen=True)
class Vector(Field):
    """Floating numbers in the accumulation dtype of the embeddings."""

    def check(self, name: str, value: Any, x: Tensor, size: int) -> Any:
        return checks.vector(name, value, size, x)


@dataclass(frozen=True)
class Values(Field):
    """A matrix that is computed with in float64, whatever the embeddings are."""

    def check(self, name: str, value: Any, x: Tensor, size: int) -> Any:
        checks.dense(name, value)
        if not isinstance(value, Tensor) or value.dtype not in checks.FLOATING or value.dim() != 2:
            got = f"{tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name}: expected a floating matrix, got {got}")
        if value.device != x.device:
            raise ValueError(f"{name}: expected device {x.device}, got {value.device}")
        return value.to(torch.float64).contiguous()


@dataclass(frozen=True)
class Labels(Field):
    """Integers of any width, one an entry of the axis."""

    example_dtype = torch.int64

    def check(self, name: str, value: Any, x: Tensor, size: int) -> Any:
        checks.labels(name, value, size, x)
        return value


@dataclass(frozen=True)
class Seed(Field):
    """A 0-d integer tensor, whose lowest 32 bits count."""

    example_dtype = torch.int64

    def check(self, name: str, value: Any, x: Tensor, size: int) -> Any:
        checks.seed(name, value, x)
        return value.to(torch.int64)


@dataclass(frozen=True)
class RowFactor(Field):
    """A number, which stays one, or a 0-d or (rows,) tensor in the accumulation dtype; two arguments in a schema."""

    positive: bool = False

    def check(self, name: str, value: Any, x: Tensor, size: int) -> Any:
        return checks.row_factor(name, value, x, self.positive)


@dataclass(frozen=True)
class Choice(Field):
    """One of the options of an enumeration: a name at the public door, a number below it."""

    options: type[Option] = Option

    is_tensor = False
    schema = "int"

    def check(self, name: str, value: Any, x: Tensor, size: int) -> Any:
        return checks.choice(name, value, self.options)


@dataclass(frozen=True)
class Integer(Field):
    """An integer within [low, high]."""

    low: int = -(2**63)
    high: int = 2**63 - 1

    is_tensor = False
    schema = "SymInt"

    def check(self, name: str, value: Any, x: Tensor, size: int) -> Any:
        return checks.integer(name, value, self.low, self.high)


@dataclass(frozen=True)
class Number(Field):
    """A number; `valid` says which, `expected` in words."""

    valid: Callable[[float], bool] = lambda value: True
    expected: str = "a number"

    is_tensor = False
    schema = "float"

    def check(self, name: str, value: Any, x: Tensor, size: int) -> Any:
        number = checks.number(name, value)
        if not self.valid(number):
            raise ValueError(f"{name}: expected {self.expected}, got {value}")
        return number


@dataclass(frozen=True)
class Flag(Field):
    """True or False."""

    is_tensor = False
    schema = "bool"

    def check(self, name: str, value: Any, x: Tensor, size: int) -> Any:
        return checks.flag(name, value)


@dataclass(frozen=True)
class Output:
    """One output: its axes, which may depend on the arguments; its dtype; and whether a call gives it."""

    axes: tuple[str, ...] | Callable[[Any], tuple[str, ...]]
    dtype: Callable[[Tensor], torch.dtype] = lambda x: accumulation_dtype(x.dtype)
    given: Callable[[Any], bool] = lambda arguments: True


def axes_of_loss(a: Any) -> tuple[str, ...]:
    """Of what a call's reduction makes of the losses of its rows."""
    return ("rows",) if a.reduction == Reduction.NONE else ()
