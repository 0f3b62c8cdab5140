"""The tests are tested: a wrong kernel must be seen, and a required backend must not be skipped."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_margins.backends import registry
from fused_margins.ops import cases
from tests.conftest import backends_with_kernels
from tests.ops.suite.problems import OPS, make, representatives, variables

ROOT = Path(__file__).parents[3]
ON_CPU = [op for op in OPS if "cpu" in backends_with_kernels(op)]


def slightly_larger(t: Tensor) -> Tensor:
    return t * (1 + 1e-3)


def last_row_unwritten(t: Tensor) -> Tensor:
    return torch.cat([t[:-1], torch.empty_like(t[-1:])]) if t.dim() else torch.empty_like(t)


def another_sign(t: Tensor) -> Tensor:
    return -t


def first_column_everywhere(t: Tensor) -> Tensor:
    return torch.where(t >= 0, 0, t)


def off_by_one(t: Tensor) -> Tensor:
    return torch.where(t >= 0, t + 1, t)


class Wrong:
    """A kernel module of which one output, or one gradient, goes through `wrong`."""

    def __init__(self, op: str, name: str, wrong: Callable[[Tensor], Tensor]) -> None:
        shell: Any = registry.OPS[op]
        self.right, self.wrong = registry.kernel(op, "cpu"), wrong
        self.function = "backward" if name.startswith("grad_") else "forward"
        fields = list(shell.fields)
        gradients = [f"grad_{fields[i]}" for i in shell.differentiable]
        self.place = (gradients if self.function == "backward" else list(shell.results)).index(name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.right, name)

    def _run(self, function: str, *args: Any) -> Any:
        results = list(getattr(self.right, function)(*args))
        if function == self.function and results[self.place] is not None:
            results[self.place] = self.wrong(results[self.place])
        return results

    def forward(self, *args: Any) -> Any:
        return self._run("forward", *args)

    def backward(self, *args: Any) -> Any:
        return self._run("backward", *args)


def names_of(op: str) -> list[str]:
    """Outputs and gradients."""
    shell: Any = registry.OPS[op]
    return [*shell.results, *(f"grad_{n}" for n in OPS[op].DIFFERENTIABLE)]


def is_integer(op: str, name: str) -> bool:
    shell: Any = registry.OPS[op]
    return name in shell.results and not shell.results[name].dtype(torch.zeros(0)).is_floating_point


def lines_of(op: str, name: str, wrong: Callable[[Tensor], Tensor], gradients: bool = True) -> list[str]:
    """What the rule says in float32 of each case that has this output or gradient."""
    found = []
    with registry.substitute(op, "cpu", Wrong(op, name, wrong)):
        for case in representatives(op, "cpu"):
            inputs = make(case)
            if not name.startswith("grad_") or name.removeprefix("grad_") in variables(op, inputs):
                found += cases.disagreements(
                    OPS[op], inputs, "cpu", torch.float32, exact=case.exact, gradients=gradients
                )
    return found


WRONG = [
    pytest.param(
        op,
        name,
        wrong,
        id=f"{op}-{name}-{wrong.__name__}",
    )
    for op in ON_CPU
    for name in names_of(op)
    for wrong in (
        (first_column_everywhere, off_by_one, last_row_unwritten)
        if is_integer(op, name)
        else (slightly_larger, last_row_unwritten, another_sign)
    )
]


@pytest.mark.parametrize(("op", "name", "wrong"), WRONG)
def test_a_wrong_result_is_seen(op, name, wrong):
    assert lines_of(op, name, lambda t: t) == []
    assert name in {line.split(":")[0] for line in lines_of(op, name, wrong)}


@pytest.mark.parametrize("wrong", [lambda t: t.double(), lambda t: t[..., None]], ids=["dtype", "shape"])
@pytest.mark.parametrize("op", ON_CPU)
def test_another_dtype_or_shape_is_seen(op, wrong):
    for name in registry.OPS[op].results:  # type: ignore[attr-defined]
        assert any(line.startswith(f"{name}: expected (") for line in lines_of(op, name, wrong, gradients=False))


@pytest.mark.parametrize("value", [0.0, -1e30, torch.nan])
@pytest.mark.parametrize("op", ON_CPU)
def test_a_value_in_place_of_an_infinity_is_seen(op, value):
    with_infinities = set()
    for case in representatives(op, "cpu"):
        outputs = OPS[op].run(make(case), "cpu")
        with_infinities |= {n for n, t in outputs.items() if t.is_floating_point() and t.isinf().any()}
    for name in with_infinities:
        lines = lines_of(op, name, lambda t: t.nan_to_num(posinf=value, neginf=value, nan=value))
        assert f"{name}: infinities differ" in lines


def test_memory_that_nobody_writes_is_poisoned():
    for made in (torch.empty(5), torch.zeros(1).new_empty(5), torch.empty_like(torch.zeros(5))):
        assert made.isnan().all()
    assert (torch.empty(5, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()


@pytest.mark.parametrize(
    ("options", "outcome"),
    [([], "backends left out: cpu (the native module did not load"), (["--require-backends=cpu"], "1 failed")],
    ids=["left-out", "required"],
)
def test_a_required_backend_is_not_left_out(options, outcome):
    tests = ["tests/ops/suite/test_parity.py", "-k", "scores-logits-cpu-float32", "-p", "no:xdist"]
    program = "import sys, pytest; sys.modules['fused_margins._C'] = None; sys.exit(pytest.main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, *tests, *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert outcome in result.stdout, result.stdout + result.stderr
