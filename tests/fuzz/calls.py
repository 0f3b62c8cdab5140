"""Calls of public functions and modules: what they are, how they are drawn, and what comes of them."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_margins import CrossBatchMemory, MagnetIndex, functional, losses, mining
from fused_margins.clustering import MagnetBatch, kmeans_per_class
from tests.ops.suite.hostile import bad_values

from . import truth
from .draws import COUNTS, Draws

FUNCTIONS = [getattr(place, n) for place in (functional, mining) for n in place.__all__ if n.islower()]
MODULES = [getattr(losses, n) for n in losses.__all__]
EASY = [m for m in MODULES if issubclass(m, losses.easy_positive.EasyPositiveLoss)]


def case(seed: int, number: int) -> str | None:
    call, sound = draw(Draws(f"calls {seed} {number}"))
    found = truth.judge(call, sound)
    return f"{found}\n  {call}" if found else None


class Call(NamedTuple):
    """A function, or a module (what makes it, and its methods in turn), and arguments by name."""

    target: Any
    settings: dict[str, Any]
    steps: list[tuple[str, dict[str, Any]]]
    dtype: torch.dtype
    seed: int

    def map(self, change: Callable[[str, Any], Any], dtype: torch.dtype | None = None) -> "Call":
        """The call with other arguments: change(name, value) of each."""

        def of_all(kwargs: dict[str, Any]) -> dict[str, Any]:
            return {n: change(n, v) for n, v in kwargs.items()}

        steps = [(method, of_all(kwargs)) for method, kwargs in self.steps]
        return self._replace(settings=of_all(self.settings), steps=steps, dtype=dtype or self.dtype)

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
        loss = d.random.choice(EASY)
        settings = arguments(target, "loss")
        settings["loss"] = call._replace(target=loss, settings=arguments(loss, "num_classes"))
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
            value = kwargs[name]
            values = ["1", 2.5, [1], -1, True, 10**30]
            values += [] if isinstance(value, Tensor) and not is_plain(value) else bad_values(value)
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
    if gradients and connected and variables:
        outputs += torch.autograd.grad(sum(connected), variables, allow_unused=True, materialize_grads=True)
    return [t.detach() for t in outputs]


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, MagnetIndex):
        value = value.centroids, value.variance
    if isinstance(value, MagnetBatch):
        return []  # drawn: whatever it is, it is one of many
    return [value] if isinstance(value, Tensor) else list(value)
