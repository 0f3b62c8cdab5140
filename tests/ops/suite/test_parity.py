"""Every op on every backend, in every dtype, agrees with the definition; see `fused_margins.ops.cases` for the rule."""

import re

import pytest
import torch

from fused_margins.ops import cases
from tests.ops.suite.problems import DIFFERENTIABLE, OPS, device_of, make, pairs, refusal

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
CASES = [
    pytest.param(op, case, backend, id=f"{op}-{case.name}-{backend}")
    for op, backend in pairs()
    for case in OPS[op].CASES
]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("op", "case", "backend"), CASES)
def test_parity(op, case, backend, dtype, device_for):
    device = device_of(backend)
    if reason := refusal(op, make(case, dtype, device), backend):
        with pytest.raises(RuntimeError, match=re.escape(reason)):
            cases.evaluate(OPS[op], make(case, dtype, device), backend)
        return
    assert_agrees(op, case, backend, cases.Expected(OPS[op], make(case), dtype, exact=case.exact, device=device))


def assert_agrees(op: str, case: cases.Case, backend: str, of: cases.Expected) -> None:
    """Outputs and gradients; and the same outputs where no gradient is wanted."""
    lines = of.disagreements(backend)
    assert not lines, f"{case.reason}\n" + "\n".join(lines)
    if op in DIFFERENTIABLE:
        with_gradients = cases.evaluate(OPS[op], of.rounded, backend)
        for name, output in cases.evaluate(OPS[op], of.rounded, backend, gradients=False).items():
            assert torch.equal(output.nan_to_num(7.0), with_gradients[name].nan_to_num(7.0)), name


@pytest.mark.parametrize("op", OPS)
def test_cases_have_names_of_their_own_and_reasons(op):
    names = [case.name for case in OPS[op].CASES]
    assert len(set(names)) == len(names)
    assert all(case.reason for case in OPS[op].CASES)
