"""What the harness is told: workloads, their sizes, and the contestants that compute them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fused_margins.ops import registry

Inputs = dict[str, Any]
Outputs = dict[str, Tensor]
Step = Callable[[], Outputs]

BASELINE = "eager"


@dataclass(frozen=True)
class Size:
    """A size of a workload; `text` gives it in the order of the workload's `symbols`."""

    name: str
    text: str
    make: Callable[[torch.dtype, torch.Generator], Inputs]
    large: bool = False  # minutes or gigabytes: measured with --large only
    multiply_adds: int | None = None  # of one call, forward and backward
    compulsory_bytes: Callable[[torch.dtype], int] | None = None


@dataclass(frozen=True)
class Contestant:
    """One way to compute a workload."""

    name: str
    prepare: Callable[[Inputs], Step]  # set-up that is not timed; the step that it returns is
    note: str = ""  # what it does beyond the others, or leaves out
    changes: Inputs = field(default_factory=dict)  # inputs that it cannot take as they are; the gate takes them, too
    backend: str | None = None  # ours: the backend
    refuses: Callable[[Inputs], str | None] = lambda inputs: None

    def step(self, inputs: Inputs) -> Step:
        return self.prepare(inputs | self.changes)


# In what a contestant's outputs are not those of the inputs that the judge was made for, one line a fault.
Judge = Callable[[Contestant, Outputs], list[str]]


@dataclass(frozen=True)
class Workload:
    """Something to compute, and how to judge who does; `symbols` names the numbers in a size's text."""

    name: str
    title: str
    symbols: str
    sizes: tuple[Size, ...]
    dtypes: tuple[torch.dtype, ...]
    contestants: tuple[Contestant, ...]
    judge: Callable[[Inputs], Judge]

    @property
    def baseline(self) -> str:
        names = [c.name for c in self.contestants]
        return BASELINE if BASELINE in names else "reference"

    def contestant(self, name: str) -> Contestant:
        return next(c for c in self.contestants if c.name == name)


@dataclass(frozen=True)
class Row:
    """A workload at one size in one dtype."""

    workload: Workload
    size: Size
    dtype: torch.dtype

    @property
    def id(self) -> str:
        return "-".join((self.workload.name, self.size.name, self.size.text.replace(" ", ""), self.dtype_name))

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def inputs(self) -> Inputs:
        """The same numbers at every call, in every process."""
        return self.size.make(self.dtype, torch.Generator().manual_seed(0))


def rows(workloads: tuple[Workload, ...]) -> Iterator[Row]:
    for workload in workloads:
        for size in workload.sizes:
            for dtype in workload.dtypes:
                yield Row(workload, size, dtype)


def forward_backward(function: Callable[[Inputs], Outputs], inputs: Inputs, wrt: tuple[str, ...]) -> Step:
    """A step: the outputs and their gradients with respect to those of the inputs in `wrt` that are tensors."""
    names = [name for name in wrt if isinstance(inputs.get(name), Tensor)]
    # One tensor under two names (a batch against itself) is one leaf, as in training.
    leaf_of = {id(inputs[name]): inputs[name].detach().requires_grad_() for name in names}
    leaves = {name: leaf_of[id(inputs[name])] for name in names}
    arguments = inputs | leaves
    incoming: dict[str, Tensor] = {}

    def step() -> Outputs:
        outputs = function(arguments)
        for name in outputs.keys() - incoming.keys():
            incoming[name] = _incoming(outputs[name])
        grads = torch.autograd.grad(list(outputs.values()), list(leaves.values()), [incoming[name] for name in outputs])
        return {n: t.detach() for n, t in outputs.items()} | {f"grad_{n}": g for n, g in zip(leaves, grads)}

    return step if leaves else lambda: function(inputs)


def _incoming(output: Tensor) -> Tensor:
    """1 for a loss; for a matrix or vector numbers in [-1, 1] that every dtype holds and no contestant can foresee."""
    if output.dim() == 0:
        return torch.ones_like(output)
    generator = torch.Generator().manual_seed(1)
    return torch.randint(-64, 65, output.shape, generator=generator).to(output) / 64


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` by torch.compile, for one shape and without a fallback."""
    return torch.compile(function, fullgraph=True, dynamic=False)


def ours(
    prepare: Callable[[Inputs, str], Step],
    problem: Callable[[Inputs], registry.Problem],
    too_slow: Callable[[Inputs, str], str | None] = lambda inputs, backend: None,
) -> tuple[Contestant, ...]:
    """A contestant for every backend of the registry.

    Args:
        prepare: makes the step of the inputs on a backend, given by its name.
        problem: what the registry is asked whether a backend can run it.
        too_slow: why a backend that can is not worth the minutes, or None.
    """

    def contestant(backend: registry.Backend) -> Contestant:
        return Contestant(
            name=backend.name,
            prepare=lambda inputs: prepare(inputs, backend.name),
            backend=backend.name,
            refuses=lambda inputs: registry.refusal(backend, problem(inputs)) or too_slow(inputs, backend.name),
        )

    return tuple(contestant(backend) for backend in registry.BACKENDS)


def euclidean_differences(inputs: Inputs, backend: str) -> str | None:
    """`too_slow` of the nearest in Euclidean distance: the reference forms all B x N x D differences, to be exact."""
    x = inputs["embeddings"]
    columns: Any = inputs.get("centroids", x)
    too_many = x.shape[0] * columns.shape[0] * x.shape[1] > 2**30
    return "half a minute a call: it forms all B x N x D differences" if backend == "reference" and too_many else None
