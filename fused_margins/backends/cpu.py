"""C++ on a CPU: whether the module is there, why not, and tensors as it reads them."""

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..core.checks import constant
from . import budget

# torch must be imported before: the extension then shares torch's OpenMP runtime, its threads and
# torch.set_num_threads.

T = TypeVar("T")
MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)
_FAILURE_FILE = Path(__file__).parents[1] / "native_build_failure.txt"
REUSED_BYTES = 2**20  # less than that torch's allocator finds again by itself
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # in the order of the C++ enum

module: Any
missing: str | None = None
try:
    module = importlib.import_module("fused_margins._C")
    module.set_dtypes(*DTYPES)
    budget.release_on_change(lambda: module.Workspace.keep_at_most(0) if module else None)
except (ImportError, AttributeError) as error:  # AttributeError: it was built from other sources
    module = None
    missing = f"the native module did not load ({error})"
    if _FAILURE_FILE.exists():
        missing = _FAILURE_FILE.read_text().strip()


def why_not(device: str) -> str | None:
    """Why nothing on this device runs here, or None."""
    if module is None:
        return missing
    return None if device == "cpu" else f"runs on a CPU, the tensors are on {device}"


def describe() -> str:
    """Instruction set and threads."""
    return f"C++ for {module.instruction_set()}, {call(module.max_threads)} threads"


def weight_error(dtype: torch.dtype) -> float:
    """Derivatives of bfloat16 similarities are operands of what multiplies such numbers alone."""
    if module is None or not module.instruction_set().endswith(("AVX512_BF16", "AMX")):
        return 0.0
    return torch.finfo(dtype).eps / 2 if dtype == torch.bfloat16 else 0.0


def call(kernel: Callable[..., T], *args: object) -> T:
    """Run a kernel with as many threads as torch has been told to use.

    OpenMP keeps that number for each thread of Python; torch sets it when it is asked, in a new thread not before.
    """
    torch.get_num_threads()
    return kernel(*args)


def vector(t: MaybeTensor) -> MaybeTensor:
    """A vector as the kernels read it: contiguous."""
    return t if t is None or t.is_contiguous() else t.contiguous()


def row_factor(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number or a tensor of rows as the kernels read it."""
    if isinstance(value, Tensor):
        return value if value.is_contiguous() else value.contiguous()
    return constant(value, dtype, device)


def int64(t: MaybeTensor) -> MaybeTensor:
    """Labels as the kernels read them: contiguous int64."""
    if t is None or (t.dtype == torch.int64 and t.is_contiguous()):
        return t
    return t.to(torch.int64).contiguous()


def workspace(count: int, dtype: torch.dtype) -> Tensor:
    """Memory for what a forward saves; when the last tensor in it is gone, the next forward gets it."""
    num_bytes = count * dtype.itemsize
    if num_bytes < REUSED_BYTES:
        return torch.empty(count, dtype=dtype)
    return torch.frombuffer(module.Workspace(num_bytes, budget.reused_bytes()), dtype=dtype, count=count)


# Memory for a gradient: contiguous, whatever the strides of its input.
empty_like: Callable[..., Tensor] = functools.partial(torch.empty_like, memory_format=torch.contiguous_format)
