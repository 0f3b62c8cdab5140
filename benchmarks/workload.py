"""What the harness is told: workloads, their sizes, and the implementations that compute them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]
Outputs = dict[str, Tensor]
Step = Callable[[], Outputs]

BASELINE = "eager"
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Size:
    """A size of a workload; `shape` gives it in the order of the workload's `symbols`. `make` makes the inputs on the
    generator's device."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[torch.dtype, torch.Generator], Inputs]
    large: bool = False  # minutes or gigabytes: measured with --large only
    products: int = 0  # B x N x D of the similarities
    multiply_adds: int | None = None  # of one call, forward and backward
    devices: tuple[str, ...] = DEVICES  # where it is measured
    dtypes: tuple[torch.dtype, ...] | None = None  # instead of the workload's

    @property
    def text(self) -> str:
        return " x ".join(map(str, self.shape))


@dataclass(frozen=True)
class Implementation:
    """One way to compute a workload."""

    name: str
    prepare: Callable[[Inputs], Step]  # set-up that is not timed; the step that it returns is
    note: str = ""  # what it does beyond the others, or leaves out
    changes: Inputs = field(default_factory=dict)  # inputs that it cannot take as they are; its check takes them, too
    backend: str | None = None  # ours: the backend
    refuses: Callable[[Inputs], str | None] = lambda inputs: None
    devices: tuple[str, ...] = DEVICES  # where it takes part
    sizes: tuple[str, ...] | None = None  # names of the sizes that it takes part in; None: all
    most_products: int | None = None  # B x N x D beyond which it takes seconds a call, and is not measured
    lower_bound: bool = False  # of the time: it computes less than the workload, so nothing checks what it returns
    allocates: bool = True  # False: its memory was taken before the call, so there is no figure for it

    def step(self, inputs: Inputs) -> Step:
        return self.prepare(inputs | self.changes)


# In what an implementation's outputs are not those of the inputs that the check was made for, one line a fault.
Check = Callable[[Implementation, Outputs], list[str]]


@dataclass(frozen=True)
class Workload:
    """Something to compute, who computes it, and the correctness check; `symbols` names the numbers of a size."""

    name: str
    title: str
    symbols: str
    sizes: tuple[Size, ...]
    implementations: tuple[Implementation, ...]
    check: Callable[[Inputs], Check]
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)

    @property
    def baseline(self) -> str:
        peers = [i.name for i in self.implementations if i.backend is None]
        return BASELINE if BASELINE in peers else next(iter(peers), "reference")

    def implementation(self, name: str) -> Implementation:
        return next(i for i in self.implementations if i.name == name)


@dataclass(frozen=True)
class Row:
    """A workload at one size in one dtype."""

    workload: Workload
    size: Size
    dtype: torch.dtype
    device: str = "cpu"

    @property
    def id(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return "-".join((self.workload.name, self.size.name, self.size.text.replace(" ", ""), dtype))

    @property
    def implementations(self) -> tuple[Implementation, ...]:
        """Those of the workload that take part."""
        everyone = (i for i in self.workload.implementations if self.device in i.devices)
        return tuple(i for i in everyone if i.sizes is None or self.size.name in i.sizes)

    def refusal(self, implementation: Implementation, inputs: Inputs) -> str | None:
        """Why the implementation is not measured at this row, or None."""
        if implementation.most_products is not None and self.size.products > implementation.most_products:
            return "seconds a call: it forms all B x N x D products"
        return implementation.refuses(inputs)

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
    def rows(self) -> tuple[Row, ...]:
        return tuple(rows((self.workload,), "cpu"))


def rows(workloads: tuple[Workload, ...], device: str) -> Iterator[Row]:
    for workload in workloads:
        for size in workload.sizes:
            if device in size.devices:
                for dtype in size.dtypes or workload.dtypes:
                    yield Row(workload, size, dtype, device)
