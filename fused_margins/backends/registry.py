"""Every backend, what it can run, and why not.

A backend is one row of `BACKENDS` and, in each op that it supports, one module ``kernel_<name>.py`` (for ``reference``:
``reference.py``, which every op has). ``backend="auto"`` takes the first row that can run the problem. Ops come here
with their folders: this file knows none of them.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import checks
from . import cpu, cuda, epoch
from .triton import launch as triton

MaybeTensors = Sequence[Tensor | None]  # what a kernel module takes and gives as gradients


class Problem(NamedTuple):
    """What decides whether a backend can run an op, and how: B rows x N columns of width D, and the call itself.

    Of `arguments` (the op's own NamedTuple) a kernel module may read options, and which tensors are given: when a user
    asks what would run, they hold no data.
    """

    op: str
    device: str
    dtype: torch.dtype
    rows: int
    columns: int
    width: int
    arguments: Any


@dataclass(frozen=True)
class Backend:
    """A row of `BACKENDS`.

    name: as the user writes it, and as the kernel modules are called.
    why_not: why nothing on a device (its type) runs there, or None.
    describe: what runs, in a few words.
    weight_error: the relative error to which derivatives of similarities of a dtype are rounded before they are summed.
    """

    name: str
    why_not: Callable[[str], str | None]
    describe: Callable[[], str]
    weight_error: Callable[[torch.dtype], float] = lambda dtype: 0.0


BACKENDS: list[Backend] = [
    Backend("cpu", cpu.why_not, cpu.describe, cpu.weight_error),
    Backend("cuda", cuda.why_not, lambda: "CUDA C++, few launches", cuda.weight_error),
    Backend("triton", triton.why_not, lambda: "Triton", triton.weight_error),
    Backend("reference", lambda device: None, lambda: "PyTorch, differentiable to any order"),
]


# Each an `Op` of the storey above, of which this one asks its name, its package, and `example`: a call without data.
OPS: dict[str, Any] = {}
# Names that users know from before an op was part of another one: the op, and the options that make it that one.
ALIASES: dict[str, tuple[str, dict[str, Any]]] = {}
# Looked up once: torch.compile traces `resolve`, which must not touch the file system.
_has_kernel: dict[tuple[str, str], bool] = {}
_loaded: dict[tuple[str, str], Any] = {}
_substitutes: dict[tuple[str, str], Any] = {}


def register(op: Any, **aliases: dict[str, Any]) -> None:
    """Make an op and the kernel modules in its folder known; aliases: other names, with the options they stand for."""
    folder = Path(str(importlib.import_module(op.package).__file__)).parent
    OPS[op.name] = op
    for alias, options in aliases.items():
        ALIASES[alias] = op.name, options
    for backend in BACKENDS:
        _has_kernel[op.name, backend.name] = (folder / f"{_module(backend.name)}.py").exists()


def load_kernels() -> None:
    """Import the kernel modules of every backend that is there, so that no traced call has to."""
    accelerator = torch.accelerator.current_accelerator()
    devices = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    for backend in BACKENDS:
        if any(backend.why_not(device) is None for device in devices):
            for op in OPS:
                if has_kernel(op, backend.name):
                    kernel(op, backend.name)


def _module(backend: str) -> str:
    return "reference" if backend == "reference" else f"kernel_{backend}"


def has_kernel(op: str, backend: str) -> bool:
    """Whether an op has a kernel module of this backend, or a substitute of one."""
    return _has_kernel.get((op, backend), False) or (op, backend) in _substitutes


@contextlib.contextmanager
def substitute(op: str, backend: str, replacement: Any) -> Iterator[None]:
    """Run `replacement` in place of a kernel module within this context: for experiments, and to test the tests."""
    before = _substitutes.get((op, backend))
    _substitutes[op, backend] = replacement
    epoch.begin()
    try:
        yield
    finally:
        if before is None:
            del _substitutes[op, backend]
        else:
            _substitutes[op, backend] = before
        epoch.begin()  # last: a call in between would be remembered


def kernel(op: str, backend: str) -> Any:
    """The kernel module of an op."""
    if _substitutes and (op, backend) in _substitutes:
        return _substitutes[op, backend]
    module = _loaded.get((op, backend))
    if module is None:
        module = _loaded[op, backend] = importlib.import_module(f"{OPS[op].package}.{_module(backend)}")
    return module


def refusal(backend: Backend, problem: Problem) -> str | None:
    """Why `backend` cannot run `problem`, or None."""
    if not has_kernel(problem.op, backend.name):
        return f"has no kernel for {problem.op}"
    reason = backend.why_not(problem.device)
    return _said("can_run", backend, problem) if reason is None else reason


def slower(backend: Backend, problem: Problem) -> str | None:
    """Why "auto" passes over a backend that can run `problem`, or None."""
    return _said("slower", backend, problem)


def _said(of: str, backend: Backend, problem: Problem) -> str | None:
    """What a function of a kernel module says about a problem; None where the module has no such function."""
    function = getattr(kernel(problem.op, backend.name), of, None)
    return None if function is None else function(problem)


def known(backend: str) -> str:
    """The name of a backend, or "auto"; an error for any other."""
    checks.one_of("backend", backend, ("auto", *(b.name for b in BACKENDS)))
    return backend


def can_run(backend: str, problem: Problem) -> bool:
    """Whether the backend of this name can run `problem`."""
    return any(candidate.name == backend and refusal(candidate, problem) is None for candidate in BACKENDS)


def resolve(backend: str, problem: Problem) -> str:
    """The backend that runs `problem`: for "auto" the first that can, else the one asked for, or an error."""
    for candidate in BACKENDS:
        if backend == "auto":
            if refusal(candidate, problem) is None and slower(candidate, problem) is None:
                return candidate.name
        elif candidate.name == backend:
            reason = refusal(candidate, problem)
            if reason is not None:
                raise RuntimeError(f"backend {backend!r} cannot run this {problem.op}: {reason}")
            return backend
    raise AssertionError(known(backend))  # which raises


def explain(
    op: str = "contrast", *, rows: int, columns: int, width: int, dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu", **options: Any,
) -> None:  # fmt: skip
    """Print one line a backend: whether it can run the problem, how, or why not; ``*`` marks what "auto" takes.

    Args:
        op: "contrast", "margin_softmax", "nearest", "scores", "sample", "magnet", "kmeans": the name of an op.
        rows, columns, width: sizes B, N and D of the problem.
        dtype, device: of the two matrices.
        options: of the op, where they decide: relation, k, largest, ...

    Raises:
        ValueError: an unknown op, a dtype that no op takes.

    >>> import fused_margins
    >>> fused_margins.explain("nearest", rows=256, columns=256, width=64)  # doctest: +ELLIPSIS
    * cpu...
      reference  PyTorch, differentiable to any order
    """
    asked = problem(op, rows=rows, columns=columns, width=width, dtype=dtype, device=device, **options)
    chosen = resolve("auto", asked)
    for backend in BACKENDS:
        print(f"{'*' if backend.name == chosen else ' '} {backend.name:<10} {_state(backend, asked)}")


def states(op: str, **sizes_and_options: Any) -> dict[str, str]:
    """What `explain` says of each backend."""
    asked = problem(op, **sizes_and_options)
    return {backend.name: _state(backend, asked) for backend in BACKENDS}


def problem(
    op: str, *, rows: int, columns: int, width: int, dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu", **options: Any,
) -> Problem:  # fmt: skip
    """A call of these sizes without data; op and options as for `explain`."""
    name, given = ALIASES.get(op, (op, {}))
    for option in given.keys() & options.keys():
        raise ValueError(f"{option}: expected none, since {op!r} is {name!r} with {given[option]!r}")
    if name not in OPS:
        raise ValueError(f"op: expected one of {', '.join(map(repr, sorted((*OPS, *ALIASES))))}, got {op!r}")
    rows, columns, width = (
        checks.integer(n, size, 0) for n, size in (("rows", rows), ("columns", columns), ("width", width))
    )
    if dtype not in checks.FLOATING:
        raise ValueError(f"dtype: expected one of {', '.join(map(str, checks.FLOATING))}, got {dtype}")
    arguments = OPS[name].example(rows, columns, width, dtype, **(given | options))
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device: expected one of torch's, got {device!r}") from None
    return Problem(name, device.type, dtype, rows, columns, width, arguments)


def _state(backend: Backend, problem: Problem) -> str:
    """Whether and how a backend runs a problem."""
    reason = refusal(backend, problem)
    if reason:
        return f"cannot run: {reason}"
    parts = backend.describe(), _said("describe", backend, problem), slower(backend, problem)
    return "; ".join(part for part in parts if part)
