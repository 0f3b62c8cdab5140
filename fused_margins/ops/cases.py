"""Cases, and the one rule by which a backend agrees with the definition: read by tests, benchmarks and doctor.

Every op has a ``cases.py`` with the names in `OpCases`. A backend agrees where, for every output and gradient,

    max |backend - truth|  <=  max |reference in the same dtype - truth|  +  small term

with truth the reference in float64 on the inputs rounded to the dtype; the small term is what the op's ``small_term``
states, plus one rounding of the largest value. Infinities and integers agree when they are equal. A backend
that says so (`registry.Backend.weight_error`) is granted the rounding of the derivatives of similarities, too.
"""

import functools
import importlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Generator, Tensor

from ..backends import registry
from ..core.enums import Relation, Similarity
from ..core.indices import UNADMITTED
from ..core.similarity import accumulation_dtype

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """Keyword arguments of an op: float64 tensors, integers and plain options, and why they are worth a test."""

    name: str
    make: Callable[[Generator], Inputs]
    reason: str
    exact: bool = False  # built of numbers that every dtype represents: choices among them must be equal, too
    smooth: bool = True  # finite differences approach the gradient


def variants(
    name: str, make: Callable[..., Inputs], reason: str, *, exact: bool = False, **choices: tuple[Any, ...]
) -> tuple[Case, ...]:
    """A case for every combination of these options of `make`, which `name` has in braces."""
    options = [dict(zip(choices, values)) for values in itertools.product(*choices.values())]
    return tuple(Case(name.format(**chosen), partial(make, **chosen), reason, exact) for chosen in options)


@dataclass(frozen=True)
class Shape:
    """A problem to measure: B rows x N columns of width D."""

    name: str
    rows: int
    columns: int
    width: int


class OpCases(Protocol):
    """The names in every op's ``cases.py``."""

    CASES: tuple[Case, ...]
    SHAPES: tuple[Shape, ...]
    DIFFERENTIABLE: tuple[str, ...]

    def run(self, inputs: Inputs, backend: str) -> dict[str, Tensor]:
        """The op's outputs by name."""

    def observed(self, outputs: dict[str, Tensor], inputs: Inputs, exact: bool) -> dict[str, Tensor]:
        """What of the outputs is compared; `inputs` in float64."""

    def small_term(self, name: str, inputs: Inputs, dtype: torch.dtype, of_weights: float = 0.0) -> float:
        """Error granted to an output, or to grad_<input> under incoming gradients of at most 1; `inputs` in float64.

        of_weights: relative error granted to each derivative of a similarity before it is summed up.
        """

    def make_benchmark(self, shape: Shape, dtype: torch.dtype, generator: Generator) -> Inputs:
        """Inputs of a shape, on the generator's device."""

    def multiply_adds(self, shape: Shape) -> int:
        """Of forward and backward together."""


def run_by_name(op: Any) -> Callable[[Inputs, str], dict[str, Tensor]]:
    """`OpCases.run` of an op. One that gives a single output of several gives the last."""
    names = list(op.results)

    def run(inputs: Inputs, backend: str) -> dict[str, Tensor]:
        results = op(**inputs, backend=backend)
        return {names[-1]: results} if isinstance(results, Tensor) else dict(zip(names, results))

    return run


def as_they_are(outputs: dict[str, Tensor], inputs: Inputs, exact: bool) -> dict[str, Tensor]:
    """`OpCases.observed` of an op whose outputs are numbers."""
    return outputs


def similarity_of(inputs: Inputs) -> Similarity:
    """The similarity that inputs name, or the one that ops take without a word."""
    return Similarity[inputs.get("similarity", "cosine").upper()]


def relation_of(inputs: Inputs, default: str) -> Relation:
    """The relation that inputs name, or an op's default."""
    return Relation[inputs.get("relation", default).upper()]


def largest(t: Tensor) -> float:
    """Largest absolute value; 0 for an empty tensor."""
    return float(t.abs().max()) if t.numel() else 0.0


def reach(x: Tensor, y: Tensor, similarity: Similarity) -> tuple[float, tuple[float, float]]:
    """The largest |u| that the two sides allow, and the largest |du/dx| and |du/dy|: what rounding errors grow with."""
    if similarity == Similarity.NEGATIVE_SQUARED_EUCLIDEAN and y.shape[0]:
        x, y = x - y.mean(0), y - y.mean(0)  # as the definition does before it expands the square
    lengths = x.norm(dim=1), y.norm(dim=1)
    longest_x, longest_y = map(largest, lengths)
    if similarity == Similarity.COSINE:
        of_x, of_y = (1 / float(n[n > 0].min()) if (n > 0).any() else 0.0 for n in lengths)
        return 1.0, (of_x, of_y)
    if similarity == Similarity.DOT:
        return longest_x * longest_y, (longest_y, longest_x)
    distance = longest_x + longest_y
    return distance**2, (2 * distance, 2 * distance)


def load(op: str) -> OpCases:
    """The cases of an op in `registry.OPS`."""
    return cast(OpCases, importlib.import_module(f"{registry.OPS[op].package}.cases"))


def convert(inputs: Inputs, dtype: torch.dtype, device: str = "cpu") -> Inputs:
    """x and y in `dtype`, other floating tensors in its accumulation dtype; strides and shared tensors stay."""
    converted: dict[int, Tensor] = {}

    def one(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in converted:
            wanted = dtype if name in ("x", "y") else accumulation_dtype(dtype)
            # The whole storage is converted and viewed again: Tensor.to alone would make it contiguous.
            storage = value.as_strided((value.untyped_storage().nbytes() // value.element_size(),), (1,), 0)
            storage = storage.to(device, wanted if value.is_floating_point() else value.dtype)
            converted[id(value)] = storage.as_strided(value.shape, value.stride(), value.storage_offset())
        return converted[id(value)]

    return {name: one(name, value) for name, value in inputs.items()}


def evaluate(op: OpCases, inputs: Inputs, backend: str, gradients: bool = True) -> dict[str, Tensor]:
    """The outputs, and grad_<input> of every differentiable input, under random incoming gradients of at most 1."""
    names = [n for n in op.DIFFERENTIABLE if isinstance(inputs.get(n), Tensor)]
    if not (gradients and names):
        return op.run(inputs, backend)
    leaf_of = {id(inputs[n]): inputs[n].detach().requires_grad_() for n in names}  # x and y may be one tensor
    leaves = {n: leaf_of[id(inputs[n])] for n in names}
    outputs = op.run(inputs | leaves, backend)
    connected = [t for t in outputs.values() if t.requires_grad]
    generator = torch.Generator().manual_seed(0)
    # Multiples of 1/64 are the same in every dtype; some of them are 0.
    incoming = [torch.randint(-64, 65, t.shape, generator=generator).to(t) / 64 for t in connected]
    grads = torch.autograd.grad(connected, list(leaves.values()), incoming, materialize_grads=True)
    return {n: t.detach() for n, t in outputs.items()} | {f"grad_{n}": g for n, g in zip(names, grads)}


class Expected:
    """What the definition makes of inputs that are rounded to a dtype, and how far from it a backend may be."""

    def __init__(
        self,
        op: OpCases,
        inputs: Inputs,
        dtype: torch.dtype,
        *,
        exact: bool = False,
        gradients: bool = True,
        device: str = "cpu",
    ) -> None:
        self.op, self.dtype, self.exact, self.gradients = op, dtype, exact, gradients
        self.rounded = convert(inputs, dtype, device)
        self.exactly = convert(self.rounded, torch.float64, device)
        self.reference = evaluate(op, self.rounded, "reference", gradients)
        truth = evaluate(op, self.exactly, "reference", gradients)
        self.seen, self.truth = (op.observed(values, self.exactly, exact) for values in (self.reference, truth))
        self.granted = functools.cache(self._granted)

    def disagreements(self, backend: str) -> list[str]:
        """One line for every output and gradient in which `backend` breaks the rule; an empty list is agreement."""
        results = evaluate(self.op, self.rounded, backend, self.gradients)
        lines = [
            f"{name}: expected {tuple(r.shape)} of {r.dtype}, got {tuple(b.shape)} of {b.dtype}"
            for name, r in self.reference.items()
            if (b := results[name]).shape != r.shape or b.dtype != r.dtype
        ]
        if lines:
            return lines
        of_weights = next(b.weight_error(self.dtype) for b in registry.BACKENDS if b.name == backend)
        seen = self.op.observed(results, self.exactly, self.exact)
        for name, truth in self.truth.items():
            got = seen[name]
            if not truth.is_floating_point():
                if not torch.equal(got, truth):
                    lines.append(f"{name}: {int((got != truth).sum())} of {truth.numel()} entries differ")
                continue
            special = self.special(name)
            if not torch.allclose(got[special], truth.to(got.dtype)[special], equal_nan=True):
                lines.append(f"{name}: infinities differ")
            error, granted = largest((got - truth)[~special]), self.granted(name, of_weights)
            if not error <= granted:
                lines.append(f"{name}: error {error:.3g}, granted {granted:.3g}")
        return lines

    def special(self, name: str) -> Tensor:
        """Which entries are no finite numbers; one beyond the range of its dtype is an infinity there."""
        return ~self.truth[name].to(self.seen[name].dtype).isfinite()

    def _granted(self, name: str, of_weights: float) -> float:
        special, reference, truth = self.special(name), self.seen[name], self.truth[name]
        info = torch.finfo(reference.dtype)
        rounding = info.eps * max(largest(truth[~special]), info.tiny)
        small_term = self.op.small_term(name, self.exactly, self.dtype, of_weights)
        return largest((reference - truth)[~special]) + small_term + rounding


def disagreements(op: OpCases, inputs: Inputs, backend: str, dtype: torch.dtype, **options: Any) -> list[str]:
    """Those of one backend with what is `Expected`, which takes the options."""
    return Expected(op, inputs, dtype, **options).disagreements(backend)


# What cases are made of.

EVERY: dict[str, Any] = {"similarity": Similarity.names(), "relation": Relation.names()}
ALIGNED = "16-bit vectors at multiples of 16 bytes, which a GPU's copy engine fetches"  # a reason of many ops


def randn(g: Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def randint(g: Generator, high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=g)


def labels(g: Generator, rows: int, columns: int, classes: int) -> Inputs:
    return {"row_labels": randint(g, classes, rows), "column_labels": randint(g, classes, columns)}


def strided(g: Generator) -> tuple[Tensor, Tensor]:
    """37 rows and 53 columns of width 20: every second number; transposed with an offset."""
    return randn(g, 37, 40)[:, 1::2], randn(g, 20, 60).T[5:58]


def poles(g: Generator) -> Inputs:
    """Rows and columns on the axes, of lengths 1, 2 and 4: every cosine is exactly -1, 0 or 1."""
    axes = torch.cat([torch.eye(7), -torch.eye(7)]).double()
    lengths = 2.0 ** randint(g, 3, 14, 1)
    return {"x": axes * lengths, "y": axes.flip(0) * lengths}


def with_itself(inputs: Inputs) -> Inputs:
    """The rows on both sides; no row chooses itself."""
    rows = torch.arange(inputs["x"].shape[0])
    return inputs | {"y": inputs["x"], "column_labels": inputs["row_labels"], "self_index": rows}


def moved(inputs: Inputs, offset: float) -> Inputs:
    """Far from the origin, where expanded distances cancel."""
    return inputs | {n: inputs[n] + offset for n in ("x", "y") if n in inputs}


def zero_rows(inputs: Inputs) -> Inputs:
    inputs["x"][::3] = 0
    inputs["y"][::4] = 0
    return inputs


def not_numbers(inputs: Inputs) -> Inputs:
    inputs["x"][3] = torch.nan
    inputs["y"][5, 0] = torch.nan
    inputs["y"][7, 1] = torch.inf
    return inputs


def ignored(inputs: Inputs, every: int) -> Inputs:
    inputs["target"][::every] = inputs["ignore_index"]
    return inputs


def unadmitted(inputs: Inputs) -> Inputs:
    inputs["column_labels"][::3] = UNADMITTED
    inputs["row_labels"][::7] = UNADMITTED
    return inputs


def of_32_bits(inputs: Inputs) -> Inputs:
    """Labels of a narrower dtype."""
    return {n: t.int() if n.endswith(("labels", "target", "clusters")) else t for n, t in inputs.items()}


def of_64_bits(inputs: Inputs) -> Inputs:
    """Labels that 32 bits do not hold, some negative."""
    return {n: t * 2**40 - 2**41 if n.endswith("labels") else t for n, t in inputs.items()}


CLASSIFIERS = (
    Shape("few_shot_64", 256, 64, 64),
    Shape("few_shot_512", 256, 64, 512),
    Shape("few_shot_200", 256, 200, 1600),
    Shape("classes_10000", 128, 10_000, 512),
)
SAMPLES_PER_CLASS = 4  # as in a metric-learning batch


def classifier_benchmark(shape: Shape, dtype: torch.dtype, generator: Generator) -> Inputs:
    """Rows against classes."""

    def random(rows: int) -> Tensor:
        return torch.randn(rows, shape.width, generator=generator, device=generator.device).to(dtype)

    target = torch.randint(shape.columns, (shape.rows,), generator=generator, device=generator.device)
    return {"x": random(shape.rows), "y": random(shape.columns), "target": target, "scale": 30.0}


def batch_benchmark(shape: Shape, dtype: torch.dtype, generator: Generator) -> Inputs:
    """A batch against itself."""
    x = torch.randn(shape.rows, shape.width, generator=generator, device=generator.device).to(dtype)
    rows = torch.arange(shape.rows, device=generator.device)
    of_class = rows // SAMPLES_PER_CLASS
    return {"x": x, "y": x, "row_labels": of_class, "column_labels": of_class, "self_index": rows}
