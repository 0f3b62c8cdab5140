"""CUDA C++: whether the module is there, why not; tensors as addresses, launches, counters that are 0 between calls."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .cpu import DTYPES

module: Any
missing: str | None
try:
    module = importlib.import_module("fused_margins._CUDA")
    module.set_dtypes(*DTYPES)
    missing = None if torch.cuda.is_available() else "no GPU is at hand"
    if missing:
        module = None
except (ImportError, AttributeError) as error:  # AttributeError: it was built from other sources
    module = None
    missing = "built without CUDA" if isinstance(error, ModuleNotFoundError) else f"did not load ({error})"

COUNTERS = 1 << 14  # of a stream, at first
CAPTURED_COUNTERS = 1 << 18  # of all graphs on a device: enough for thousands of captured calls

_of_stream: dict[tuple[int, int], list[Tensor]] = {}  # the last one counts; a graph may still read the others
_of_graphs: dict[int, Tensor] = {}
_captured: dict[int, int] = {}  # of the above, how many have an owner


def why_not(device: str) -> str | None:
    """Why nothing on this device runs here, or None."""
    if module is None:
        return missing
    return None if device == "cuda" else f"runs on an NVIDIA GPU, the tensors are on {device}"


def weight_error(dtype: torch.dtype) -> float:
    """Derivatives of 16-bit similarities are operands of TF32 products, with 11 bits."""
    return 2.0**-11 if dtype.itemsize == 2 else 0.0


def stream(device: torch.device) -> int:
    return torch._C._cuda_getCurrentRawStream(device.index)


def capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


def launch(kernel: Callable[..., None], device: torch.device, *args: object) -> None:
    """Call a kernel's launcher on the device's current stream."""
    if torch.cuda.current_device() == device.index:
        kernel(*args, stream(device))
    else:
        with torch.cuda.device(device):
            kernel(*args, stream(device))


def tickets(device: torch.device, count: int) -> Tensor:
    """int32 counters, 0 and left 0 by every kernel: those of the current stream, whose kernels follow one another.

    A captured call gets some of its own, as graphs may be replayed on other streams, two at a time.
    """
    if capturing():
        first = _captured.get(device.index, 0)
        if device.index not in _of_graphs or first + count > CAPTURED_COUNTERS:
            return torch.zeros(count, dtype=torch.int32, device=device)  # set to 0 by the graph, at every replay
        _captured[device.index] = first + count
        return _of_graphs[device.index][first : first + count]
    held = _of_stream.setdefault((device.index, stream(device)), [])
    if not held or held[-1].shape[0] < count:
        size = max(COUNTERS, 2 * count)
        with torch.inference_mode(False):
            held.append(torch.zeros(size, dtype=torch.int32, device=device))
            if device.index not in _of_graphs:  # a capture cannot make it, and begins with a synchronisation
                _of_graphs[device.index] = torch.zeros(CAPTURED_COUNTERS, dtype=torch.int32, device=device)
    return held[-1]
