"""The tests are tested: a wrong kernel must be seen, and a required backend must not be skipped."""

import functools
import subprocess
import sys
from collections.abc import Callable, Iterator
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


@functools.cache
def expected_of(op: str, gradients: bool) -> list[tuple[list[str], cases.Expected]]:
    """Of each small case, the outputs and gradients that it has, and what the definition makes of it in float32."""
    found = []
    for case in representatives(op, "cpu"):
        inputs = make(case)
        of = cases.Expected(OPS[op], inputs, torch.float32, exact=case.exact, gradients=gradients)
        found.append(([*registry.OPS[op].results, *(f"grad_{n}" for n in variables(op, inputs))], of))
    return found


def lines_of(op: str, name: str, wrong: Callable[[Tensor], Tensor], gradients: bool = True) -> Iterator[str]:
    """What the rule says, case by case, of those that have this output or gradient."""
    with registry.substitute(op, "cpu", Wrong(op, name, wrong)):
        for names, of in expected_of(op, gradients):
            if name in names:
                yield from of.disagreements("cpu")


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
    assert any(line.split(":")[0] == name for line in lines_of(op, name, wrong))


@pytest.mark.parametrize("op", ON_CPU)
def test_a_right_result_is_none_of_these(op):
    for name in names_of(op):
        assert list(lines_of(op, name, lambda t: t)) == []


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
        assert any(line == f"{name}: infinities differ" for line in lines)


def test_memory_that_nobody_writes_is_poisoned():
    for made in (torch.empty(5), torch.zeros(1).new_empty(5), torch.empty_like(torch.zeros(5))):
        assert made.isnan().all()
    assert (torch.empty(5, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()


WITHOUT_KERNELS = """
import sys
import pytest
from tests.forks import Forked
sys.modules["fused_margins._C"] = None
for more in ([], ["--require-backends=cpu"]):
    print(Forked(pytest.main, [*sys.argv[1:], *more]).result()[1])
"""


def test_a_required_backend_is_not_left_out():
    tests = ["tests/ops/suite/test_parity.py", "-k", "scores-logits-cpu-float32", "-p", "no:xdist"]
    command = [sys.executable, "-c", WITHOUT_KERNELS, *tests]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    left_out, separator, required = result.stdout.partition("backends left out: cpu (the native module did not load")
    assert separator, result.stdout + result.stderr
    assert "1 failed" not in left_out
    assert "1 failed" in required
