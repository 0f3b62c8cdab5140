"""What a call on a GPU costs its host, without a GPU: launches, and the time until all of them are on their way.

    python -m benchmarks.launches [--rounds 20]

Tensors lie on the CPU, and a stand-in for the driver's launch does nothing; the path to it is the one that a GPU takes:
of autograd, of the op's shell, of its kernel module, and of Triton's compiled kernels as they are run. A launch is one
kernel of Triton, or one operation of torch that is no view and no allocation. The host's time is the median of the
call, forward and backward, beside that of an autograd Function that does nothing, over rounds of 20 calls each; a
driver adds a microsecond or two a launch.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fused_margins.backends import budget
from fused_margins.backends.triton import launch
from fused_margins.functional import margin_softmax_loss, mine_negatives, mine_positives
from fused_margins.ops.contrast import triton_exponentials

MULTIPROCESSORS = 132  # of an H200
AT_ONCE = 20  # calls of a turn
# Operations of torch that start nothing on a GPU by themselves: views, memory, and questions.
_ALLOCATE = "empty empty_like empty_strided new_empty new_empty_strided"
_VIEW = "alias as_strided detach expand expand_as flatten narrow permute reshape select slice split split_with_sizes"
_MORE_VIEWS = "squeeze swapaxes t numpy_T transpose unbind unflatten unsqueeze view view_as _reshape_alias _unsafe_view"
_ASK = "is_nonzero item result_type resolve_conj resolve_neg lift_fresh _has_compatible_shallow_copy_type"
NO_KERNEL = {f"aten::{name}" for name in f"{_ALLOCATE} {_VIEW} {_MORE_VIEWS} {_ASK}".split()}


class _Nothing:
    """In the place of compiled kernels: one that is there for every call, and counts."""

    def __init__(self) -> None:
        self.launches = 0

    def get(self, key: Any) -> Any:
        return None, self.run, None, None, ()

    def run(self, *values: Any) -> None:
        self.launches += 1


def _product(a: Tensor, b: Tensor) -> Tensor:
    """In the place of cuBLAS: one operation of torch, a matrix of the size."""
    torch.mm(_ONE, _ONE)
    return torch.empty(a.shape[0], b.shape[1])


_ONE = torch.ones(1, 1)


@contextlib.contextmanager
def without_driver() -> Iterator[_Nothing]:
    """Within this block the Triton backend takes tensors on the CPU as a GPU's, and launches nothing."""
    nothing = _Nothing()
    of_launch = {
        "interpreted": False, "missing": None, "device": "cpu", "_compiled": nothing, "triton_version": (3, 6),
        "capability": lambda device: 9, "num_persistent_programs": lambda device: 2 * MULTIPROCESSORS,
    }  # fmt: skip
    launch._runs_compiled.cache_clear()
    with contextlib.ExitStack() as stack:
        for name, value in of_launch.items():
            stack.enter_context(mock.patch.object(launch, name, value))
        zero: Callable[..., int] = lambda *args: 0  # noqa: E731  # a mock would take longer than what it stands for
        stack.enter_context(mock.patch.object(torch.cuda, "current_device", zero))
        stack.enter_context(mock.patch.object(triton_exponentials, "product", _product))
        stack.enter_context(mock.patch.object(torch._C, "_cuda_getCurrentRawStream", zero, create=True))
        yield nothing
    launch._runs_compiled.cache_clear()


class _Empty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _both_ways(loss: Callable[[], Tensor], *variables: Tensor) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(loss(), variables)


def empty_call() -> Callable[[], Any]:
    """An autograd Function that does nothing."""
    x = torch.ones(1, dtype=torch.bfloat16).requires_grad_()
    return _both_ways(lambda: _Empty.apply(x), x)


def calls() -> dict[str, Callable[[], Any]]:
    """What is measured, by name; a call with its backward where there is one."""

    def rows(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.ones(shape, dtype=dtype).requires_grad_()

    def margin_softmax(size: int, width: int, classes: int, **options: Any) -> Callable[[], Any]:
        x, w, labels = rows(size, width), rows(classes, width), torch.zeros(size, dtype=torch.int64)
        return _both_ways(lambda: margin_softmax_loss(x, w, labels, margin=0.1, backend="triton", **options), x, w)

    x, labels = rows(2048, 128), torch.arange(512).repeat(4)
    found = x.detach()
    return {
        "margin softmax, 1024 x 512 x 10,000": margin_softmax(1024, 512, 10_000),
        "margin softmax, 1024 x 512 x 10,000, exponentials kept": margin_softmax(1024, 512, 10_000),
        "margin softmax, 256 x 512 x 64": margin_softmax(256, 512, 64),
        "with smoothing, 1024 x 512 x 10,000": margin_softmax(1024, 512, 10_000, label_smoothing=0.1),
        "with smoothing, 256 x 512 x 64": margin_softmax(256, 512, 64, label_smoothing=0.1),
        "easy positives, 2048 x 128": lambda: mine_positives(found, labels, backend="triton"),
        "hardest negatives, 2048 x 128": lambda: mine_negatives(found, labels, strategy="hard", backend="triton"),
        "easy positives, 256 x 128": lambda: mine_positives(found[:256], labels[:256], backend="triton"),
    }


def torch_launches(call: Callable[[], Any]) -> int:
    """Operations of torch that a GPU would run."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()

    def launches(event: Any) -> int:
        """What it calls launches for it; where that launches nothing, it is a kernel, unless it needs none."""
        below = sum(map(launches, event.cpu_children))
        return below or int(event.name.startswith("aten::") and event.name not in NO_KERNEL)

    return sum(launches(event) for event in profile.events() if event.cpu_parent is None)


def measure(
    call: Callable[[], Any], empty: Callable[[], Any], nothing: _Nothing, rounds: int
) -> tuple[int, int, float, float]:
    """Launches of Triton and of torch, and the host's time in microseconds, of the call and of the empty one."""
    for _ in range(3):
        call()
    before = nothing.launches
    call()
    of_triton = nothing.launches - before
    times: dict[Callable[[], Any], list[float]] = {empty: [], call: []}
    for _ in range(rounds):  # in turns, since a machine's pace changes within a second; each with warm caches
        for timed, found in times.items():
            for _ in range(AT_ONCE):
                begin = time.perf_counter()
                timed()
                found.append(time.perf_counter() - begin)
    of_empty, of_call = (1e6 * statistics.median(found) for found in times.values())
    return of_triton, torch_launches(call), of_call, of_empty


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="turns of 20 calls each")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print("| call, bfloat16 | launches of Triton | of torch | host us | an empty Function's | ratio |")
    print("|---|---:|---:|---:|---:|---:|")
    with without_driver() as nothing:
        for name, call in calls().items():
            with budget.within_exponential_budget(None if "kept" in name else 0):
                of_triton, of_torch, host_us, empty_us = measure(call, empty_call(), nothing, rounds)
            ratio = host_us / empty_us
            print(f"| {name} | {of_triton} | {of_torch} | {host_us:.0f} | {empty_us:.0f} | {ratio:.1f} |", flush=True)


if __name__ == "__main__":
    main()
