"""The tests are tested: a wrong kernel must be seen, and a required backend must not be skipped."""

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_margins.ops import cases, registry

ROOT = Path(__file__).parents[2]
OUTPUTS = {
    ("contrast", "forward"): ("positive", "negative_lse"),
    ("contrast", "backward"): ("grad_x", "grad_y", "grad_scale", "grad_bias"),
    ("draw", "forward"): ("index",),
    ("magnet", "forward"): ("loss",),
    ("magnet", "backward"): ("grad_x",),
    ("margin_softmax", "forward"): ("loss",),
    ("margin_softmax", "backward"): ("grad_x", "grad_y", "grad_scale", "grad_margin"),
    ("nearest", "forward"): ("similarity", "index"),
    ("scores", "forward"): ("scores",),
    ("scores", "backward"): ("grad_x", "grad_y", "grad_scale", "grad_bias", "grad_margin"),
}
FLOATING = [(op, function, name) for (op, function), names in OUTPUTS.items() for name in names if name != "index"]


def slightly_larger(t: Tensor) -> Tensor:
    return t * (1 + 1e-3)


def last_row_unwritten(t: Tensor) -> Tensor:
    return torch.cat([t[:-1], torch.empty_like(t[-1:])]) if t.dim() else torch.empty_like(t)


def first_column_everywhere(t: Tensor) -> Tensor:
    return torch.where(t >= 0, 0, t)


def off_by_one(t: Tensor) -> Tensor:
    return torch.where(t >= 0, t + 1, t)


def disagreements(
    op: str, case: str, function: str = "forward", output: str = "", wrong: Callable[[Tensor], Tensor] | None = None
) -> list[str]:
    """Of the CPU kernel in float32, one of whose outputs goes through `wrong`."""
    right = importlib.import_module(f"fused_margins.ops.{op}.kernel_cpu")

    def tampered(*args: Any) -> Any:
        results = getattr(right, function)(*args)
        if wrong is None:
            return results
        names = OUTPUTS[op, function]
        if isinstance(results, Tensor):
            return wrong(results)
        at = names.index(output)
        return (*results[:at], wrong(results[at]), *results[at + 1 :])

    kernels = SimpleNamespace(forward=right.forward, backward=getattr(right, "backward", None))
    setattr(kernels, function, tampered)
    found = next(c for c in cases.load(op).CASES if c.name == case)
    inputs = found.make(torch.Generator().manual_seed(0))
    with registry.substitute(op, "cpu", kernels):
        return cases.disagreements(cases.load(op), inputs, "cpu", torch.float32, exact=found.exact)


CASE = {
    "contrast": "strided",
    "magnet": "batch-none",
    "margin_softmax": "scale-rows",
    "nearest": "cosine-same",
    "scores": "learnable-cosine",
}


@pytest.fixture(autouse=True)
def _needs_cpu(device_for):
    device_for("contrast", "cpu")


@pytest.mark.parametrize("wrong", [slightly_larger, last_row_unwritten])
@pytest.mark.parametrize(("op", "function", "output"), FLOATING)
def test_a_wrong_output_is_seen(op, function, output, wrong):
    case = "scale-rows" if (op, output) == ("contrast", "grad_scale") else CASE[op]
    assert disagreements(op, case) == []
    lines = disagreements(op, case, function, output, wrong)
    assert output in {line.split(":")[0] for line in lines}  # and what is made from it, if anything


CHOICES = [
    ("nearest", "cosine-same"),
    ("nearest", "ties-dot-any"),
    ("nearest", "k-5"),
    ("draw", "any"),
    ("draw", "far"),
]


@pytest.mark.parametrize(("op", "case"), CHOICES)
@pytest.mark.parametrize("wrong", [first_column_everywhere, off_by_one, last_row_unwritten])
def test_a_wrong_choice_is_seen(op, case, wrong):
    assert disagreements(op, case) == []
    lines = disagreements(op, case, "forward", "index", wrong)
    assert [line.split(":")[0] for line in lines] == ["index"]


def test_a_higher_column_among_equals_is_seen():
    def highest(index: Tensor) -> Tensor:
        return torch.where(index >= 0, 52, index)

    assert disagreements("nearest", "expanded", "forward", "index", highest)


@pytest.mark.parametrize("wrong", [lambda t: t.double(), lambda t: t[:, None]], ids=["dtype", "shape"])
def test_another_dtype_or_shape_is_seen(wrong):
    (line,) = disagreements("contrast", "softmax", "forward", "positive", wrong)
    assert line.startswith("positive: expected (37,) of torch.float32, got")


@pytest.mark.parametrize("value", [0.0, -1e30, torch.nan])
def test_a_value_in_place_of_minus_infinity_is_seen(value):
    (line,) = disagreements(
        "contrast", "some-ignored", "forward", "negative_lse", lambda t: t.nan_to_num(neginf=value, nan=value)
    )
    assert line == "negative_lse: infinities differ"


def test_memory_that_nobody_writes_is_poisoned():
    for made in (torch.empty(5), torch.zeros(1).new_empty(5), torch.empty_like(torch.zeros(5))):
        assert made.isnan().all()
    assert (torch.empty(5, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()


@pytest.mark.parametrize(("options", "outcome"), [([], "1 skipped"), (["--require-backends=cpu"], "1 failed")])
def test_a_required_backend_is_not_skipped(options, outcome):
    test = "tests/ops/test_parity.py::test_forward[scores-logits-cpu-float32]"
    program = "import sys, pytest; sys.modules['fused_margins._C'] = None; sys.exit(pytest.main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, test, *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert outcome in result.stdout, result.stdout + result.stderr
