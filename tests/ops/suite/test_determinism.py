"""The same bits twice, on any number of threads, for any strides, and for a call that was routed before."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_margins.backends import cpu, registry
from fused_margins.ops import cases
from fused_margins.ops.cases import Inputs
from tests.conftest import backends
from tests.ops.suite.problems import OPS, device_of, make, pairs, refusal, representatives, richest, variables

PAIRS = pairs()
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture
def threads_afterwards():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def large(op: str, backend: str, dtype: torch.dtype) -> list[Inputs]:
    """Of every similarity, work for several threads: csrc/cpu/threads.h gives one to every 5e5 multiply-adds."""
    shape = next(s for s in OPS[op].SHAPES if OPS[op].multiply_adds(s) > 8e6)
    made = OPS[op].make_benchmark(shape, dtype, torch.Generator().manual_seed(0))
    fields = registry.OPS[op].fields  # type: ignore[attr-defined]
    names = fields["similarity"].options.names() if "similarity" in fields else []
    found = [cases.convert(made | {"similarity": name}, dtype, device_of(backend)) for name in names]
    found = found or [cases.convert(made, dtype, device_of(backend))]
    # The largest case, too, with more than a block of everything.
    biggest = max(OPS[op].CASES, key=lambda c: sum(t.numel() for t in make(c).values() if isinstance(t, Tensor)))
    found.append(make(biggest, dtype, device_of(backend)))
    return [inputs for inputs in found if not refusal(op, inputs, backend)]


@pytest.mark.usefixtures("threads_afterwards")
@by_dtype
@pytest.mark.parametrize(("op", "backend"), PAIRS)
def test_same_bits(op, backend, dtype):
    for inputs in large(op, backend, dtype):
        torch.set_num_threads(1)
        first = cases.evaluate(OPS[op], inputs, backend)
        assert_same_bits(cases.evaluate(OPS[op], inputs, backend), first)
        for threads in (2, 7):
            torch.set_num_threads(threads)
            assert_same_bits(cases.evaluate(OPS[op], inputs, backend), first)


@by_dtype
@pytest.mark.parametrize(("op", "backend"), PAIRS)
def test_strides_change_no_bit(op, backend, dtype):
    """Every tensor with gaps, one that starts in the middle of its memory, and one that is transposed in memory."""
    for case in representatives(op, backend):
        inputs = make(case, dtype, device_of(backend))
        if inputs["x"] is inputs.get("y"):
            continue
        contiguous = {n: v.contiguous() if isinstance(v, Tensor) else v for n, v in inputs.items()}
        expected = cases.evaluate(OPS[op], contiguous, backend)
        for lay_out in (with_gaps, in_the_middle, transposed):
            moved = {n: lay_out(v) if isinstance(v, Tensor) and v.dim() else v for n, v in inputs.items()}
            assert_same_bits(cases.evaluate(OPS[op], moved, backend), expected)


def with_gaps(t: Tensor) -> Tensor:
    gaps = t.new_zeros([2 * n for n in t.shape])
    view = gaps[tuple(slice(1, None, 2) for _ in t.shape)]
    view.copy_(t)
    return view


def in_the_middle(t: Tensor) -> Tensor:
    memory = t.new_zeros(t.numel() + 3)
    memory[1:-2] = t.reshape(-1)
    return memory[1:-2].view(t.shape)


def transposed(t: Tensor) -> Tensor:
    return t.T.contiguous().T if t.dim() == 2 else t


@pytest.mark.parametrize(("op", "backend"), PAIRS)
def test_a_call_like_one_before(op, backend):
    """Routes are remembered for calls of a kind: with other values in them, and where gradients are wanted or not."""
    case = richest(op, backend) if OPS[op].DIFFERENTIABLE else OPS[op].CASES[0]
    inputs = make(case, torch.float32, device_of(backend))
    for _ in range(2):
        expected = cases.evaluate(OPS[op], inputs, "reference")
        for name, value in cases.evaluate(OPS[op], inputs, backend).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4)
        inputs["x"] = inputs["x"].flip(1)
    for name in variables(op, inputs):  # without, and with again
        for others in ({name: inputs[name].detach().requires_grad_()}, {}):
            outputs = OPS[op].run(inputs | others, backend)
            assert any(t.requires_grad for t in outputs.values()) == bool(others)
    with torch.no_grad():
        leaf = inputs["x"].detach().requires_grad_()
        assert not any(t.requires_grad for t in OPS[op].run(inputs | {"x": leaf}, backend).values())


@pytest.mark.usefixtures("threads_afterwards")
@pytest.mark.parametrize("op", [op for op in OPS if "cpu" in backends(op)])
def test_a_thread_of_python_obeys_set_num_threads(op):
    """OpenMP keeps the number of threads for each thread of Python, and torch sets it in a new one only when asked."""
    counts: list[Any] = []
    inputs = large(op, "cpu", torch.float32)[0]  # made here: torch's own work would set the number, too

    def run() -> None:
        OPS[op].run(inputs, "cpu")
        counts.append(cpu.module.max_threads())

    for threads in (1, 3):
        torch.set_num_threads(threads)
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert counts == [1, 3]


TASKS = Path("/proc/self/task")


@pytest.mark.skipif(not TASKS.exists(), reason="no /proc to count threads in")
@pytest.mark.usefixtures("threads_afterwards")
@pytest.mark.parametrize("op", [op for op in OPS if "cpu" in backends(op)])
def test_the_kernels_do_use_several_threads(op):
    """Else the same bits on several threads would be those of one. A new thread of Python has a pool of its own."""
    inputs, started = large(op, "cpu", torch.float32)[0], []

    def run() -> None:
        before = {task.name for task in TASKS.iterdir()}  # some of them may be ending
        OPS[op].run(inputs, "cpu")
        started.append(len({task.name for task in TASKS.iterdir()} - before))

    for threads in (1, 3):
        torch.set_num_threads(threads)
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert started == [0, 2]
