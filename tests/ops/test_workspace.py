"""What a forward saves lies in memory that later forwards get again, and nobody else before it is free; for gradients
too large for malloc to keep huge pages are asked for."""

from pathlib import Path

import pytest
import torch

import fused_margins
from fused_margins.backends import budget, cpu
from fused_margins.functional import margin_softmax_loss

pytestmark = pytest.mark.skipif(cpu.module is None, reason="the cpu backend is not built")
LARGE = 2**21  # float32 values: 8 MiB


@pytest.fixture(autouse=True)
def nothing_waits():
    before = budget.memory_budget()
    budget.set_memory_budget(2**27)
    yield
    budget.set_memory_budget(before)


def waiting():
    return cpu.module.Workspace.waiting_bytes()


def test_free_memory_comes_again_and_memory_in_use_does_not():
    first = cpu.workspace(LARGE, torch.float32)
    assert first.shape == (LARGE,)
    assert first.dtype == torch.float32
    place = first.data_ptr()
    part = first[5:7]
    del first
    assert waiting() == 0  # its part is in use
    second = cpu.workspace(LARGE, torch.float32)
    assert second.data_ptr() != place
    del part
    assert waiting() == 4 * LARGE
    assert cpu.workspace(LARGE // 4 - 64, torch.float64).data_ptr() != place  # less than half of it is no use for it
    assert cpu.workspace(LARGE // 2 - 64, torch.float64).data_ptr() == place


def test_memory_waits_within_limits_and_until_the_budget_is_set():
    budget.set_memory_budget(8 * LARGE)
    blocks = [cpu.workspace(LARGE, torch.float32) for _ in range(5)]
    places = [block.data_ptr() for block in blocks]
    while blocks:
        del blocks[0]
    assert waiting() == 12 * LARGE  # one and a half budgets
    assert cpu.workspace(LARGE, torch.float32).data_ptr() == places[-1]  # the newest, which a cache may hold
    fused_margins.set_memory_budget(budget.memory_budget())
    assert waiting() == 0
    fused_margins.set_memory_budget(0)
    cpu.workspace(LARGE, torch.float32)
    assert waiting() == 0


def test_small_memory_is_left_to_torch():
    cpu.workspace(cpu.REUSED_BYTES // 4 - 1, torch.float32)
    assert waiting() == 0


def _problem(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(128, 16, generator=generator).requires_grad_()
    y = torch.randn(5000, 16, generator=generator).requires_grad_()
    return x, y, torch.randint(5000, (128,), generator=generator)


def _loss(x, y, target):
    return margin_softmax_loss(x, y, target, scale=8.0, margin=0.1, backend="cpu")


def test_forwards_that_wait_for_their_backward_share_nothing():
    alone = []
    for seed in range(3):
        x, y, target = _problem(seed)
        alone.append(torch.autograd.grad(_loss(x, y, target), (x, y)))
    assert waiting() > 0
    problems = [_problem(seed) for seed in range(3)]
    losses = [_loss(*problem) for problem in problems]
    assert waiting() == 0  # all are in use
    for number in (1, 2, 0, 1):  # in another order, and one of them twice
        x, y, _ = problems[number]
        for grad, expected in zip(torch.autograd.grad(losses[number], (x, y), retain_graph=True), alone[number]):
            assert torch.equal(grad, expected)


def test_the_benchmarks_count_what_is_saved_between_calls():
    memory = pytest.importorskip("benchmarks.memory")
    if not memory.available():
        pytest.skip("Linux only")
    x, y, target = _problem(0)
    growth = memory.peak_growth(lambda: _loss(x, y, target))
    assert growth > 5000 * 128 * 4
    assert waiting() > 5000 * 128 * 4


def test_weights_are_saved_for_gradients_of_columns_alone():
    x, y, target = _problem(0)
    alone = torch.autograd.grad(_loss(x, y, target), x)[0]
    budget.set_memory_budget(2**27)  # nothing waits
    loss = _loss(x, y.detach(), target)
    assert torch.equal(torch.autograd.grad(loss, x)[0], alone)
    del loss
    assert waiting() == 0


def _asks_for_huge_pages(tensor):
    """Whether the mapping in the middle of the tensor was advised to be of huge pages: the flag hg of Linux."""
    place, inside = tensor.data_ptr() + tensor.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(" ")
        if "-" in name:
            begin, end = (int(address, 16) for address in name.split("-"))
            inside = begin <= place < end
        elif inside and name == "VmFlags:":
            return "hg" in rest.split()
    raise AssertionError(f"no mapping at {place:x}")


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a system without huge pages")
@pytest.mark.parametrize("op", ["contrast", "scores"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_that_the_system_maps_anew_ask_for_huge_pages(op, dtype):
    call = {"contrast": margin_softmax_loss, "scores": fused_margins.functional.margin_logits}[op]
    columns = 3 * 2**24 // (32 * dtype.itemsize)  # 48 MiB
    x = torch.randn(4, 32).to(dtype)
    y = torch.randn(columns, 32).to(dtype).requires_grad_()
    out = call(x, y, torch.tensor([0, 1, 2, columns - 1]), scale=8.0, margin=0.1, backend="cpu")
    (grad,) = torch.autograd.grad(out.sum(), y)
    assert _asks_for_huge_pages(grad)
    assert grad.isfinite().all()
