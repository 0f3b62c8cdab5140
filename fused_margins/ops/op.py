"""The one shell around every op: of its NamedTuple of fields it makes all that torch and a caller need.

    what a call is (fields)  ->  checks, routing to a backend, second derivatives and forward mode by the reference;
                                 around torch's dispatcher (`around_dispatcher`) an autograd Function that calls a
                                 kernel module at once; through it (`through_dispatcher`) schema, fake kernels, and the
                                 autograd Functions that torch.func and torch.compile understand

A call goes  __call__ (checks, once)  ->  run (which backend)  ->  kernel module.  Nothing below `__call__` checks
again, but for the implementation that is registered with the dispatcher, which anybody may call.
"""

import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..backends import registry
from ..backends.registry import MaybeTensors
from ..core import checks
from ..core.dispatcher import can_bypass_dispatcher
from .around_dispatcher import Route, Routes, only, renamed
from .fields import Embeddings, Field, Output, RowFactor
from .through_dispatcher import as_bits, define

NO_NAMES: Mapping[str, str] = {}


class Op:
    """An op: `op(...)` checks the arguments and computes, `op.run(arguments, backend)` computes.

    Args:
        name: of the op, and of its folder.
        arguments: the NamedTuple of its fields, tensors first, each annotated with a `Field`.
        outputs: a NamedTuple of annotated `Output`s.
        reference: the definition; takes `arguments`, gives `outputs`, with None for one that is not given.
        check: what fields alone do not say; takes checked arguments.
        aliases: other names that `fused_margins.explain` answers to, with the options they stand for.

    An op with a differentiable field has a backward: its kernel modules save one opaque tensor for it.
    """

    def __init__(
        self,
        name: str,
        arguments: Any,
        outputs: Any,
        reference: Callable[[Any], Any],
        *,
        check: Callable[[Any], None] = lambda arguments: None,
        aliases: Mapping[str, dict[str, Any]] = {},
    ) -> None:
        self.name, self.arguments = name, arguments
        self.reference, self._check_together = reference, check
        self.package: str = arguments.__module__.rpartition(".")[0]
        self.__doc__ = arguments.__doc__
        self.fields = {n: _annotation(t, Field) for n, t in _hints(arguments).items()}
        types = {n: typing.get_args(typing.get_args(t)[0]) for n, t in _hints(arguments).items()}
        self.optional = {n for n, allowed in types.items() if type(None) in allowed}
        self.results = {n: _annotation(t, Output) for n, t in _hints(outputs).items()}
        kinds = list(self.fields.values())
        self.num_tensors = sum(f.is_tensor for f in kinds)
        if any(f.is_tensor for f in kinds[self.num_tensors :]):
            raise TypeError(f"{name}: expected the tensors first")
        self.differentiable = [i for i, f in enumerate(kinds) if f.differentiable]
        # Where an axis has its size: the first field that has it.
        self.sizes: dict[str, tuple[int, int]] = {}
        for i, f in enumerate(kinds):
            for axis, name_of_axis in enumerate(f.axes if f.is_tensor else ()):
                if name_of_axis not in self.fields and not isinstance(f, RowFactor):
                    self.sizes.setdefault(name_of_axis, (i, axis))
        self.of_columns = self.sizes.get("columns", (0, 0))
        self.matrices = [i for i, f in enumerate(kinds) if isinstance(f, Embeddings)]
        if len(self.matrices) > 2:
            raise TypeError(f"{name}: expected at most two fields of embeddings, got {len(self.matrices)}")
        self.others = [(i, n, f) for i, (n, f) in enumerate(self.fields.items()) if not isinstance(f, Embeddings)]
        self.factors = [i for i, f in enumerate(kinds) if isinstance(f, RowFactor)]
        self.no_needs = (False,) * len(self.differentiable)
        self._routes = Routes()
        self.again = self._routes.again
        self.registered: Any = None
        self.registered_backward: Any = None
        self.through_dispatcher: Any = None
        self.differentiable_backward: Any = None
        define(self)
        registry.register(self, **aliases)

    def __call__(self, *args: Any, backend: str = "auto", names: Mapping[str, str] = NO_NAMES, **kwargs: Any) -> Any:
        """The given outputs of a call, or the only one of them. names: what the caller calls fields, for errors."""
        return self.run(self.arguments(*args, **kwargs), backend, names, valid=False)

    def checked(self, a: Any, names: Mapping[str, str] = NO_NAMES, autocast: bool = True) -> Any:
        """The arguments as the kernels take them; errors about their shapes, dtypes, devices and values name them."""
        values = list(a)
        called = [names.get(n, n) for n in self.fields] if names else list(self.fields)
        first, second = self.matrices[0], self.matrices[-1]
        x, y = checks.matrices(values[first], values[second], (called[first], called[second]), autocast)
        values[first], values[second] = x, y
        for i, name, field in self.others:
            value = values[i]
            if value is None and name in self.optional:
                continue
            size = self._size(field.axes[0], values, called) if field.is_tensor and field.axes else 0
            values[i] = field.check(called[i], value, x, size)
        a = self.arguments._make(values)
        self._check_together(a)
        return a

    def _size(self, axis: str, values: Sequence[Any], called: Sequence[str]) -> int:
        """Of a named axis of the arguments."""
        if axis not in self.sizes:  # an integer option
            return values[list(self.fields).index(axis)]
        i, dim = self.sizes[axis]
        t = values[i]
        if called:
            checks.dense(called[i], t)
        if not isinstance(t, Tensor) or t.dim() <= dim:
            got = f"shape {tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(f"{called[i]}: expected a tensor with {dim + 1} axes or more, got {got}")
        return t.shape[dim]

    def problem(self, a: Any) -> registry.Problem:
        """What decides who runs the call."""
        x = a[0]
        i, dim = self.of_columns
        return registry.Problem(self.name, x.device.type, x.dtype, x.shape[0], a[i].shape[dim], x.shape[1], a)

    def example(self, rows: int, columns: int, width: int, dtype: torch.dtype, **options: Any) -> Any:
        """Arguments of given sizes without data, optional tensors left out; for `fused_margins.explain`."""
        sizes = {"rows": rows, "columns": columns, "width": width}
        values: dict[str, Any] = {}
        for name, field in self.fields.items():
            if field.is_tensor and name not in self.optional and name not in self.arguments._field_defaults:
                values[name] = field.example([sizes.get(axis, 1) for axis in field.axes], dtype)
            elif name in options:
                value = options[name]
                if field.is_tensor and not isinstance(value, Tensor | float):
                    raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
                values[name] = value if field.is_tensor else field.check(name, value, values["x"], 0)
        unknown = options.keys() - self.fields.keys()
        if unknown:
            raise TypeError(f"{self.name} has no option {', '.join(sorted(unknown))}")
        return self.arguments(**values)

    def run(
        self, a: Any, backend: str, names: Mapping[str, str] = NO_NAMES, valid: bool = True, asked: Any = None
    ) -> Any:
        """The given outputs of a call, or the only one; of arguments that are valid, or are checked first.

        A call like one before (the same dtypes, sizes, devices and options) is not checked and routed again. A caller
        that has options of its own may have asked `again` about them: asked is what it was told. Errors about values
        speak of fields by the caller's names.
        """
        if asked is None and not torch.compiler.is_compiling():
            tensors = [value for value in a[: self.num_tensors] if isinstance(value, Tensor)]
            options = [Tensor if isinstance(value, Tensor) else value for value in a]
            asked, outputs = self.again(tensors, (self.name, backend, *options), names)
            if outputs is not None:
                return outputs
        try:
            return self._run(a if valid else self.checked(a, names), backend, asked)
        except (IndexError, ValueError) as error:
            raise renamed(error, names) from None

    def _run(self, a: Any, backend: str, asked: Any = None) -> Any:
        """The outputs of a valid call; asked: remember what is found out for calls like it."""
        backend = registry.resolve(backend, self.problem(a))
        if backend == "reference" or self._has_tangent(a):  # forward-mode derivatives, too, are the reference's
            return only(self._by_reference(a))
        needs = self.no_needs
        if torch.is_grad_enabled():
            needs = tuple([isinstance(a[i], Tensor) and a[i].requires_grad for i in self.differentiable])
        if not torch.compiler.is_compiling() and can_bypass_dispatcher(a[: self.num_tensors]):
            tensors, route = [t for t in a if isinstance(t, Tensor)], Route(self, a, backend, needs)
            self._routes.remember(asked, route, tensors)
            return route(tensors)
        flat = self.flat(a)
        if True in needs:
            # Dynamo refuses a Function that is handed one tensor twice (a batch against itself, labels as targets and
            # as row labels).
            flat = [t.view_as(t) if i and isinstance(t, Tensor) else t for i, t in enumerate(flat)]
            return self._given(a, self.through_dispatcher.apply(*flat, as_bits(needs), backend))
        flat = [t.detach() if isinstance(t, Tensor) else t for t in flat]
        return self._given(a, self.registered(*flat, as_bits(needs), backend))

    def _by_reference(self, a: Any) -> Any:
        with (
            torch.autocast(a[0].device.type, enabled=False),
            torch.set_grad_enabled(torch.is_grad_enabled() and bool(self.differentiable)),
        ):
            return self.reference(a)

    def _has_tangent(self, a: Any) -> bool:
        """Whether forward-mode differentiation is going on, with respect to one of the arguments."""
        if forward_ad._current_level < 0:
            return False
        variables = [a[i] for i in self.differentiable]
        return any(isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in variables)

    def flat(self, a: Any) -> list[Any]:
        """The arguments as the schema has them: a row factor as a tensor or None and a number, options as numbers."""
        values: list[Any] = []
        for i, value in enumerate(a):
            if i in self.factors:
                number = value is not None and not isinstance(value, Tensor)
                values += [None, float(value)] if number else [value, 0.0]
            elif isinstance(value, int) and not isinstance(value, bool):
                values.append(int(value))
            else:
                values.append(value)
        return values

    def unflat(self, flat: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
        """Arguments of what `flat` made, and what follows them."""
        values, at = [], 0
        for i in range(len(self.fields)):
            value = flat[at]
            at += 1
            if i in self.factors:
                if value is None:
                    value = flat[at]
                at += 1
            values.append(value)
        return self.arguments._make(values), flat[at:]

    def _given(self, a: Any, results: Sequence[Tensor]) -> Any:
        """Of what the registered op returned, the outputs that this call gives."""
        results = [results] if isinstance(results, Tensor) else results
        return only([t if out.given(a) else None for t, out in zip(results, self.results.values())])

    def from_bits(self, argument: str, bits: int) -> tuple[bool, ...]:
        """Of each differentiable field whether its gradient is needed: what `as_bits` made a number of."""
        count = len(self.differentiable)
        if not 0 <= bits < 1 << count:
            raise ValueError(f"{argument}: expected a bit for each of {count} gradients, got {bits}")
        return tuple([bool(bits >> i & 1) for i in range(count)])

    def shape(self, a: Any, out: Output) -> tuple[int, ...]:
        """Of an output; (0,) of one that is not given."""
        if not out.given(a):
            return (0,)
        axes = out.axes(a) if callable(out.axes) else out.axes
        return tuple([self._size(axis, a, ()) for axis in axes])

    def complete(self, a: Any, grads: MaybeTensors) -> list[Tensor | None]:
        """Gradients of all outputs of one given to some: contiguous, zeros for those that are undefined."""
        complete: list[Tensor | None] = []
        for grad, out in zip(grads, self.results.values()):
            if grad is not None:
                complete.append(grad if grad.is_contiguous() else grad.contiguous())
            else:
                complete.append(a[0].new_zeros(self.shape(a, out), dtype=out.dtype(a[0])) if out.given(a) else None)
        return complete

    def gradients(
        self, a: Any, grads: MaybeTensors, saved: Tensor, saved_for: Sequence[bool], needs: Sequence[bool], backend: str
    ) -> tuple[Tensor | None, ...]:
        """Of the differentiable fields, by the registered backward."""
        flat = (*grads, *self.flat(a), saved, as_bits(saved_for), as_bits(needs), backend)
        # A compiled graph has no second derivatives.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            results = self.differentiable_backward.apply(*flat)
        else:
            results = self.registered_backward(*flat)
        results = results if isinstance(results, tuple | list) else (results,)
        return tuple([g if need else None for g, need in zip(results, needs)])

    def second_order(
        self, a: Any, grads: MaybeTensors, needs: Sequence[bool], grad_grads: MaybeTensors
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Gradients of <gradients, grad_grads> with respect to grads (one an output) and the differentiable fields."""
        places = [i for i in self.differentiable if isinstance(a[i], Tensor)]
        given = [g for g in grads if g is not None]

        def outputs(*variables: Tensor) -> tuple[Tensor, ...]:
            values = list(a)
            for i, t in zip(places, variables):
                values[i] = t
            return tuple([t for t in self.reference(self.arguments._make(values)) if t is not None])

        def first_order(*primals: Tensor) -> tuple[Tensor, ...]:
            pullback = torch.func.vjp(outputs, *primals[len(given) :])[1]
            return pullback(tuple(primals[: len(given)]))

        # A field that needed no gradient got none, and neither has it a cotangent.
        wanted = dict(zip(self.differentiable, zip(needs, grad_grads)))
        cotangents = tuple(
            [g if need and g is not None else torch.zeros_like(a[i]) for i, (need, g) in wanted.items() if i in places]
        )
        # No torch.enable_grad: vjp has its own, and a graph of the outcome is wanted only where one is being made.
        with torch.autocast(a[0].device.type, enabled=False):
            pullback = torch.func.vjp(first_order, *given, *[a[i] for i in places])[1]
            results = iter(pullback(cotangents))
        of_grads = [None if g is None else next(results) for g in grads]
        return of_grads, [next(results) if i in places else None for i in self.differentiable]


def _hints(named_tuple: Any) -> dict[str, Any]:
    return typing.get_type_hints(named_tuple, include_extras=True)


def _annotation(hint: Any, kind: type) -> Any:
    return next(m for m in typing.get_args(hint) if isinstance(m, kind))
