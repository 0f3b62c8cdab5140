"""Every case on Triton's kernels, interpreted on the CPU, against the definition; gradients and outputs together.

Every pair of matrices comes in float32 and in bfloat16. What the two change is how tiles of similarities are made:
further cases with the same matrices, of other labels and options, come in one of them in turn. Some of those that save
weights come once more without room for any.
"""

import re
from collections.abc import Iterator

import pytest
import torch

from fused_margins.backends import budget, registry
from fused_margins.backends.triton import launch
from fused_margins.ops import cases
from tests.ops.suite.problems import make, refusal

pytestmark = pytest.mark.interpreted
DTYPES = [torch.float32, torch.bfloat16]
OPS = {name: cases.load(name) for name in registry.OPS if registry.has_kernel(name, "triton")}


def cases_in_dtypes(op: str) -> Iterator[tuple[cases.Case, torch.dtype]]:
    seen: list[tuple[list[torch.Tensor], str]] = []
    others = 0
    for case in OPS[op].CASES:
        inputs = case.make(torch.Generator().manual_seed(0))
        matrices = [inputs[name] for name in ("x", "y") if name in inputs], inputs.get("similarity", "cosine")
        if not any(are_equal(matrices, former) for former in seen):
            seen.append(matrices)
            yield from ((case, dtype) for dtype in DTYPES)
        else:
            yield case, DTYPES[others % 2]
            others += 1


def are_equal(first: tuple[list[torch.Tensor], str], second: tuple[list[torch.Tensor], str]) -> bool:
    (matrices, similarity), (others, another) = first, second
    alike = similarity == another and [t.stride() for t in matrices] == [t.stride() for t in others]
    return alike and all(map(torch.equal, matrices, others))


CASES = [
    pytest.param(op, case, dtype, id=f"{op}-{case.name}-{str(dtype).removeprefix('torch.')}")
    for op in OPS
    for case, dtype in cases_in_dtypes(op)
]


def refused(op: str, case: cases.Case, dtype: torch.dtype) -> bool:
    """Whether the backend says that it does not take a case; then a call says the same."""
    reason = refusal(op, make(case, dtype, launch.device), "triton")
    if reason:
        with pytest.raises(RuntimeError, match=re.escape(reason)):
            cases.evaluate(OPS[op], make(case, dtype, launch.device), "triton")
    return reason is not None


@pytest.mark.parametrize(("op", "case", "dtype"), CASES)
def test_agrees_with_the_definition(op, case, dtype):
    inputs = make(case)
    if refused(op, case, dtype):
        return
    options = {"exact": case.exact, "gradients": bool(OPS[op].DIFFERENTIABLE), "device": launch.device}
    assert not cases.disagreements(OPS[op], inputs, "triton", dtype, **options), case.reason


PLANNED = [name for name in OPS if hasattr(registry.kernel(name, "triton"), "plan")]


@pytest.mark.parametrize(
    ("op", "case"),
    [pytest.param(name, case, id=f"{name}-{case.name}") for name in PLANNED for case in OPS[name].CASES[::6]],
)
def test_agrees_where_nothing_may_be_saved(op, case):
    inputs = make(case)
    if refused(op, case, torch.float32):
        return
    with budget.within_memory_budget(0):
        lines = cases.disagreements(OPS[op], inputs, "triton", torch.float32, exact=case.exact, device=launch.device)
    assert not lines, case.reason
