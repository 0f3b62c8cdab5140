"""A program: calls of the registered ops with everything that their schemas let through, and much that they do not.

It prints how many calls it made, and with ``python -m tests.ops.suite.hostile -v`` each. That it comes to an end is the
test.
"""

import itertools
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import fused_margins.functional  # noqa: F401  # every op registers itself
from fused_margins.backends import registry
from fused_margins.ops.through_dispatcher import as_bits
from tests.ops.suite.problems import make, representatives

INTEGERS = (-(2**63), -(2**31) - 1, -2, -1, 0, 1, 7, 2**31 - 1, 2**31, 2**62, 2**63 - 1)
FLOATS = (0.0, -0.0, -1.0, 1e-300, 1e300, float("inf"), float("-inf"), float("nan"))
BACKENDS = ("cpu", "auto", "reference", "cuda", "triton", "", "cpu\0")
ADDRESS_SPACE = 3 << 30  # bytes beyond what the program has: absurd sizes then fail at once


def bad_tensors(t: Tensor) -> Iterator[Any]:
    """Neighbours of a tensor: of other shapes, dtypes, strides, devices and values."""
    yield None
    yield t.new_empty(0)
    yield t.new_empty(t.shape, device="meta")
    yield t.to_sparse() if t.dim() and t.numel() else t.to_sparse_coo()
    yield torch._efficientzerotensor(t.shape, dtype=t.dtype)
    yield torch.nested.nested_tensor([t, t]) if t.dim() else t[None]
    for dtype in (torch.int8, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64, torch.complex64):
        if dtype != t.dtype:
            yield t.to(dtype)
    yield t.bool()
    yield t[None]
    for dim in range(t.dim()):
        for count in (0, 1, t.shape[dim] - 1, t.shape[dim] + 1, 2 * t.shape[dim]):
            shape = [*t.shape]
            shape[dim] = max(count, 0)
            other = t.new_zeros(shape)
            part = tuple(slice(min(a, b)) for a, b in zip(t.shape, shape))
            other[part] = t[part]
            yield other
        yield t.select(dim, 0) if t.shape[dim] else t
    if t.dim():
        yield t.flip(0)
        yield t.new_zeros(1).expand(t.shape)
        yield torch.cat([t, t], -1)[..., ::2]
        yield t.T.contiguous().T if t.dim() == 2 else torch.stack([t, t], 1)[:, 0]
    for value in INTEGERS if not t.is_floating_point() else (*FLOATS, 1e38):
        info = torch.finfo(t.dtype) if t.is_floating_point() else torch.iinfo(t.dtype)
        if info.min <= value <= info.max or value != value or abs(value) == float("inf"):
            yield torch.full_like(t, value)
            if t.numel() > 1:
                last = t.detach().reshape(-1).clone()
                last[-1] = value
                yield last.view(t.shape)


def bad_values(value: Any) -> Iterator[Any]:
    if isinstance(value, Tensor):
        yield from bad_tensors(value)
    elif isinstance(value, bool):
        yield from (not value, None, 7)
    elif isinstance(value, int):
        yield from (*INTEGERS, None)
    elif isinstance(value, float):
        yield from (*FLOATS, None)
    elif isinstance(value, str):
        yield from (*BACKENDS, None)
    else:  # an optional tensor that is not given
        yield from (torch.zeros(()), torch.zeros(3), torch.zeros(3).long(), torch.zeros(2, 2), 1.5)


def problems(op: Any) -> Iterator[Any]:
    """Valid arguments of every kind."""
    for case, dtype in zip(
        representatives(op.name, "cpu"), itertools.cycle((torch.float32, torch.bfloat16, torch.float64))
    ):
        yield op.checked(op.arguments(**make(case, dtype)))


def valid_calls(op: Any) -> Iterator[tuple[Any, list[Any]]]:
    """The registered forward, and the backward where there is one, with arguments that they take."""
    for a in problems(op):
        flat = op.flat(a)
        needs = as_bits([isinstance(a[i], Tensor) for i in op.differentiable])
        forward = [*flat, needs, "cpu"]
        yield op.registered, forward
        if op.differentiable:
            *outputs, saved = op.registered(*forward)
            grads = [torch.ones_like(t) if out.given(a) else None for t, out in zip(outputs, op.results.values())]
            yield op.registered_backward, [*grads, *flat, saved, needs, needs, "cpu"]


def calls(op: Any) -> Iterator[tuple[Any, list[Any]]]:
    for function, arguments in valid_calls(op):
        for i, value in enumerate(arguments):
            for bad in bad_values(value):
                yield function, [*arguments[:i], bad, *arguments[i + 1 :]]
        # Two at once, of the options and sizes of the forward and of what it saved.
        numbers = [i for i, v in enumerate(arguments) if isinstance(v, int) and not isinstance(v, bool)]
        for i, j in itertools.combinations(numbers, 2):
            for one, other in itertools.product((-1, 2, 2**31), repeat=2):
                changed = list(arguments)
                changed[i], changed[j] = one, other
                yield function, changed


def main() -> None:
    torch.set_num_threads(1)
    if sys.platform == "linux":
        import resource

        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESS_SPACE, used + ADDRESS_SPACE))
    count = refused = 0
    for op in registry.OPS.values():
        for function, arguments in calls(op):
            count += 1
            if "-v" in sys.argv:
                print(function, [_short(v) for v in arguments], flush=True)
            try:
                function(*arguments)
            except Exception as error:
                refused += 1
                if "-v" in sys.argv:
                    print(f"  {type(error).__name__}: {error}", flush=True)
    print(f"done: {count} calls of {len(registry.OPS)} ops, {refused} refused")


def _short(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return f"{tuple(value.shape)} {value.dtype} {value.stride() if value.layout == torch.strided else value.layout}"


if __name__ == "__main__":
    main()
