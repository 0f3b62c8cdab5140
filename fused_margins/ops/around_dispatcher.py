"""Around torch's dispatcher: where calls went before, and the autograd Function that calls a kernel module at once.

The dispatcher, and a Function that torch.func understands, cost as much as a small problem. A call like one before (of
the same types, sizes, devices, options and state of autograd) is neither checked nor routed again. Values of tensors
are no part of that: kernels look at them at every call.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..backends import epoch, registry

if TYPE_CHECKING:
    from .op import Op

MOST_ROUTES = 256  # of an op, that are remembered
_PLAIN = (Tensor, torch.nn.Parameter)
_is_batched = torch._C._functorch.is_legacy_batchedtensor  # of autograd's batched gradients, which no stack shows
_func_transform = torch._C._functorch.peek_interpreter_stack
_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_tracing = torch._C._get_tracing_state
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled


def is_watched() -> bool:
    """Whether compilation, torch.func, forward-mode derivatives, modes or tracing see every call of torch."""
    return (
        torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or _func_transform() is not None
        or _dispatch_modes() > 0
        or _function_modes() > 0
        or _tracing() is not None
    )


def can_bypass_dispatcher(tensors: Sequence[Any]) -> bool:
    """Whether nothing watches these tensors but autograd, so that a kernel may be called around torch's dispatcher.

    Whatever `is_watched` names needs it, and so do batched gradients, subclasses of tensors, zeros without memory, and
    tensors that are negated when they are read (imaginary parts of conjugates); nothing else does.
    """
    if is_watched():
        return False
    for t in tensors:
        if t is None or type(t) is float:
            continue
        if type(t) not in _PLAIN or t.is_neg() or _is_batched(t) or t._is_zerotensor():
            return False
    return True


def only(outputs: Sequence[Tensor | None]) -> Any:
    """Those that are given; one alone as it is."""
    given = tuple([t for t in outputs if t is not None])
    return given[0] if len(given) == 1 else given


def plan_of(kernel: Any, a: Any, needs: tuple[bool, ...]) -> Any:
    """What a kernel module's forward will save; `needs` themselves where it has no choice."""
    plan = getattr(kernel, "plan", None)
    return needs if plan is None else plan(a, needs)


class Route:
    """Where a call goes, and all that is the same in every call like it: no tensor, and no address."""

    def __init__(self, op: Op, a: Any, backend: str, needs: tuple[bool, ...], key: Any) -> None:
        # Callers have the options as they are here: their arguments may be passed on.
        self.as_given = key is not None and key[0] == tuple(map(type, a))
        self.op, self.backend, self.needs = op, backend, needs
        self.kernel = registry.kernel(op.name, backend)
        self.plan = plan_of(self.kernel, a, needs) if op.differentiable else None
        self.tensors = [i for i, value in enumerate(a) if isinstance(value, Tensor)]
        self.rest = [None if isinstance(value, Tensor) else value for value in a]
        self.given = [i for i, out in enumerate(op.results.values()) if out.given(a)]
        self.variables = [i for i, need in zip(op.differentiable, needs) if need]  # that a gradient is wanted of
        self.places = [op.differentiable.index(i) for i in self.variables]

    def __call__(self, a: Any) -> Any:
        """The given outputs, or the only one."""
        if not self.as_given:
            a = self.with_rest([a[i] for i in self.tensors])
        if self.variables:
            return _apply(self, a, *[a[i] for i in self.variables])
        return self.only(self.kernel.forward(a, self.plan))

    def only(self, outputs: Sequence[Any]) -> Any:
        """Those that are given; one alone as it is."""
        given = self.given
        return outputs[given[0]] if len(given) == 1 else tuple([outputs[i] for i in given])

    def with_rest(self, tensors: Sequence[Tensor]) -> Any:
        """The arguments, from their tensors."""
        values = self.rest.copy()
        for i, t in zip(self.tensors, tensors):
            values[i] = t
        return self.op.arguments._make(values)

    def gradients(self, a: Any, grads: Sequence[Tensor | None], saved: Tensor, wanted: Sequence[bool]) -> Any:
        """Of the variables: wanted says which."""
        needs = [False] * len(self.needs)
        of_outputs: list[Tensor | None] = [None] * len(self.op.results)
        for place, want in zip(self.places, wanted):
            needs[place] = want
        for i, grad in zip(self.given, grads):
            of_outputs[i] = grad
        of_outputs = self.op.complete(a, of_outputs)
        # Second derivatives are wanted where a graph is being made of this backward.
        if torch.is_grad_enabled() or not can_bypass_dispatcher(grads):
            results = self.op.gradients(a, of_outputs, saved, self.needs, needs, self.backend)
        else:
            results = self.kernel.backward(of_outputs, a, saved, self.plan, needs)
        return [results[place] for place in self.places]


class Routes:
    """Where an op's calls went, by all that checks and routing look at."""

    def __init__(self, fields: Sequence[str]) -> None:
        self._fields = fields
        self._of_key: dict[Any, Route] = {}
        self._describers: dict[Any, tuple[list[int] | None, Callable[[Any], Any]]] = {}

    def find(self, a: Any, backend: str) -> tuple[Any, Route | None]:
        """A call's key, and where calls of this key went before; None for what there is not."""
        key = self._key(a, backend)
        try:
            return key, self._of_key.get(key)
        except TypeError:  # of a value without a hash, which is no option
            return None, None

    def remember(self, key: Any, route: Route) -> Route:
        """The route, found from now on; without a key only returned."""
        if key is not None:
            if len(self._of_key) >= MOST_ROUTES:
                self._of_key.clear()
            self._of_key[key] = route
        return route

    def _key(self, a: Any, backend: str) -> Any:
        """All that checks and routing look at; None where this call cannot be like another, or something watches it."""
        if is_watched() or _is_any_autocast_enabled():
            return None
        kinds = tuple([value.__class__ for value in a])
        found = self._describers.get(kinds)
        if found is None:
            found = self._describers[kinds] = self._describer(kinds)
        tensors, describe = found
        if tensors is None:
            return None
        for i in tensors:
            t = a[i]
            if t.is_neg() or _is_batched(t) or t._is_zerotensor() or t.is_nested:
                return None
        return kinds, backend, torch.is_grad_enabled(), epoch.now, describe(a)

    def _describer(self, kinds: Sequence[type]) -> tuple[list[int] | None, Callable[[Any], Any]]:
        """Of arguments of these types: which are tensors (None: some are of a subclass), and what gives all that
        decides, which is what describes the tensors, and the others themselves."""
        wanted, tensors = [], []
        of_tensor = ("dtype", "shape", "device", "requires_grad", "layout")
        for i, (name, kind) in enumerate(zip(self._fields, kinds)):
            if kind in _PLAIN:
                tensors.append(i)
                wanted += [f"{name}.{attribute}" for attribute in of_tensor]
            elif issubclass(kind, Tensor):
                return None, operator.attrgetter(name)
            elif kind is not type(None):
                wanted.append(name)
        return tensors, operator.attrgetter(*wanted)


class _AroundDispatcher(torch.autograd.Function):
    """A kernel module's forward and backward, called at once: a third of the cost of a small call."""

    @staticmethod
    def forward(ctx, route, a, *variables):  # type: ignore[no-untyped-def]
        outputs = route.kernel.forward(a, route.plan)
        ctx.route = route
        # Tensors go through autograd, which may move their memory until the backward.
        ctx.save_for_backward(*[a[i] for i in route.tensors], outputs[-1])
        ctx.set_materialize_grads(False)
        return route.only(outputs)

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        route = ctx.route
        *tensors, saved = ctx.saved_tensors
        a = route.with_rest(tensors)
        return None, None, *route.gradients(a, grads, saved, ctx.needs_input_grad[2:])


# torch's own `apply` looks for the transforms that `is_watched` has looked for.
_apply = super(torch.autograd.Function, _AroundDispatcher).apply
