"""Calls of public functions and modules: each is right against float64, or its error names an argument of the call.

The truth is the reference on the same inputs in float64, numbers in it handed over as tensors where a tensor may stand:
that goes another way through the library. It is granted what the reference errs in the same dtype, and what roundings of
the inputs make of it. Two more rules know nothing of the implementation: a loss that depends on a value is not finite
where that value is not, and what a miner finds is of the class that it says.
"""

import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_margins import CrossBatchMemory, MagnetIndex, functional, losses, mining
from fused_margins.backends import registry
from fused_margins.clustering import MagnetBatch, kmeans_per_class
from fused_margins.core.enums import Relation
from fused_margins.core.similarity import accumulation_dtype, admitted, pair_similarity
from fused_margins.ops.cases import largest, reach, similarity_of
from tests.ops.suite.hostile import bad_values

from .draws import COUNTS, Draws

FUNCTIONS = [getattr(place, n) for place in (functional, mining) for n in place.__all__ if n.islower()]
MODULES = [getattr(losses, n) for n in losses.__all__]
DOCUMENTED = re.compile(  # the last two are torch's, of sizes that no memory has
    r"is not fitted|^backend '\w+' cannot run|were lost|can't allocate memory|Storage size calculation overflowed"
)


class Call(NamedTuple):
    """A function, or a module (what makes it, and its methods in turn), and arguments by name."""

    target: Any
    settings: dict[str, Any]
    steps: list[tuple[str, dict[str, Any]]]
    dtype: torch.dtype
    seed: int

    def map(self, change: Callable[[str, Any], Any], dtype: torch.dtype | None = None) -> "Call":
        changed = [{n: change(n, v) for n, v in kwargs.items()} for kwargs in (self.settings, *(k for _, k in self.steps))]
        return self._replace(
            settings=changed[0], steps=[(m, k) for (m, _), k in zip(self.steps, changed[1:])], dtype=dtype or self.dtype
        )

    def __str__(self) -> str:
        def short(v: Any) -> str:
            if not isinstance(v, Tensor):
                return repr(v)
            if not is_plain(v):
                kind = "nested" if v.is_nested else f"{v.layout} on {v.device} {tuple(v.shape)}"
                return f"{v.dtype} {kind}"
            return f"{v.dtype} {tuple(v.shape)} {v.flatten().tolist() if v.numel() < 60 else ''}"

        def listed(kwargs: dict[str, Any]) -> str:
            return ", ".join(f"{n}={short(v)}" for n, v in kwargs.items())

        return f"{self.target.__name__}({listed(self.settings)})" + "".join(f".{m}({listed(k)})" for m, k in self.steps)


def case(seed: int, number: int) -> str | None:
    call, sound = draw(Draws(f"calls {seed} {number}"))
    found = judge(call, sound)
    return f"{found}\n  {call}" if found else None


def is_plain(t: Tensor) -> bool:
    """Whether it has neighbours."""
    numbers = t.dtype != torch.bool and not t.is_complex()
    return numbers and t.layout == torch.strided and not (t.is_nested or t.is_meta or t._is_zerotensor())


def parameters(function: Any) -> dict[str, inspect.Parameter]:
    """Those of a constructor that passes others on are also those of the class it passes them to."""
    found = dict(inspect.signature(function).parameters)
    if inspect.isclass(function) and any(p.kind == p.VAR_KEYWORD for p in found.values()):
        found = parameters(function.__mro__[1]) | found
    return {n: p for n, p in found.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}


def draw(d: Draws) -> tuple[Call, bool]:
    """A call, and whether it is as its author meant it."""

    def arguments(function: Any, *given: str, optional: float = 0.25) -> dict[str, Any]:
        chosen = {n: p for n, p in parameters(function).items() if n != "self" and n not in given}
        return {n: d.value(n) for n, p in chosen.items() if p.default is p.empty or d.often(optional)}

    target = d.random.choice([*FUNCTIONS, *FUNCTIONS, *MODULES, kmeans_per_class, MagnetIndex])
    call = Call(target, {}, [], d.dtype, d.random.getrandbits(32))
    if target is CrossBatchMemory:
        loss = d.random.choice([m for m in MODULES if issubclass(m, losses.easy_positive.EasyPositiveLoss)])
        settings = {"loss": Call(loss, arguments(loss, "num_classes"), [], d.dtype, call.seed), **arguments(target, "loss")}
        call = call._replace(settings=settings, steps=[("forward", arguments(target.forward)) for _ in range(2)])
    elif target is MagnetIndex:
        then = d.random.choice(["sample_batch", "knc_scores", "knc_predict"])
        steps = [("fit", arguments(target.fit)), (then, arguments(getattr(target, then)))]
        call = call._replace(settings=arguments(target), steps=steps[d.often(0.05) :])
    elif target in MODULES:
        call = call._replace(settings=arguments(target), steps=[("forward", arguments(target.forward))])
    else:
        call = call._replace(steps=[("__call__", arguments(target))])
    if d.sound:
        return call, True
    if d.often(0.05):
        return call.map(lambda n, v: v.to("meta") if isinstance(v, Tensor) else v), False
    places = [kwargs for kwargs in (call.settings, *(k for _, k in call.steps)) if kwargs]
    for _ in range(d.random.choice((1, 1, 2)) if places else 0):
        kwargs = d.random.choice(places)
        name = d.random.choice([n for n in kwargs if n != "loss"] or [None])
        if name is not None:
            neighbours = [] if isinstance(kwargs[name], Tensor) and not is_plain(kwargs[name]) else bad_values(kwargs[name])
            values = [*neighbours, "1", 2.5, [1], -1, True, 10**30]
            if name in COUNTS:  # what is asked for is done, however long it takes
                values = [v for v in values if not isinstance(v, int) or v < 100]
            kwargs[name] = d.random.choice(values)
    return call, False


def execute(call: Call, gradients: bool = True) -> list[Tensor]:
    """All outputs, and the gradients of the sum of those that have one."""
    torch.manual_seed(call.seed)
    target = call.target
    given: dict[int, Tensor] = {}

    def ready(n: str, v: Any) -> Any:
        if isinstance(v, Call):
            return make(v)
        if n == "generator" and type(v) is int:
            return torch.Generator().manual_seed(v % 2**63)
        if gradients and isinstance(v, Tensor) and v.is_floating_point() and not hasattr(v, "of_number"):
            given[id(v)] = v = v.detach().requires_grad_()
        return v

    def make(c: Call) -> Any:
        module = c.target(**{n: ready(n, v) for n, v in c.settings.items()})
        return module.to(call.dtype)

    outputs: list[Tensor] = []
    function = make(call) if isinstance(target, type) else target
    for method, kwargs in call.steps:
        outputs += flat(getattr(function, method)(**{n: ready(n, v) for n, v in kwargs.items()}))
    variables = [*given.values(), *(function.parameters() if isinstance(function, nn.Module) else ())]
    connected = [t.double().sum() for t in outputs if t.requires_grad]
    if connected and variables:
        outputs += torch.autograd.grad(sum(connected), variables, allow_unused=True, materialize_grads=True)
    return [t.detach() for t in outputs]


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, MagnetIndex):
        value = value.centroids, value.variance
    if isinstance(value, MagnetBatch):
        return []  # drawn: whatever it is, it is one of many
    return [value] if isinstance(value, Tensor) else list(value)


def in_float64(call: Call) -> Call:
    """By the reference, and a number as a tensor where that may be."""

    def change(name: str, value: Any) -> Any:
        if isinstance(value, Call):
            return in_float64(value)
        if name == "backend" and value in ("auto", "cpu"):
            return "reference"
        if name in ("scale", "margin") and type(value) is float and not isinstance(call.target, type):
            t = torch.tensor(value, dtype=torch.float64)
            t.of_number = True  # type: ignore[attr-defined]  # nobody asks for its gradient
            return t
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return with_backend(call).map(change, torch.float64)


def with_backend(call: Call, backend: str = "reference") -> Call:
    """The backend said where it can be and is not."""

    def said(function: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        kwargs = {n: with_backend(v) if isinstance(v, Call) else v for n, v in kwargs.items()}
        takes = "backend" in parameters(function) and kwargs.get("backend", "auto") in ("auto", "cpu")
        return kwargs | {"backend": backend} if takes else kwargs

    if isinstance(call.target, type):
        return call._replace(settings=said(call.target, call.settings))
    return call._replace(steps=[(m, said(call.target, kwargs)) for m, kwargs in call.steps])


def rounded(call: Call, seed: int, eps: float) -> Call:
    """Every matrix as some roundings leave it."""
    g = torch.Generator().manual_seed(seed)

    def change(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() != 2 or value.is_nested:
            return value
        return value * (1 + 4 * eps * torch.randn(value.shape, generator=g, dtype=torch.float64))

    return call.map(change)


def judge(call: Call, sound: bool) -> str | None:
    try:
        got = execute(call)
    except Exception as error:
        return refused(call, sound, error)
    if any(t.is_meta for t in got):
        return None
    try:
        truth = execute(in_float64(call))
    except Exception as error:
        return f"returned, where the truth raises {type(error).__name__}: {error}"
    if is_extreme(call) and not cosines(call):
        return hides(call, got) or finds_others(call, got)
    return differs(call, got, truth) or hides(call, got) or finds_others(call, got)


def refused(call: Call, sound: bool, error: Exception) -> str | None:
    """What is wrong with an error."""
    if "got multiple values for keyword argument" in str(error):
        return None  # Python's own, and it names one
    names = {"loss", "the memory", "weight", "labels"}  # which a module holds, or calls an argument
    functions = [call.target, *(getattr(call.target, m) for m, _ in call.steps if isinstance(call.target, type))]
    functions += [v.target for v in call.settings.values() if isinstance(v, Call)]
    for function in functions:
        names |= parameters(function).keys()
    words = re.split(r", | and ", str(error).partition(":")[0])
    named = isinstance(error, TypeError | ValueError | IndexError) and ":" in str(error) and names.issuperset(words)
    if not named and not (type(error) is RuntimeError and DOCUMENTED.search(str(error))):
        return f"{type(error).__name__} that names no argument: {str(error)[:300]}"
    if sound and named:
        try:
            execute(with_backend(call))
        except Exception as other:
            return refused(call, False, other)
        return f"refused, which the reference is not: {error!r}"
    return None


def differs(call: Call, got: list[Tensor], truth: list[Tensor]) -> str | None:
    """Where an output or a gradient is not what it should be."""
    if [t.shape for t in got] != [t.shape for t in truth]:
        return f"shapes {[tuple(t.shape) for t in got]}, expected {[tuple(t.shape) for t in truth]}"
    kwargs = call.steps[-1][1]
    if call.target is not kmeans_per_class and "embeddings" in kwargs and not got[-1].is_floating_point():
        got, truth = by_similarity(kwargs, got), by_similarity(kwargs, truth)
    if all(torch.equal(g.double(), t.to(g.dtype).double()) for g, t in zip(got, truth)):
        return None
    same, nearby = execute(with_backend(call)), []
    of_weights = max(b.weight_error(call.dtype) for b in registry.BACKENDS)
    eps = torch.finfo(accumulation_dtype(call.dtype)).eps
    for s in range(8):
        nearby.append(execute(rounded(in_float64(call), s, max(eps, of_weights) if s % 2 else eps)))
    nearby = [o for o in nearby if [t.shape for t in o] == [t.shape for t in truth]]
    num_outputs = len(execute(call, False))
    for i, (g, t) in enumerate(zip(got, truth)):
        g64, t64, r = g.double(), t.to(g.dtype).double(), same[i].double()
        others = [o[i].double() for o in nearby]
        what = f"{f'output {i}' if i < num_outputs else f'gradient {i - num_outputs}'}: {g.tolist()}, expected {t.tolist()}"[:800]
        if not g.is_floating_point():
            settled = torch.stack([o == t64 for o in others]).all(0) if others else torch.zeros_like(g, dtype=torch.bool)
            if bool((settled & (g64 != t64)).any()):
                return f"another choice, {what}"
            continue
        infinite = torch.stack([~o.isfinite() for o in (t64, *others)])
        if bool((infinite.all(0) & g64.isfinite()).any()):
            return f"finite where the truth is not, {what}"
        if i == num_outputs - 1 and not all(bool(o.isfinite().all()) for o in (*truth, *got[:num_outputs])):
            return None  # said loud enough; gradients of such a loss are nobody's
        if bool((~infinite.any(0) & r.isfinite() & ~g64.isfinite()).any()):
            return f"not finite where truth and reference are, {what}"
        fine = t64.isfinite() & g64.isfinite()
        error, info = largest((g64 - t64)[fine]), torch.finfo(g.dtype)
        granted = 4 * largest((r - t64)[fine].nan_to_num(torch.inf)) + 4 * info.eps * largest(t64[fine]) + info.tiny
        granted += 4 * max((largest((o - t64)[fine].nan_to_num(torch.inf)) for o in others), default=torch.inf)
        granted += floor(call, eps)
        if not error <= granted:
            return f"error {error:.3g}, granted {granted:.3g}, {what}"
        if is_extreme(call):
            return None
    return None


def cosines(call: Call) -> bool:
    """Whether lengths do not matter."""
    euclidean = ("magnet", "Magnet", "kmeans", "cluster")
    similarity = (call.settings | call.steps[-1][1]).get("similarity", "cosine")
    return similarity == "cosine" and not any(word in call.target.__name__ for word in euclidean)


def is_extreme(call: Call) -> bool:
    """Whether derivatives of similarities, or squares, leave the range of float32."""
    for _, kwargs in call.steps:
        for t in kwargs.values():
            if isinstance(t, Tensor) and t.is_floating_point() and t.numel():
                size = t.double().abs()
                if bool(((size > 0) & (size < 1e-15) | (size > 1e15)).any()):
                    return True
    return False


def floor(call: Call, eps: float) -> float:
    """Roundings of a similarity, and of its derivative, that may cancel in the truth."""
    kwargs = call.settings | call.steps[-1][1]
    x = kwargs.get("embeddings")
    if x is None:
        return 0.0
    y = next((kwargs[n] for n in ("weight", "reference_embeddings", "centroids") if kwargs.get(n) is not None), x)
    x, y = (t.double().nan_to_num(0.0, 0.0, 0.0) for t in (x, y))
    size, factors = reach(x, y, similarity_of(kwargs))
    scale = max(1.0, largest(torch.as_tensor(kwargs.get("scale", 64.0)).double().nan_to_num()))
    return 8 * eps * (1 + scale * size) * max(1.0, *factors) * scale * max(1, len(x), len(y))


def by_similarity(kwargs: dict[str, Any], outputs: list[Tensor]) -> list[Tensor]:
    """A choice among embeddings counts by its similarity."""
    *rest, index = outputs
    x, y = kwargs["embeddings"].double(), kwargs.get("reference_embeddings")
    y = x if y is None else y.double()
    if not y.shape[0] or index.dim() != 1 or len(index) != len(x):
        return outputs
    u = pair_similarity(x, y[index.clamp(0, len(y) - 1)], similarity_of(kwargs))
    return [*rest, torch.where(index == -1, -torch.inf, u).to(accumulation_dtype(kwargs["embeddings"].dtype))]


def hides(call: Call, got: list[Tensor]) -> str | None:
    """What is not finite, and whether a loss that depends on it says so."""
    method, kwargs = call.steps[0]
    x = kwargs.get("embeddings")
    if "loss" not in call.target.__name__.lower() or not isinstance(x, Tensor) or bool(x.isfinite().all()):
        return None
    outcomes = []
    for s in range(2):
        g = torch.Generator().manual_seed(s)
        finite = torch.where(x.isfinite(), x.double(), torch.randn(x.shape, generator=g, dtype=torch.float64)).to(x.dtype)
        outcomes.append(execute(in_float64(call._replace(steps=[(method, kwargs | {"embeddings": finite})])), False)[0])
    depends = (outcomes[0] != outcomes[1]) & outcomes[0].isfinite() & outcomes[1].isfinite()
    return f"finite, but depends on what is not: {got[0].tolist()}" if bool((depends & got[0].isfinite()).any()) else None


def finds_others(call: Call, got: list[Tensor]) -> str | None:
    """Whether a miner's columns are open to its rows, and whether it finds one where there is one."""
    if getattr(mining, call.target.__name__, None) is not call.target:
        return None
    kwargs = call.steps[0][1]
    labels, others, itself = kwargs["labels"], kwargs.get("reference_labels"), kwargs.get("self_index")
    if others is None:
        others, itself = labels, torch.arange(len(labels)) if itself is None else itself
    relation = Relation.SAME if "positive" in call.target.__name__ else Relation.DIFFERENT
    mask = admitted(labels.long(), others.long(), relation, itself)
    if call.target is mining.all_positives:
        right = torch.equal(mask.nonzero().T, torch.stack(got))
        return None if right else f"pairs {torch.stack(got).tolist()}, expected {mask.nonzero().T.tolist()}"
    index = got[-1]
    if not len(others):
        return None if bool((index == -1).all()) else f"found {index.tolist()} among none"
    fine = (index == -1) | mask.gather(1, index.clamp(0, len(others) - 1)[:, None])[:, 0]
    if "embeddings" not in kwargs:
        fine &= (index == -1) == ~mask.any(1)
    return None if bool(fine.all()) else f"found {index.tolist()}, admitted {mask.int().tolist()}"

