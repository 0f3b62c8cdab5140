"""What a public function asks of its arguments before any kernel runs: shapes, dtypes, devices.

Values are for the kernels.

Every check takes the name by which the caller knows the argument, and says what was expected and what came.
"""

import functools
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from .enums import Option
from .indices import INTEGER
from .similarity import accumulation_dtype

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

O = TypeVar("O", bound=Option)


def choice(argument: str, value: object, options: type[O]) -> O:
    """The option of that name; an option is taken as it is."""
    if type(value) is options:
        return value
    if type(value) is str and value.islower() and (found := options._member_map_.get(value.upper())) is not None:
        return found  # type: ignore[return-value]
    raise ValueError(f"{argument}: expected one of {', '.join(map(repr, options.names()))}, got {value!r}")


def one_of(argument: str, value: str, valid: tuple[str, ...]) -> None:
    """One of a few words that are no option of an op."""
    if value not in valid:
        raise ValueError(f"{argument}: expected one of {', '.join(map(repr, valid))}, got {value!r}")


def matrices(x: Tensor, y: Tensor, names: tuple[str, str] = ("x", "y"), autocast: bool = True) -> tuple[Tensor, Tensor]:
    """Both sides, checked, in one dtype: autocast's own where it is active, as for a matrix product."""
    for name, t in zip(names, (x,) if y is x else (x, y)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}")
        dense(name, t)
        if t.dim() != 2:
            raise ValueError(f"{name}: expected a matrix (rows, width), got shape {tuple(t.shape)}")
        if t.dtype not in FLOATING:
            raise TypeError(f"{name}: expected a floating dtype (float64, 32, 16 or bfloat16), got {t.dtype}")
    if x.device != y.device:
        raise ValueError(f"{names[1]}: expected the device of {names[0]} ({x.device}), got {y.device}")
    if x.device.type == "meta":
        raise TypeError(f"{names[0]}: expected a tensor with data, got one on the meta device")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"{names[1]}: expected width {x.shape[1]} as {names[0]} has, got {y.shape[1]}")
    if not torch.compiler.is_compiling() and (x._is_zerotensor() or y._is_zerotensor()):
        x, y = x.clone(), y.clone()  # zeros without memory
    device = x.device.type
    if autocast and torch.is_autocast_enabled(device) and torch.float64 not in (x.dtype, y.dtype):
        dtype = torch.get_autocast_dtype(device)
        narrow = x.to(dtype)
        return narrow, narrow if y is x else y.to(dtype)  # a batch against itself stays one tensor
    if x.dtype != y.dtype:
        raise TypeError(f"{names[1]}: expected the dtype of {names[0]} ({x.dtype}), got {y.dtype}")
    return x, y


def labels(argument: str, value: Tensor | None, size: int, x: Tensor, *, optional: bool = False) -> None:
    """An integer vector of `size` on the device of x; None where it is optional."""
    if value is None and optional:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument}: expected an integer tensor of shape ({size},), got {type(value).__name__}")
    _integers(argument, value, x)
    if value.dim() != 1 or value.shape[0] != size:
        raise ValueError(f"{argument}: expected shape ({size},), got {tuple(value.shape)}")


def seed(argument: str, value: Tensor, x: Tensor) -> None:
    """A 0-d integer tensor on the device of x."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument}: expected a 0-d integer tensor, got {type(value).__name__}")
    _integers(argument, value, x)
    if value.dim() != 0:
        raise ValueError(f"{argument}: expected a 0-d tensor, got shape {tuple(value.shape)}")


def vector(argument: str, value: Tensor | None, size: int, x: Tensor) -> Tensor | None:
    """A floating vector of `size` in the accumulation dtype of x, or None."""
    if value is None:
        return None
    dense(argument, value)
    if not isinstance(value, Tensor) or value.dim() != 1 or value.shape[0] != size:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{argument}: expected a tensor of shape ({size},), got {got}")
    return floating(argument, value, x)


def row_factor(argument: str, value: float | Tensor, x: Tensor, positive: bool) -> float | Tensor:
    """A number, which stays one, or a 0-d or (B,) tensor in the accumulation dtype of x."""
    if not isinstance(value, Tensor):
        value = number(argument, value, "a number or a tensor")
        if positive and not 0 < value < float("inf"):
            raise ValueError(f"{argument}: expected a positive number, got {value}")
        dtype = accumulation_dtype(x.dtype)
        if torch.finfo(dtype).max < abs(value) < float("inf"):
            raise ValueError(f"{argument}: expected a number in the range of {dtype}, got {value}")
        return value
    dense(argument, value)
    if value.dim() > 1 or (value.dim() == 1 and value.shape[0] != x.shape[0]):
        raise ValueError(
            f"{argument}: expected a number, a 0-d tensor or shape ({x.shape[0]},), got {tuple(value.shape)}"
        )
    return floating(argument, value, x)


def floating(argument: str, value: Tensor, x: Tensor) -> Tensor:
    """A floating tensor on the device of x, in the accumulation dtype of x."""
    if value.dtype not in FLOATING:
        raise TypeError(f"{argument}: expected a floating dtype, got {value.dtype}")
    if value.device != x.device:
        raise ValueError(f"{argument}: expected device {x.device}, got {value.device}")
    if not torch.compiler.is_compiling() and value._is_zerotensor():
        value = value.clone()  # zeros without memory
    return value.to(accumulation_dtype(x.dtype))


def number(argument: str, value: object, expected: str = "a number") -> float:
    """A number of Python's or NumPy's; `expected` is what else the caller takes."""
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | np.number | torch.SymInt | torch.SymFloat):
        raise TypeError(f"{argument}: expected {expected}, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{argument}: expected {expected} in the range of float64, got {value}") from None


def finite_number(argument: str, value: object, expected: str = "a number") -> float:
    """A number that float32 can hold."""
    checked = number(argument, value, expected)
    if not abs(checked) <= torch.finfo(torch.float32).max:
        raise ValueError(f"{argument}: expected {expected} in the range of float32, got {value}")
    return checked


def positive_number(argument: str, value: object) -> float:
    """A number above 0 that float32 can hold."""
    checked = number(argument, value)
    if not 0 < checked < float("inf"):
        raise ValueError(f"{argument}: expected a positive number, got {value}")
    if checked > torch.finfo(torch.float32).max:
        raise ValueError(f"{argument}: expected a number in the range of float32, got {value}")
    return checked


def values(argument: str, value: object, shape: tuple[int, ...]) -> Tensor:
    """A dense tensor of that shape and of numbers; integers become floating."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument}: expected a tensor of shape {shape}, got {type(value).__name__}")
    dense(argument, value)
    if tuple(value.shape) != shape:
        raise ValueError(f"{argument}: expected shape {shape}, got {tuple(value.shape)}")
    if value.dtype in INTEGER:
        return value.to(torch.get_default_dtype())
    if value.dtype not in FLOATING:
        raise TypeError(f"{argument}: expected a floating dtype, got {value.dtype}")
    if not value.is_meta and not bool(value.isfinite().all()):
        raise ValueError(f"{argument}: expected finite values, got {value.detach().flatten().tolist()[:8]}")
    return value


def generator(value: object) -> torch.Generator | None:
    """A generator of torch's, or None for the global one."""
    if value is not None and not isinstance(value, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator or None, got {type(value).__name__}")
    return value


def integer(argument: str, value: object, low: int = -(2**63), high: int = 2**63 - 1) -> int:
    """An integer of Python's or NumPy's within [low, high], which is within 64 bits."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer | torch.SymInt):
        raise TypeError(f"{argument}: expected an integer, got {value!r}")
    if low <= value <= high:
        return value if isinstance(value, torch.SymInt) else int(value)  # type: ignore[return-value]
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{argument}: expected an integer of 64 bits, got {value}")
    expected = f"at least {low}" if value < low else f"at most {high}"
    raise ValueError(f"{argument}: expected {expected}, got {value}")


def flag(argument: str, value: object) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{argument}: expected True or False, got {value!r}")
    return value


def not_in_a_backward(what: str) -> None:
    """Activation checkpointing calls a module again in the backward: an error for one that would do something else."""
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            f"{what}: expected a call outside of a backward, got one within, where it would not do what it did in the "
            "forward; leave it out of the part that activation checkpointing runs again"
        )


def positive(argument: str, value: float | Tensor) -> None:
    """Values of a reference's argument, where reading them breaks no graph and makes no GPU wait."""
    if not isinstance(value, Tensor) or value.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if torch._C._functorch.peek_interpreter_stack() is not None:  # vmap has no value to read
        return
    if not bool((value > 0).all()):
        raise ValueError(f"{argument}: expected positive values, got {float(value.detach().min())}")


@functools.lru_cache(maxsize=256)
def constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number as a 0-d tensor that nobody writes to."""
    with torch.inference_mode(False):  # else autograd could not save it later
        return torch.full((), value, dtype=dtype, device=device)


def dense(argument: str, value: object) -> None:
    """No tensor that has no strides, and none of which a rank has a part; what is no tensor passes."""
    if isinstance(value, Tensor) and (value.layout != torch.strided or value.is_nested):
        raise TypeError(f"{argument}: expected a dense tensor, got {_kind(value)}")
    if type(value) not in (Tensor, Parameter) and hasattr(value, "placements"):  # a DTensor, whose import takes long
        raise TypeError(
            f"{argument}: expected a plain tensor, got a DTensor with placements {value.placements}; to_local() gives "
            "this rank's part, torch's local_map calls a function with it, and fused_margins.distributed has losses of "
            "many ranks"
        )


def _integers(argument: str, value: Tensor, x: Tensor) -> None:
    without_memory = not torch.compiler.is_compiling() and value._is_zerotensor()
    if value.layout != torch.strided or value.is_nested or without_memory:
        raise TypeError(f"{argument}: expected a dense tensor, got {_kind(value)}")
    if value.dtype not in INTEGER:
        raise TypeError(f"{argument}: expected an integer dtype, got {value.dtype}")
    if value.device != x.device:
        raise ValueError(f"{argument}: expected device {x.device}, got {value.device}")


def _kind(t: Tensor) -> str:
    """What a tensor is that no kernel can read."""
    if t.layout == torch.strided and not t.is_nested:
        return "zeros without memory"
    return "a nested one" if t.is_nested else f"layout {t.layout}"
