"""What a forward saves: as much as its kernel says, within the budget, and no bit of a gradient depends on it."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fused_margins.backends import registry
from fused_margins.backends.budget import within_memory_budget
from fused_margins.core.similarity import accumulation_dtype
from fused_margins.ops import cases
from fused_margins.ops.around_dispatcher import plan_of
from fused_margins.ops.through_dispatcher import as_bits
from tests.ops.suite.problems import DIFFERENTIABLE, OPS, device_of, make, pairs, refusal, representatives

PAIRS = pairs(DIFFERENTIABLE)
BUDGETS = (0, 20_000, 2**27)


@pytest.fixture(params=BUDGETS)
def budget(request) -> Iterator[int]:
    with within_memory_budget(request.param):
        yield request.param


def all_needs(count: int) -> list[tuple[bool, ...]]:
    """None, every one alone, all."""
    alone = [tuple(i == j for j in range(count)) for i in range(count)]
    return [(False,) * count, *alone, (True,) * count]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
@pytest.mark.parametrize(("op", "backend"), PAIRS)
def test_a_forward_saves_as_much_as_its_kernel_says(op, backend, dtype, budget):
    shell, kernel = registry.OPS[op], registry.kernel(op, backend)
    for case in OPS[op].CASES:
        inputs = make(case, dtype, device_of(backend))
        if refusal(op, inputs, backend):
            continue
        a = shell.checked(shell.arguments(**inputs))
        for needs in all_needs(len(shell.differentiable)):
            needs = tuple(n and isinstance(a[i], Tensor) for n, i in zip(needs, shell.differentiable))
            *_, saved = shell.registered(*shell.flat(a), as_bits(needs), backend)
            if not any(needs):
                assert saved.numel() == 0
                continue
            assert saved.dim() == 1
            assert saved.dtype == accumulation_dtype(dtype)
            plan = plan_of(kernel, a, needs)
            assert saved.numel() == kernel.saved_size(a, plan), case.name
            if all(t.isfinite().all() for t in inputs.values() if isinstance(t, Tensor)):
                assert not saved.isnan().any(), f"{case.name}: memory that nobody wrote"
            if hasattr(kernel, "recover_plan"):
                recovered = kernel.recover_plan(a, needs, saved.numel())
                assert kernel.saved_size(a, recovered) == saved.numel(), case.name


@pytest.mark.parametrize(("op", "backend"), PAIRS)
def test_the_memory_budget_changes_no_bit_of_a_gradient(op, backend):
    """At a scale that is no power of two: its products round, and whether they do before an addition shows."""
    shell, kernel = registry.OPS[op], registry.kernel(op, backend)
    if not hasattr(kernel, "plan"):
        return
    changed = 0
    for case in OPS[op].CASES:
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            inputs = make(case, dtype, device_of(backend))
            if refusal(op, inputs, backend):
                continue
            if isinstance(inputs.get("scale"), float):
                inputs["scale"] *= 0.9375
            a = shell.checked(shell.arguments(**inputs))
            needs = tuple(isinstance(a[i], Tensor) for i in shell.differentiable)
            results, sizes = [], []
            for num_bytes in BUDGETS:
                with within_memory_budget(num_bytes):
                    sizes.append(kernel.saved_size(a, plan_of(kernel, a, needs)))
                    results.append(cases.evaluate(OPS[op], inputs, backend))
            changed += len(set(sizes)) > 1
            for name, value in results[0].items():
                assert all(torch.equal(result[name], value) for result in results), (case.name, name)
    assert changed > 1


@pytest.mark.parametrize(("op", "backend"), PAIRS)
def test_a_budget_that_changes_between_forward_and_backward(op, backend):
    for case in representatives(op, backend):
        inputs = make(case, torch.float32, device_of(backend))
        expected = cases.evaluate(OPS[op], inputs, backend)
        names = [n for n in OPS[op].DIFFERENTIABLE if isinstance(inputs.get(n), Tensor)]
        leaf_of = {id(inputs[n]): inputs[n].detach().requires_grad_() for n in names}
        leaves = {n: leaf_of[id(inputs[n])] for n in names}
        with within_memory_budget(0):
            outputs = [t for t in OPS[op].run(inputs | leaves, backend).values() if t.requires_grad]
        generator = torch.Generator().manual_seed(0)
        incoming = [torch.randint(-64, 65, t.shape, generator=generator).to(t) / 64 for t in outputs]
        grads = torch.autograd.grad(outputs, list(leaves.values()), incoming, materialize_grads=True)
        for name, grad in zip(names, grads):
            assert torch.equal(grad, expected[f"grad_{name}"]), (case.name, name)
