"""Triton: whether it is there, where it runs, with what precision. TRITON_INTERPRET=1 runs its kernels on the CPU."""

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

interpreted = os.environ.get("TRITON_INTERPRET") == "1"
# The device of the tensors that Triton's kernels take.
triton_device = "cpu" if interpreted else "cuda"
missing: str | None = None
if importlib.util.find_spec("triton") is None:
    missing = "Triton is not installed"
elif tuple(map(int, importlib.metadata.version("triton").split(".")[:2])) < (3, 6):
    missing = f"needs Triton 3.6 or later, found {importlib.metadata.version('triton')}"
elif not interpreted and not torch.cuda.is_available():
    missing = "no GPU is at hand"


def on(t: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launch on the device of t."""
    if t.device.type != "cuda" or t.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(t.device)


@functools.cache
def programs(device: torch.device) -> int:
    """Programs that keep the device busy: two for each multiprocessor, one computes while the other waits."""
    if device.type != "cuda":
        return 4  # interpreted: enough to split the columns
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def is_hopper() -> bool:
    """Whether the GPU is an H100 or one of its kind."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def precision(dtype: torch.dtype) -> str:
    """Of float32 products: TF32 where torch's own products use it, else three products of TF32 parts, which together
    are as near as float32's own."""
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


_compiled: dict[Any, Any] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """kernel[grid](*args, **options), with the compiled kernel at hand from the second time on.

    Triton's own launch looks at every argument anew, which takes several times as long. The key holds all that a kernel
    is compiled for: dtypes and alignment of tensors, of integers whether they are 1 or multiples of 16, and options.
    """
    if interpreted:
        kernel[grid](*args, **options)
        return
    key = (kernel, *map(_specialization, args), *options.values())
    found = _compiled.get(key)
    if found is None:
        found = kernel[grid](*args, **options)
        rest = kernel.arg_names[len(args) :]
        _compiled[key] = found, tuple(options[name] for name in rest)
        return
    compiled, rest = found
    compiled[(*grid, 1, 1)[:3]](*args, *rest)


def _specialization(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0, value.device.index
    if isinstance(value, int):
        return 1 if value == 1 else (value % 16 == 0, -(2**31) <= value < 2**31)
    return None if value is None else float
