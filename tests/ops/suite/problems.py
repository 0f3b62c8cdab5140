"""Problems of every op, made of its cases and of its fields: no op is named here."""

import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from fused_margins.backends import registry
from fused_margins.core.enums import Option
from fused_margins.ops import cases
from fused_margins.ops.cases import Case, Inputs
from fused_margins.ops.fields import Choice, Embeddings, Labels, RowFactor, Seed, Vector
from tests.conftest import DEVICES, ROWS, backends_with_kernels

OPS = {name: cases.load(name) for name in registry.OPS}
DIFFERENTIABLE = [name for name, op in registry.OPS.items() if op.differentiable]  # type: ignore[attr-defined]
SMALL = 1 << 15  # numbers of a case that a test may use often


def pairs(ops: Any = None, *, reference: bool = False) -> list[tuple[str, str]]:
    """(op, backend) of everything that is here."""
    return [(op, b) for op in (ops or OPS) for b in backends_with_kernels(op, reference=reference)]


def make(case: Case, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Inputs:
    return cases.convert(case.make(torch.Generator().manual_seed(0)), dtype, device)


def device_of(backend: str) -> str:
    """Where a backend runs here; a required one that is missing fails."""
    for device in reversed(DEVICES):
        if ROWS[backend].why_not(device) is None:
            return device
    pytest.fail(f"backend {backend} runs nothing here: {ROWS[backend].why_not('cpu')}")


def refusal(op: str, inputs: Inputs, backend: str) -> str | None:
    """Why a backend that is here does not take a call, or None."""
    shell: Any = registry.OPS[op]
    return registry.refusal(ROWS[backend], shell.problem(shell.checked(shell.arguments(**inputs))))


@functools.cache
def representatives(op: str, backend: str = "reference") -> list[Case]:
    """Small cases that together have every kind of value that the cases have in any field."""
    seen: set[tuple[Any, ...]] = set()
    chosen = []
    is_here = any(ROWS[backend].why_not(device) is None for device in DEVICES)
    for c in OPS[op].CASES:
        inputs = make(c)
        if sum(t.numel() for t in inputs.values() if isinstance(t, Tensor)) > SMALL:
            continue
        if is_here and backend != "reference" and refusal(op, make(c, device=device_of(backend)), backend):
            continue
        kinds = {(name, *_kind(value)) for name, value in inputs.items()} | {("itself", inputs["x"] is inputs.get("y"))}
        kinds.add(("rows", min(inputs["x"].shape[0], 1)))
        if kinds - seen:
            chosen.append(c)
            seen |= kinds
    return chosen


def _kind(value: Any) -> tuple[Any, ...]:
    if isinstance(value, Tensor):
        return value.dim(), value.is_contiguous(), value.is_floating_point() or value.dtype == torch.int64
    return (value,) if isinstance(value, str | bool) else (type(value),)


def variables(op: str, inputs: Inputs) -> list[str]:
    """The differentiable tensors of a call."""
    return [n for n in OPS[op].DIFFERENTIABLE if isinstance(inputs.get(n), Tensor)]


def richest(op: str, backend: str = "reference") -> Case:
    """The case with the most tensors that have gradients, each of its own, and the most axes of them."""

    def count(c: Case) -> tuple[int, int]:
        inputs = make(c)
        tensors = {id(inputs[n]): inputs[n] for n in variables(op, inputs)}
        return len(tensors), sum(t.dim() for t in tensors.values())

    smooth = [c for c in representatives(op, backend) if c.smooth and make(c)["x"].shape[0] > 1]
    return max(smooth, key=count)


@functools.cache
def options_in_pairs(op: str) -> list[dict[str, Option]]:
    """Options of all choices of an op, so that every two options of two choices come together once."""
    fields = registry.OPS[op].fields  # type: ignore[attr-defined]
    options = {n: list(f.options) for n, f in fields.items() if isinstance(f, Choice)}
    seen: set[tuple[Any, ...]] = set()
    chosen = []
    for values in itertools.product(*options.values()):
        together = list(zip(options, values))
        new = set(itertools.combinations(together, min(2, len(together)))) - seen
        if new:
            chosen.append(dict(together))
            seen |= new
    return chosen


def small(op: str, rows: int = 5, columns: int = 4, width: int = 3, single: bool = False, **options: Any) -> Inputs:
    """A problem in float64 with a value for every field that these options allow, row factors 0-d if `single`.

    The first case of an op that has axes of its own.
    """
    shell: Any = registry.OPS[op]
    if not all(axis in ("rows", "columns", "width") for f in shell.fields.values() for axis in f.axes):
        return make(OPS[op].CASES[0]) | options
    g = torch.Generator().manual_seed(1)
    sizes = {"rows": rows, "columns": columns, "width": width}
    inputs: Inputs = {}
    for name, field in shell.fields.items():
        shape = [sizes[axis] for axis in field.axes]
        if isinstance(field, Embeddings | Vector):
            inputs[name] = torch.randn(shape, generator=g, dtype=torch.float64)
        elif isinstance(field, RowFactor):
            inputs[name] = torch.linspace(0.5, 3, rows, dtype=torch.float64)
            inputs[name] = inputs[name][0] * 3 if single else inputs[name]
        elif isinstance(field, Seed):
            inputs[name] = torch.tensor(3)
        elif isinstance(field, Labels):
            inputs[name] = (torch.arange(shape[0]) + 1) % (columns if "rows" in field.axes else 2)
    inputs |= options
    while True:
        try:
            shell.checked(shell.arguments(**inputs))
        except (ValueError, TypeError) as error:
            refused = str(error).partition(":")[0]
            if inputs.pop(refused, None) is None or refused in options:
                raise
        else:
            return inputs


@functools.cache
def checks_read_values(op: str) -> bool:
    """Whether the checks of an op read what is in its tensors, so that no graph can hold them."""
    shell: Any = registry.OPS[op]
    inputs = make(OPS[op].CASES[0])
    with FakeTensorMode() as mode:
        inputs = {n: mode.from_tensor(v) if isinstance(v, Tensor) else v for n, v in inputs.items()}
        try:
            shell.checked(shell.arguments(**inputs))
        except DataDependentOutputException:
            return True
    return False
