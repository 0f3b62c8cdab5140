"""Around torch's dispatcher: where calls went before, and the autograd Function that calls a kernel module at once.

The dispatcher, and a Function that torch.func understands, cost as much as a small problem. A call like one before (of
the same types, sizes, devices, options and state of autograd) is neither checked nor routed again. Values of tensors
are no part of that: kernels look at them at every call.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..backends import epoch, registry
from ..core.dispatcher import can_bypass_dispatcher

if TYPE_CHECKING:
    from .op import Op

MOST_ROUTES = 256  # of an op, that are remembered
_is_grad_enabled, _is_any_autocast_enabled = torch.is_grad_enabled, torch._C._is_any_autocast_enabled


def only(outputs: Sequence[Tensor | None]) -> Any:
    """Those that are given; one alone as it is."""
    given = tuple([t for t in outputs if t is not None])
    return given[0] if len(given) == 1 else given


def renamed(error: Exception, names: Mapping[str, str]) -> Exception:
    """An error about a field as one about what the caller calls it."""
    name, _, text = str(error).partition(": ")
    return type(error)(f"{names[name]}: {text}") if name in names else error


def plan_of(kernel: Any, a: Any, needs: tuple[bool, ...]) -> Any:
    """What a kernel module's forward will save; `needs` themselves where it has no choice."""
    plan = getattr(kernel, "plan", None)
    return needs if plan is None else plan(a, needs)


class Route:
    """Where a call goes, and all that is the same in every call like it: none of its tensors, and no address."""

    def __init__(self, op: Op, a: Any, backend: str, needs: tuple[bool, ...]) -> None:
        self.op, self.backend, self.needs = op, backend, needs
        self.kernel = registry.kernel(op.name, backend)
        self.plan = plan_of(self.kernel, a, needs) if op.differentiable else None
        places = [i for i, value in enumerate(a) if isinstance(value, Tensor)]
        self.rest = [None if isinstance(value, Tensor) else value for value in a]
        # Of each argument where it is among the rest and, behind it, the tensors; the first twice, as one comes bare.
        order = [len(a) + places.index(i) if i in places else i for i in range(len(a))]
        self.arrange = operator.itemgetter(*order, order[0])
        self.given = [i for i, out in enumerate(op.results.values()) if out.given(a)]
        self.only = operator.itemgetter(*self.given)  # one alone as it is

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        """The given outputs, or the only one."""
        a = self.with_rest(tensors)
        if True in self.needs:
            return _apply(self, a, tensors, *map(a.__getitem__, self.op.differentiable))
        return self.only(self.kernel.forward(a, self.plan))

    def with_rest(self, tensors: Sequence[Tensor]) -> Any:
        """The arguments, from their tensors."""
        return tuple.__new__(self.op.arguments, self.arrange((*self.rest, *tensors))[:-1])


class Routes:
    """Where an op's calls went, by all that checks and routing look at."""

    def __init__(self) -> None:
        self._of_key: dict[Any, Route] = {}

    def again(self, tensors: Sequence[Any], options: Sequence[Any], names: Mapping[str, str]) -> tuple[Any, Any]:
        """By what a call can be remembered, and what it gives where one like it was; None for what there is not.

        Calls are alike by what checks and routing look at: what describes the tensors, types and values of the options.
        None is like another where something watches it, where a tensor is of a subclass, or an option is a tensor.
        """
        if _is_any_autocast_enabled() or not can_bypass_dispatcher(tensors):
            return None, None
        try:
            key = _one_of_equal(*options), _is_grad_enabled(), epoch.now, *map(_description, tensors)
        except Exception:  # whatever it is that is handed over: the checks will say
            return None, None
        route = self._of_key.get(key)
        if route is None:
            return (key, tensors), None
        try:
            return None, route(tensors)
        except (IndexError, ValueError) as error:
            raise renamed(error, names) from None

    def remember(self, asked: Any, route: Route, tensors: Sequence[Tensor]) -> None:
        """The route is found from now on by what was asked about, where those are the tensors that it takes."""
        if asked is not None and list(map(id, tensors)) == list(map(id, asked[1])):
            if len(self._of_key) >= MOST_ROUTES:
                self._of_key.clear()
            self._of_key[asked[0]] = route


_description = operator.attrgetter("dtype", "shape", "device", "requires_grad", "layout")


_OPTIONS = (str, int, float, type(None), type)


@functools.lru_cache(maxsize=MOST_ROUTES, typed=True)
def _one_of_equal(*options: Any) -> object:
    """An object for options of equal types and values. Nothing else is kept, since errors are not remembered."""
    if not all(isinstance(value, _OPTIONS) for value in options):
        raise TypeError("expected words and numbers")
    return object()


class _AroundDispatcher(torch.autograd.Function):
    """A kernel module's forward and backward, called at once: a third of the cost of a small call."""

    @staticmethod
    def forward(ctx, route, a, tensors, *variables):  # type: ignore[no-untyped-def]
        outputs = route.kernel.forward(a, route.plan)
        ctx.route = route
        # Tensors go through autograd, which may move their memory until the backward.
        ctx.save_for_backward(*tensors, outputs[-1])
        return route.only(outputs)

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        route, tensors, needs = ctx.route, ctx.saved_tensors, ctx.needs_input_grad[3:]
        a = route.with_rest(tensors)
        of_outputs: list[Tensor | None] = [None] * len(route.op.results)
        for i, grad in zip(route.given, grads):
            of_outputs[i] = grad.contiguous()
        # Second derivatives are wanted where a graph is being made of this backward.
        if _is_grad_enabled() or not can_bypass_dispatcher(grads):
            gradients = route.op.gradients(a, of_outputs, tensors[-1], route.needs, needs, route.backend)
        else:
            gradients = route.kernel.backward(of_outputs, a, tensors[-1], route.plan, needs)
        return None, None, None, *gradients


# torch's own `apply` looks for the transforms that `can_bypass_dispatcher` has looked for.
_apply = super(torch.autograd.Function, _AroundDispatcher).apply
