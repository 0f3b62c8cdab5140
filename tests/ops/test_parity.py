"""Every op on every backend, in every dtype, agrees with the definition; see `fused_margins.ops.cases` for the rule."""

import pytest
import torch

from fused_margins.ops import cases, registry

OPS = {name: cases.load(name) for name in registry.OPS}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
CASES = [
    pytest.param(backend.name, name, case, id=f"{name}-{case.name}-{backend.name}")
    for name, op in OPS.items()
    for case in op.CASES
    for backend in registry.BACKENDS
    if registry._HAS_KERNEL[name, backend.name]
]
CASES_WITH_GRADIENTS = [p for p in CASES if OPS[p.values[1]].DIFFERENTIABLE]


def agrees(op: str, case: cases.Case, backend: str, dtype: torch.dtype, device: str, gradients: bool) -> None:
    inputs = case.make(torch.Generator().manual_seed(0))
    if backend == "cuda" and op == "nearest" and inputs.get("relation", "same") != "same":
        with pytest.raises(RuntimeError, match="within classes only"):
            cases.evaluate(OPS[op], cases.convert(inputs, dtype, device), backend, gradients)
        return
    lines = cases.disagreements(OPS[op], inputs, backend, dtype, exact=case.exact, gradients=gradients, device=device)
    assert not lines, f"{case.reason}\n" + "\n".join(lines)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("backend", "op", "case"), CASES)
def test_forward(op, case, dtype, backend, device_for):
    agrees(op, case, backend, dtype, device_for(op, backend), gradients=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("backend", "op", "case"), CASES_WITH_GRADIENTS)
def test_gradients(op, case, dtype, backend, device_for):
    agrees(op, case, backend, dtype, device_for(op, backend), gradients=True)


@pytest.mark.usefixtures("no_memory_budget")
@pytest.mark.parametrize(("backend", "op", "case"), CASES_WITH_GRADIENTS)
def test_gradients_without_kept_weights(op, case, backend, device_for):
    agrees(op, case, backend, torch.float32, device_for(op, backend), gradients=True)


@pytest.mark.parametrize("op", OPS)
def test_cases_have_names_of_their_own_and_reasons(op):
    names = [case.name for case in OPS[op].CASES]
    assert len(set(names)) == len(names)
    assert all(case.reason for case in OPS[op].CASES)
