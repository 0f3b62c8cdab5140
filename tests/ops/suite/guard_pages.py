"""All cases with every input beside a page that may not be touched, so that a stray read ends the process."""

import contextlib
import ctypes
import mmap

import torch
from torch import Tensor

from fused_margins.backends import registry
from fused_margins.ops import cases
from tests.ops.suite.problems import refusal

PAGE = mmap.PAGESIZE
PROT_NONE = 0
M_PERTURB = -6  # of glibc's mallopt


def guarded(t: Tensor, side: str) -> Tensor:
    """A copy of t, strides and all, whose storage ends at (side "after") or begins behind a forbidden page."""
    size = t.untyped_storage().nbytes()
    if size == 0:
        return t
    pages = -(-size // PAGE) * PAGE
    memory = mmap.mmap(-1, pages + PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    forbidden, offset = (pages, pages - size) if side == "after" else (0, PAGE)
    if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(address + forbidden), PAGE, PROT_NONE):
        raise OSError(ctypes.get_errno(), "mprotect")
    count = size // t.element_size()
    copy = torch.frombuffer(memory, dtype=t.dtype, count=count, offset=offset)
    copy.copy_(t.as_strided((count,), (1,), 0))
    return copy.as_strided(t.shape, t.stride(), t.storage_offset())


def stray() -> None:
    """Read one byte too far."""
    numbers = guarded(torch.ones(5), "after")
    print(ctypes.string_at(numbers.data_ptr(), 4 * 5), flush=True)
    ctypes.string_at(numbers.data_ptr(), 4 * 5 + 1)


def run_cases(side: str) -> None:
    with contextlib.suppress(AttributeError, OSError):  # glibc's malloc then returns bytes that are no zeros
        ctypes.CDLL(None).mallopt(M_PERTURB, 128)
    for name in registry.OPS:
        op = cases.load(name)
        for case in op.CASES:
            for dtype in (torch.float32, torch.bfloat16):
                inputs = cases.convert(case.make(torch.Generator().manual_seed(0)), dtype)
                if refusal(name, inputs, "cpu"):
                    continue
                copies = {n: guarded(v, side) if isinstance(v, Tensor) else v for n, v in inputs.items()}
                cases.evaluate(op, copies, "cpu")
    print("done")
