"""What the harness is told: workloads, their sizes, and the contestants that compute them."""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fused_margins.ops import registry

Inputs = dict[str, Any]
Outputs = dict[str, Tensor]
Step = Callable[[], Outputs]

BASELINE = "eager"
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Size:
    """A size of a workload; `text` gives it in the order of the workload's `symbols`. `make` makes the inputs on the
    generator's device."""

    name: str
    text: str
    make: Callable[[torch.dtype, torch.Generator], Inputs]
    large: bool = False  # minutes or gigabytes: measured with --large only
    multiply_adds: int | None = None  # of one call, forward and backward
    compulsory_bytes: Callable[[torch.dtype], int] | None = None
    devices: tuple[str, ...] = DEVICES  # where it is measured
    dtypes: tuple[torch.dtype, ...] | None = None  # instead of the workload's


@dataclass(frozen=True)
class Contestant:
    """One way to compute a workload."""

    name: str
    prepare: Callable[[Inputs], Step]  # set-up that is not timed; the step that it returns is
    note: str = ""  # what it does beyond the others, or leaves out
    changes: Inputs = field(default_factory=dict)  # inputs that it cannot take as they are; the gate takes them, too
    backend: str | None = None  # ours: the backend
    refuses: Callable[[Inputs], str | None] = lambda inputs: None
    devices: tuple[str, ...] = DEVICES  # where it takes part
    sizes: tuple[str, ...] | None = None  # names of the sizes that it takes part in; None: all
    floor: bool = False  # what nobody can be faster than: it computes less than the workload, so no gate judges it
    allocates: bool = True  # False: its memory was taken before the call, so there is no figure for it

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
        peers = [c.name for c in self.contestants if c.backend is None]
        return BASELINE if BASELINE in peers else next(iter(peers), "reference")

    def contestant(self, name: str) -> Contestant:
        return next(c for c in self.contestants if c.name == name)


@dataclass(frozen=True)
class Row:
    """A workload at one size in one dtype."""

    workload: Workload
    size: Size
    dtype: torch.dtype
    device: str = "cpu"

    @property
    def id(self) -> str:
        return "-".join((self.workload.name, self.size.name, self.size.text.replace(" ", ""), self.dtype_name))

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def contestants(self) -> tuple[Contestant, ...]:
        """Those of the workload that take part."""
        return tuple(
            c
            for c in self.workload.contestants
            if self.device in c.devices and (c.sizes is None or self.size.name in c.sizes)
        )

    def inputs(self) -> Inputs:
        """The same numbers at every call, in every process; other ones on another kind of device."""
        return self.size.make(self.dtype, torch.Generator(self.device).manual_seed(0))


@dataclass(frozen=True)
class Series:
    """A workload on a CPU at sizes that grow in one number: how its cost grows (``growth.py``)."""

    name: str  # of its picture
    axis: str  # the number that grows
    values: tuple[int, ...]  # it, ascending; one for each size of the workload
    workload: Workload

    @property
    def rows(self) -> tuple["Row", ...]:
        return tuple(rows((self.workload,), "cpu"))


def rows(workloads: tuple[Workload, ...], device: str) -> Iterator[Row]:
    for workload in workloads:
        for size in workload.sizes:
            if device in size.devices:
                for dtype in size.dtypes or workload.dtypes:
                    yield Row(workload, size, dtype, device)


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


def on_device(*size: int, generator: torch.Generator) -> Tensor:
    """Normal random numbers on the generator's device."""
    return torch.randn(*size, generator=generator, device=generator.device)


def unless_installed(*modules: str) -> Callable[[Inputs], str | None]:
    """`refuses` of a contestant that needs these modules."""

    def refuses(inputs: Inputs) -> str | None:
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        return f"{', '.join(missing)} not installed" if missing else None

    return refuses


GRAPH_WARM_UP = 3  # calls before a capture, as torch's documentation asks: libraries set themselves up


def captured(contestant: Contestant, sizes: tuple[str, ...] | None = None) -> Contestant:
    """The contestant's step as a CUDA graph: recorded once, replayed without Python or launches one by one."""

    def prepare(inputs: Inputs) -> Step:
        step = contestant.prepare(inputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(GRAPH_WARM_UP):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = step()

        def replay() -> Outputs:
            graph.replay()
            return outputs

        return replay

    return replace(
        contestant,
        name=f"{contestant.name}, CUDA graph",
        prepare=prepare,
        devices=("cuda",),
        sizes=sizes,
        allocates=False,
    )


def auto(prepare: Callable[[Inputs, str], Step]) -> Contestant:
    """Ours as "auto" chooses."""
    return Contestant("auto", lambda inputs: prepare(inputs, "auto"), backend="auto")


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
    return "half a minute a call: it forms all B x N x D differences" if _too_many(inputs, backend, 2**30) else None


def cosine_products(inputs: Inputs, backend: str) -> str | None:
    """`too_slow` of the nearest by cosine: likewise."""
    return "seconds a call: it forms all B x N x D products" if _too_many(inputs, backend, 2**34) else None


def _too_many(inputs: Inputs, backend: str, most: int) -> bool:
    x = inputs["embeddings"]
    columns: Any = inputs.get("centroids", x)
    return backend == "reference" and x.shape[0] * columns.shape[0] * x.shape[1] > most
