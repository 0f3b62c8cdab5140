"""Triton: whether it is there, where it runs, and with what precision. TRITON_INTERPRET=1 runs its kernels on the CPU."""

import contextlib
import functools
import importlib.util
import os

import torch
from torch import Tensor

interpreted = os.environ.get("TRITON_INTERPRET") == "1"
# The device of the tensors that Triton's kernels take.
triton_device = "cpu" if interpreted else "cuda"
missing: str | None = None
if importlib.util.find_spec("triton") is None:
    missing = "Triton is not installed"
elif not interpreted and not torch.cuda.is_available():
    missing = "no GPU is at hand"


def on(t: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launch on the device of t."""
    if t.device.type != "cuda" or t.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(t.device)


@functools.lru_cache(maxsize=None)
def programs(device: torch.device) -> int:
    """Programs that keep the device busy: two for each multiprocessor, one computes while the other waits."""
    if device.type != "cuda":
        return 4  # interpreted: enough to split the columns
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def precision(dtype: torch.dtype) -> str:
    """Of float32 products: TF32 where torch's own products use it, else exact."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"
