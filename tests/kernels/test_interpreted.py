"""Every case on Triton's kernels, interpreted on the CPU, against the definition; gradients and outputs together.

Each case comes in float32 and in bfloat16, and some of those that save weights once more without room for any.
"""

import pytest
import torch

from fused_margins.backends import budget, registry
from fused_margins.backends.triton import launch
from fused_margins.ops import cases

pytestmark = pytest.mark.interpreted
DTYPES = [torch.float32, torch.bfloat16]
OPS = {name: cases.load(name) for name in registry.OPS if registry.has_kernel(name, "triton")}
CASES = [
    pytest.param(op, case, dtype, id=f"{op}-{case.name}-{str(dtype).removeprefix('torch.')}")
    for op in OPS
    for case in OPS[op].CASES
    for dtype in DTYPES
]


@pytest.mark.parametrize(("op", "case", "dtype"), CASES)
def test_agrees_with_the_definition(op, case, dtype):
    inputs = cases.convert(case.make(torch.Generator().manual_seed(0)), torch.float64)
    options = {"exact": case.exact, "gradients": bool(OPS[op].DIFFERENTIABLE), "device": launch.device}
    assert not cases.disagreements(OPS[op], inputs, "triton", dtype, **options), case.reason


PLANNED = [name for name in OPS if hasattr(registry.kernel(name, "triton"), "plan")]


@pytest.mark.parametrize(
    ("op", "case"),
    [pytest.param(name, case, id=f"{name}-{case.name}") for name in PLANNED for case in OPS[name].CASES[::6]],
)
def test_agrees_where_nothing_may_be_saved(op, case):
    inputs = cases.convert(case.make(torch.Generator().manual_seed(0)), torch.float64)
    with budget.within_memory_budget(0):
        lines = cases.disagreements(OPS[op], inputs, "triton", torch.float32, exact=case.exact, device=launch.device)
    assert not lines, case.reason
