"""The native module: whether it is there, why not, and tensors as the raw pointers that it takes."""

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TypeVar, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

# torch must be imported before: the extension then shares torch's OpenMP runtime, its threads and
# torch.set_num_threads.

T = TypeVar("T")
_FAILURE_FILE = Path(__file__).parents[1] / "native_build_failure.txt"
DIRECT = ("cpu", "cuda", "triton")  # backends whose kernels may be called around torch's dispatcher: see `direct`
_PLAIN = (Tensor, torch.nn.Parameter)
_is_batched = torch._C._functorch.is_legacy_batchedtensor  # of autograd's batched gradients, which no stack shows
_func_transform = torch._C._functorch.peek_interpreter_stack
_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_tracing = torch._C._get_tracing_state
_DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}

module: ModuleType | None
try:
    module = importlib.import_module("fused_margins._C")
    missing = None
except ImportError as error:
    module = None
    if _FAILURE_FILE.exists():
        missing = _FAILURE_FILE.read_text().strip()
    else:
        missing = f"the native module did not load ({error})"

cuda_module: ModuleType | None
try:
    cuda_module = importlib.import_module("fused_margins._CUDA")
    cuda_missing = None if torch.cuda.is_available() else "no GPU is at hand"
    if cuda_missing:
        cuda_module = None
except ImportError as error:
    cuda_module = None
    cuda_missing = "built without CUDA" if isinstance(error, ModuleNotFoundError) else f"did not load ({error})"


def call(kernel: Callable[..., T], *args: object) -> T:
    """Run a kernel with as many threads as torch has been told to use.

    OpenMP keeps that number for each thread of Python; torch sets it when it is asked, in a new thread not before.
    """
    torch.get_num_threads()
    return kernel(*args)


def direct(*tensors: Tensor | None) -> bool:
    """Whether nothing watches these tensors but autograd, so that a kernel may be called around torch's dispatcher.

    The dispatcher and a Function that torch.func understands cost as much as a small problem. Compilation, torch.func,
    forward-mode derivatives, tracing, batched gradients, modes, subclasses of tensors and tensors that are negated when
    they are read (imaginary parts of conjugates) need them; nothing else does.
    """
    if (
        torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or _func_transform() is not None
        or _dispatch_modes()
        or _function_modes()
        or _tracing() is not None
    ):
        return False
    return all(t is None or (type(t) in _PLAIN and not t.is_neg() and not _is_batched(t)) for t in tensors)


def matrix(t: Tensor) -> object:
    """A (rows, width) tensor with any strides as a `_C.Matrix`; it borrows the memory of t."""
    assert module is not None
    return module.Matrix(t.data_ptr(), *t.shape, *t.stride(), _DTYPES[t.dtype])


@overload
def int64(t: Tensor) -> Tensor: ...
@overload
def int64(t: None) -> None: ...
@overload
def int64(t: Tensor | None) -> Tensor | None: ...
def int64(t: Tensor | None) -> Tensor | None:
    """Labels as the kernels read them: contiguous int64."""
    if t is None or (t.dtype == torch.int64 and t.is_contiguous()):
        return t
    return t.to(torch.int64).contiguous()


def pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
