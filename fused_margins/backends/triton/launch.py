"""Triton: whether it is there, where it runs, with what precision. TRITON_INTERPRET=1 runs its kernels on the CPU."""

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import budget

interpreted = os.environ.get("TRITON_INTERPRET") == "1"
# AMD's builds of torch call their GPUs "cuda", too, and some of them answer 9 as Hopper does.
on_amd = torch.version.hip is not None
# The device of the tensors that Triton's kernels take.
device = "cpu" if interpreted else "cuda"
missing: str | None = None
triton_version: tuple[int, ...] = ()
if importlib.util.find_spec("triton") is None:
    missing = "Triton is not installed"
else:
    triton_version = tuple(map(int, importlib.metadata.version("triton").split(".")[:2]))
if missing is None and triton_version < (3, 6):
    missing = f"needs Triton 3.6 or later, found {importlib.metadata.version('triton')}"
elif missing is None and not interpreted and not torch.cuda.is_available():
    missing = "no GPU is at hand"


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; triton.cdiv is a function for kernels and takes 8 us on the host."""
    return -(-a // b)


def on(t: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launch on the device of t."""
    if t.device.type != "cuda" or t.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(t.device)


@functools.cache
def num_persistent_programs(device: torch.device) -> int:
    """Programs that keep the device busy: two for each multiprocessor, one computes while the other waits."""
    if device.type != "cuda":
        return 4  # interpreted: enough to split the columns
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def capability(device: torch.device) -> int:
    """The major number of an NVIDIA GPU's compute capability: 9 is Hopper. 0 elsewhere."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" and not on_amd else 0


def can_use_tma(*tensors: Tensor) -> bool:
    """Whether a GPU's copy engine (TMA) can fetch tiles of these matrices: rows of 16-bit numbers 16 bytes apart."""
    return (interpreted or capability(tensors[0].device) == 9) and all(
        t.dtype.itemsize == 2
        and t.stride(1) == 1
        and t.stride(0) % 8 == 0
        and t.stride(0) >= t.shape[1] > 0
        and t.shape[0] > 0
        and t.data_ptr() % 16 == 0
        for t in tensors
    )


def tma_descriptor(t: Tensor, *block: int) -> Any:
    """A matrix as the copy engine (TMA) fetches it: in blocks of this shape."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(t, list(t.shape), list(t.stride()), list(block))


def precision(dtype: torch.dtype) -> str:
    """Of float32 products: TF32 where torch's own products use it, else three products of TF32 parts, which together
    are as near as float32's own."""
    if dtype != torch.float32 or on_amd:  # whose matrix units know no TF32
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


COMPILED_RUNS_IN = ((3, 6), (3, 7))  # versions of Triton whose compiled kernels `launch` runs itself


@functools.cache
def _runs_compiled() -> bool:
    """Whether compiled kernels are run as they were in the versions that this was written for; warns if not."""
    if triton_version in COMPILED_RUNS_IN and not on_amd:
        return True
    known = " and ".join(".".join(map(str, version)) for version in COMPILED_RUNS_IN)
    found = ".".join(map(str, triton_version)) + (" on an AMD GPU" if on_amd else "")
    warnings.warn(
        f"fused-margins launches kernels in its own way with Triton {known}; with Triton {found} it takes Triton's, "
        "which costs some microseconds more a kernel",
        RuntimeWarning,
        stacklevel=4,
    )
    return False


class Part(NamedTuple):
    """A part of a buffer as a kernel takes it, by its address: to make a tensor of it takes several times as long."""

    buffer: Tensor  # one axis
    first: int  # in numbers of the buffer
    size: int
    dtype: torch.dtype  # as which they are read
    address: int

    def tensor(self) -> Tensor:
        """For what is no kernel."""
        return self.buffer[self.first : self.first + self.size].view(self.dtype)

    def slice(self, first: int, size: int) -> "Part":
        """A part of a part."""
        return Part(self.buffer, self.first + first, size, self.dtype, self.address + first * self.buffer.itemsize)


_compiled: dict[Any, Any] = {}
_TENSORS = (Tensor, torch.nn.Parameter)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """kernel[grid](*args, **options), with the compiled kernel at hand from the second time on.

    Triton's own launch looks at every argument anew, which takes several times as long as a small kernel. The key holds
    all that a kernel is compiled for: dtypes and alignment of tensors, of integers whether they are 1 or multiples of
    16 or need 64 bits, and options. Tensors go on as their addresses. How a compiled kernel is run is internal to
    Triton: in a version that this was not written for its own launch is taken.
    """
    if interpreted or not _runs_compiled():
        kernel[grid](*map(as_tensor, args), **options)
        return
    device = torch.cuda.current_device()
    key: list[Any] = [id(kernel), device]
    values: list[Any] = []
    add = key.append
    for value in args:
        kind = type(value)
        if kind is int:
            add(value % 16 + 0.5 if 1 < value < 2**31 else value)
        elif kind is Part:
            add(value.dtype)
            value = value.address
            add(value % 16)
        elif value is None or kind is float:
            add(kind)
        elif kind in _TENSORS or isinstance(value, Tensor):
            add(value.dtype)
            value = value.data_ptr()
            add(value % 16)
        else:  # a tensor descriptor
            add((value.base.dtype, *value.block_shape))
        values.append(value)
    key.extend(options.values())
    found = _compiled.get(tuple(key))
    if found is None:
        compiled = kernel[grid](*map(as_tensor, args), **options)
        rest = tuple(options[name] for name in kernel.arg_names[len(args) :])
        # With the kernel itself: where Triton lets go of one, Triton 3.8 takes its code off the GPU.
        _compiled[tuple(key)] = compiled, compiled.run, compiled.function, compiled.packed_metadata, rest
        return
    _, run, function, metadata, rest = found
    x, y, z = (*grid, 1, 1)[:3]
    # No hooks: what they watch is in the kernel's own launch, the first one.
    run(x, y, z, torch._C._cuda_getCurrentRawStream(device), function, metadata, None, None, None, *values, *rest)


def as_tensor(value: Any) -> Any:
    """A part as a tensor; anything else as it is."""
    return value.tensor() if type(value) is Part else value


_ones: dict[tuple[torch.device, torch.dtype], Tensor] = {}


def one(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The number 1 on the device, made once; not within a capture, where its memory would be the graph's."""
    found = _ones.get((device, dtype))
    if found is None:
        with torch.inference_mode(False):
            found = torch.ones((), dtype=dtype, device=device)
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            _ones[device, dtype] = found
    return found


def why_not(on: str) -> str | None:
    """Why nothing on this device runs here, or None."""
    if missing is not None:
        return missing
    return None if on == device else f"runs on {device}, the tensors are on {on}"


def weight_error(dtype: torch.dtype) -> float:
    """Derivatives of 16-bit similarities are the operands of 16-bit products; beside exponentials that were kept, unit
    vectors are rounded, too."""
    if dtype.itemsize > 2:
        return 0.0
    keeps = dtype == torch.bfloat16 and budget.exponential_budget(torch.device(device)) > 0
    return torch.finfo(dtype).eps * (1.0 if keeps else 0.5)
