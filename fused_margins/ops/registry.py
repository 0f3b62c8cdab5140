"""Every backend, what it can run, and why not.

A backend is one row of `BACKENDS` and, in each op that it supports, one module ``kernel_<name>.py`` (for ``reference``:
``reference.py``, which every op has). ``backend="auto"`` takes the first row that can run the problem.
"""

import contextlib
import importlib
import os
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import checks, crossovers, gpu, native
from .checks import FLOATING

OPS = tuple(sorted(m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)]) if m.ispkg))


class Problem(NamedTuple):
    """What decides whether a backend can run an op: B rows x N columns of width D."""

    op: str
    device: str
    dtype: torch.dtype
    rows: int
    columns: int
    width: int
    relation: str = "different"  # of the columns that a row uses, where it decides who is fast


@dataclass(frozen=True)
class Backend:
    """`refuses` says why a problem cannot run (None: it can), `describe` how it would, `slower` why "auto" passes over
    it; `weight_error` is the relative error to which it rounds derivatives of similarities before it sums them up."""

    name: str
    refuses: Callable[[Problem], str | None]
    describe: Callable[[Problem], str]
    slower: Callable[[Problem], str | None] = lambda problem: None
    weight_error: Callable[[torch.dtype], float] = lambda dtype: 0.0


def _cpu_refuses(problem: Problem) -> str | None:
    if native.module is None:
        return native.missing
    if problem.device != "cpu":
        return f"runs on a CPU, the tensors are on {problem.device}"
    return None


def _cpu_describe(problem: Problem) -> str:
    assert native.module is not None
    text = f"C++ for {native.module.instruction_set()}, {native.call(native.module.max_threads)} threads"
    describe = getattr(kernel(problem.op, "cpu"), "describe", None)
    return f"{text}; {describe(problem)}" if describe else text


def _cpu_weight_error(dtype: torch.dtype) -> float:
    if native.module is None or not native.module.instruction_set().endswith(("AVX512_BF16", "AMX")):
        return 0.0
    return torch.finfo(dtype).eps / 2 if dtype == torch.bfloat16 else 0.0


def _cuda_refuses(problem: Problem) -> str | None:
    if native.cuda_module is None:
        return native.cuda_missing
    if problem.device != "cuda":
        return f"runs on an NVIDIA GPU, the tensors are on {problem.device}"
    return crossovers.cuda_refuses(problem)


def _cuda_describe(problem: Problem) -> str:
    return "CUDA C++, few launches"


def _triton_refuses(problem: Problem) -> str | None:
    if gpu.missing is not None:
        return gpu.missing
    if problem.device != gpu.triton_device:
        return f"runs on {gpu.triton_device}, the tensors are on {problem.device}"
    return None


def _triton_describe(problem: Problem) -> str:
    describe = getattr(kernel(problem.op, "triton"), "describe", None)
    return f"Triton; {describe(problem)}" if describe else "Triton"


BACKENDS: list[Backend] = [
    # Of 16-bit inputs they are operands of what multiplies such numbers: on a CPU of bfloat16 alone, on a GPU as TF32,
    # with 11 bits, and in 16 bits.
    Backend("cpu", _cpu_refuses, _cpu_describe, weight_error=_cpu_weight_error),
    Backend(
        "cuda",
        _cuda_refuses,
        _cuda_describe,
        crossovers.cuda_slower,
        lambda dtype: 2.0**-11 if dtype.itemsize == 2 else 0.0,
    ),
    Backend(
        "triton",
        _triton_refuses,
        _triton_describe,
        weight_error=lambda dtype: torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 0.0,
    ),
    Backend("reference", lambda problem: None, lambda problem: "PyTorch, differentiable to any order"),
]

BUDGET_VARIABLE = "FUSED_MARGINS_MEMORY_BUDGET"


def _budget_from_environment() -> int:
    text = os.environ.get(BUDGET_VARIABLE, "").strip() or str(128 * 2**20)
    if not text.isdecimal():
        raise ValueError(f"{BUDGET_VARIABLE}: expected a whole number of bytes, at least 0, got {text!r}")
    return int(text)


_memory_budget_bytes = _budget_from_environment()


def memory_budget() -> int:
    """Bytes of softmax weights that a forward may keep for its backward; a few numbers a row and column come on top."""
    return _memory_budget_bytes


def set_memory_budget(num_bytes: int) -> None:
    """Let a forward keep up to `num_bytes` of softmax weights for its backward; the others are computed again.

    The environment variable ``FUSED_MARGINS_MEMORY_BUDGET`` sets the value at import (default 128 MiB). On a CPU
    memory of 1 MiB and more that a forward kept waits for the next one, at most one and a half budgets; this function
    returns it to the system.

    >>> import fused_margins
    >>> fused_margins.set_memory_budget(64 * 2**20)
    """
    global _memory_budget_bytes
    checks.number("num_bytes", num_bytes)
    if not num_bytes >= 0:
        raise ValueError(f"num_bytes: expected at least 0, got {num_bytes}")
    if num_bytes >= 2**63:
        raise ValueError(f"num_bytes: expected less than 2^63, got {num_bytes}")
    _memory_budget_bytes = int(num_bytes)
    if native.module is not None:
        native.module.Workspace.keep_at_most(0)


@contextlib.contextmanager
def within_memory_budget(num_bytes: int) -> Iterator[None]:
    """Another budget in this context; what waits for the next call stays."""
    global _memory_budget_bytes
    before, _memory_budget_bytes = _memory_budget_bytes, num_bytes
    try:
        yield
    finally:
        _memory_budget_bytes = before


def reused_bytes() -> int:
    """Bytes of such memory that may wait: those of the budget, and half as many for factors and means beside them."""
    return memory_budget() * 3 // 2


def _file(op: str, backend: str) -> Path:
    return Path(__file__).parent / op / ("reference.py" if backend == "reference" else f"kernel_{backend}.py")


# Looked up once: torch.compile traces `resolve`, which must not touch the file system.
_HAS_KERNEL = {(op, b.name): _file(op, b.name).exists() for op in OPS for b in BACKENDS}
_loaded: dict[tuple[str, str], Any] = {}  # kernel modules, from their first use on
_substitutes: dict[tuple[str, str], Any] = {}


@contextlib.contextmanager
def substitute(op: str, backend: str, replacement: Any) -> Iterator[None]:
    """Run `replacement` in place of a kernel module within this context: for experiments, and to test the tests."""
    before = _substitutes.get((op, backend))
    _substitutes[op, backend] = replacement
    try:
        yield
    finally:
        _substitutes[op, backend] = before


def kernel(op: str, backend: str) -> Any:
    """The kernel module that an op's implementation calls."""
    module = _substitutes.get((op, backend)) or _loaded.get((op, backend))
    if module is None:
        module = _loaded[op, backend] = importlib.import_module(f"{__package__}.{op}.{_file(op, backend).stem}")
    return module


def refusal(backend: Backend, problem: Problem) -> str | None:
    """Why `backend` cannot run `problem`, or None."""
    if not _HAS_KERNEL[problem.op, backend.name]:
        return f"has no kernel for {problem.op}"
    return backend.refuses(problem)


def resolve(backend: str, problem: Problem) -> str:
    """The backend that runs `problem`: for "auto" the first that can, else the one asked for, or an error."""
    for candidate in BACKENDS:
        if backend == "auto":
            if refusal(candidate, problem) is None and candidate.slower(problem) is None:
                return candidate.name
        elif candidate.name == backend:
            reason = refusal(candidate, problem)
            if reason is not None:
                raise RuntimeError(f"backend {backend!r} cannot run this {problem.op}: {reason}")
            return backend
    valid = ", ".join(repr(name) for name in ("auto", *(b.name for b in BACKENDS)))
    raise ValueError(f"backend: expected one of {valid}, got {backend!r}")


def explain(
    op: str = "contrast",
    *,
    rows: int,
    columns: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> None:
    """Print one line a backend: whether it can run the problem, how, or why not; ``*`` marks what "auto" takes.

    Args:
        op: "contrast", "margin_softmax", "nearest", "scores", ...: the name of an op.
        rows, columns, width: sizes B, N and D of the problem.
        dtype, device: of the two matrices.

    Raises:
        ValueError: an unknown op, a dtype that no op takes.

    >>> import fused_margins
    >>> fused_margins.explain("nearest", rows=256, columns=256, width=64)  # doctest: +ELLIPSIS
    * cpu...
      reference  PyTorch, differentiable to any order
    """
    if op not in OPS:
        raise ValueError(f"op: expected one of {', '.join(map(repr, OPS))}, got {op!r}")
    for name, size in (("rows", rows), ("columns", columns), ("width", width)):
        checks.whole(name, size)
        if size < 0:
            raise ValueError(f"{name}: expected at least 0, got {size}")
    if dtype not in FLOATING:
        raise ValueError(f"dtype: expected one of {', '.join(map(str, FLOATING))}, got {dtype}")
    problem = Problem(op, torch.device(device).type, dtype, rows, columns, width)
    chosen = resolve("auto", problem)
    for backend in BACKENDS:
        reason = refusal(backend, problem)
        state = f"cannot run: {reason}" if reason else backend.describe(problem)
        if reason is None and (slower := backend.slower(problem)):
            state += f"; {slower}"
        print(f"{'*' if backend.name == chosen else ' '} {backend.name:<10} {state}")
