"""The one shell around every op: of its NamedTuple of fields it makes all that torch and a caller need.

    what a call is (fields)  ->  checks, schema, fake kernels, routing to a backend,
                                 the autograd Function around torch's dispatcher and the one that torch.func and
                                 torch.compile understand, second derivatives and forward mode by the reference

A call goes  __call__ (checks, once)  ->  run (which backend)  ->  kernel module.  Nothing below `__call__` checks
again, but for the implementation that is registered with the dispatcher, which anybody may call.
"""

import inspect
import operator
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..backends import epoch, registry
from ..core import checks
from ..core.similarity import accumulation_dtype
from .fields import Embeddings, Field, Output, RowFactor

NO_NAMES: Mapping[str, str] = {}
_library = torch.library.Library("fused_margins", "FRAGMENT")


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
        self.name, self.arguments, self.outputs = name, arguments, outputs
        self.reference, self._check_together = reference, check
        self.package: str = arguments.__module__.rpartition(".")[0]
        self.__doc__ = arguments.__doc__
        self.fields = {n: _annotation(t, Field) for n, t in _hints(arguments).items()}
        self.optional = {
            n for n, t in _hints(arguments).items() if type(None) in typing.get_args(typing.get_args(t)[0])
        }
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
        self.others = [(i, n, f) for i, (n, f) in enumerate(self.fields.items()) if not isinstance(f, Embeddings)]
        self.factors = [i for i, f in enumerate(kinds) if isinstance(f, RowFactor)]
        self.no_needs = (False,) * len(self.differentiable)
        self._routes: dict[Any, Route] = {}
        self._describers: dict[Any, tuple[list[int] | None, Callable[[Any], Any]]] = {}
        self.registered: Any = None
        self.registered_backward: Any = None
        self.through_dispatcher: Any = None
        self.differentiable_backward: Any = None
        _define(self)
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
            if field.is_tensor and field.axes:
                values[i] = field.check(called[i], value, x, self._size(field.axes[0], values, called))
            else:
                values[i] = field.check(called[i], value, x, 0)
        a = self.arguments._make(values)
        self._check_together(a)
        return a

    def _size(self, axis: str, values: Sequence[Any], called: Sequence[str]) -> int:
        """Of a named axis of the arguments."""
        if axis not in self.sizes:  # an integer option
            return values[list(self.fields).index(axis)]
        i, dim = self.sizes[axis]
        t = values[i]
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
                values[name] = value if field.is_tensor else field.check(name, value, values["x"], 0)
        unknown = options.keys() - self.fields.keys()
        if unknown:
            raise TypeError(f"{self.name} has no option {', '.join(sorted(unknown))}")
        return self.arguments(**values)

    def run(self, a: Any, backend: str, names: Mapping[str, str] = NO_NAMES, valid: bool = True) -> Any:
        """The given outputs of a call, or the only one; of arguments that are valid, or are checked first.

        A call like one before (the same dtypes, sizes, devices and options) is not checked and routed again. Errors
        about values speak of fields by the caller's names.
        """
        if torch.compiler.is_compiling():
            return self._run(a if valid else self.checked(a, names), backend)
        try:
            key = self._key(a, backend)
            try:
                route = self._routes.get(key)
            except TypeError:  # of a value without a hash, which is no option
                key = route = None
            if route is not None:
                return route(a)
            checked = a if valid else self.checked(a, names)
            return self._run(checked, backend, key if all(map(operator.is_, a[: self.num_tensors], checked)) else None)
        except (IndexError, ValueError) as error:
            name, _, text = str(error).partition(": ")
            if name not in names:
                raise
            raise type(error)(f"{names[name]}: {text}") from None

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
            if t.is_neg() or _is_batched(t) or t._is_zerotensor():
                return None
        return kinds, backend, torch.is_grad_enabled(), epoch.now, describe(a)

    def _describer(self, kinds: Sequence[type]) -> tuple[list[int] | None, Callable[[Any], Any]]:
        """Of arguments of these types: which are tensors (None: some are of a subclass), and what gives all that
        decides, which is what describes the tensors, and the others themselves."""
        wanted, tensors = [], []
        of_tensor = ("dtype", "shape", "device", "requires_grad", "layout", "is_nested")
        for i, (name, kind) in enumerate(zip(self.fields, kinds)):
            if kind in _PLAIN:
                tensors.append(i)
                wanted += [f"{name}.{attribute}" for attribute in of_tensor]
            elif issubclass(kind, Tensor):
                return None, operator.attrgetter(name)
            elif kind is not type(None):
                wanted.append(name)
        return tensors, operator.attrgetter(*wanted)

    def _run(self, a: Any, backend: str, key: Any = None) -> Any:
        """The outputs of a valid call; key: remember what is found out for calls like it."""
        backend = registry.resolve(backend, self.problem(a))
        if backend == "reference" or self._has_tangent(a):  # forward-mode derivatives, too, are the reference's
            return _only(self._by_reference(a))
        needs = self.no_needs
        if torch.is_grad_enabled():
            needs = tuple([isinstance(a[i], Tensor) and a[i].requires_grad for i in self.differentiable])
        if not torch.compiler.is_compiling() and can_bypass_dispatcher(a[: self.num_tensors]):
            route = Route(self, a, backend, needs, as_given=key is not None and key[0] == tuple(map(type, a)))
            if key is not None:
                if len(self._routes) >= MOST_ROUTES:
                    self._routes.clear()
                self._routes[key] = route
            return route(a)
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
        return _only([t if out.given(a) else None for t, out in zip(results, self.results.values())])

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

    def complete(self, a: Any, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of all outputs of one given to some: contiguous, zeros for those that are undefined."""
        complete: list[Tensor | None] = []
        for grad, out in zip(grads, self.results.values()):
            if grad is not None:
                complete.append(grad if grad.is_contiguous() else grad.contiguous())
            else:
                complete.append(a[0].new_zeros(self.shape(a, out), dtype=out.dtype(a[0])) if out.given(a) else None)
        return complete

    def gradients(
        self,
        a: Any,
        grads: Sequence[Tensor | None],
        saved: Tensor,
        saved_for: Sequence[bool],
        needs: Sequence[bool],
        backend: str,
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
        self, a: Any, grads: Sequence[Tensor | None], needs: Sequence[bool], grad_grads: Sequence[Tensor | None]
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


class Route:
    """Where a call goes, and all that is the same in every call like it: no tensor, and no address."""

    def __init__(self, op: Op, a: Any, backend: str, needs: tuple[bool, ...], as_given: bool) -> None:
        """as_given: callers have the options as they are here, so that their arguments may be passed on."""
        self.as_given = as_given
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


def as_bits(needs: Sequence[bool]) -> int:
    """A number, since a traced graph holds no list of truth values."""
    return sum(1 << i for i, need in enumerate(needs) if need)


def plan_of(kernel: Any, a: Any, needs: tuple[bool, ...]) -> Any:
    """What a kernel module's forward will save; `needs` themselves where it has no choice."""
    plan = getattr(kernel, "plan", None)
    return needs if plan is None else plan(a, needs)


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

    The dispatcher and a Function that torch.func understands cost as much as a small problem. Whatever `is_watched`
    names needs them, and so do batched gradients, subclasses of tensors, zeros without memory, and tensors that are
    negated when they are read (imaginary parts of conjugates); nothing else does.
    """
    if is_watched():
        return False
    for t in tensors:
        if t is None or type(t) is float:
            continue
        if type(t) not in _PLAIN or t.is_neg() or _is_batched(t) or t._is_zerotensor():
            return False
    return True


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


def _define(op: Op) -> None:
    """Register an op and its backward with torch; make the Functions that torch.func and torch.compile understand."""
    fields, results = list(op.fields.items()), list(op.results)
    written = ", ".join(_schema(op, name, field) for name, field in fields)
    made = ", ".join(f"Tensor {name}" for name in results)
    has_backward = bool(op.differentiable)
    saved = ", Tensor saved" if has_backward else ""
    _library.define(f"{op.name}({written}, int needs, str backend) -> ({made}{saved})")
    _library.impl(op.name, lambda *flat: _forward(op, flat), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fused_margins::{op.name}", lambda *flat: _fake_forward(op, flat), lib=_library)
    registered = getattr(torch.ops.fused_margins, op.name).default
    op.registered = registered
    if not has_backward:
        return

    variables = [fields[i][0] for i in op.differentiable]
    incoming = ", ".join(f"Tensor? grad_{name}" for name in results)
    outgoing = ", ".join(f"Tensor grad_{name}" for name in variables)
    called, name = op.name, f"{op.name}_backward"
    _library.define(
        f"{name}({incoming}, {written}, Tensor saved, int saved_for, int needs, str backend) -> ({outgoing})"
    )
    _library.impl(name, lambda *flat: _backward(op, flat), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fused_margins::{name}", lambda *flat: _fake_backward(op, flat), lib=_library)
    registered_backward = getattr(torch.ops.fused_margins, name).default

    places = _places(op)
    num_results = len(results)

    class ThroughDispatcher(torch.autograd.Function):
        @staticmethod
        def forward(*flat):  # type: ignore[no-untyped-def]
            return registered(*flat)

        @staticmethod
        def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
            ctx.rest = [None if isinstance(t, Tensor) else t for t in inputs]
            ctx.mark_non_differentiable(output[-1])
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*[t if isinstance(t, Tensor) else None for t in inputs], output[-1])

        @staticmethod
        def backward(ctx, *grads):  # type: ignore[no-untyped-def]
            op = registry.OPS[called]  # which Dynamo finds there, but not in a closure
            *tensors, saved = ctx.saved_tensors
            flat = [r if t is None else t for t, r in zip(tensors, ctx.rest)]
            a, (bits, backend) = op.unflat(flat)
            saved_for = op.from_bits("saved_for", bits)
            needs = [bool(ctx.needs_input_grad[i]) for i in places]
            gradients = op.gradients(a, op.complete(a, grads[:num_results]), saved, saved_for, needs, backend)
            return _scattered(gradients, places, len(flat))

    class Backward(torch.autograd.Function):
        """The gradient as a function of its own: by the kernel, and once more differentiable by the reference."""

        @staticmethod
        def forward(*flat):  # type: ignore[no-untyped-def]
            return registered_backward(*flat)

        @staticmethod
        def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
            ctx.rest = [None if isinstance(t, Tensor) else t for t in inputs]
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*[t if isinstance(t, Tensor) else None for t in inputs])

        @staticmethod
        def backward(ctx, *grad_grads):  # type: ignore[no-untyped-def]
            flat = [r if t is None else t for t, r in zip(ctx.saved_tensors, ctx.rest)]
            a, (_, _, bits, _) = op.unflat(flat[num_results:])
            needs = op.from_bits("needs", bits)
            of_grads, of_variables = op.second_order(a, flat[:num_results], needs, grad_grads)
            at = [num_results + i for i in places]
            return _scattered((*of_grads, *of_variables), [*range(num_results), *at], len(flat))

    op.through_dispatcher, op.differentiable_backward, op.registered_backward = (
        ThroughDispatcher,
        Backward,
        registered_backward,
    )
    # torch binds the arguments of `forward` at every call; with the signature at hand that takes a third of the time.
    for function in (ThroughDispatcher, Backward):
        function.forward.__signature__ = inspect.signature(function.forward)  # type: ignore[attr-defined]


def _forward(op: Op, flat: Sequence[Any]) -> Any:
    """What the dispatcher calls: of anybody's arguments."""
    a, (bits, backend) = op.unflat(flat)
    needs = op.from_bits("needs", bits)
    a, kernel = _callable(op, a, backend)
    if not op.differentiable:
        outputs = kernel.forward(a, None)
        return _as_schema([a[0].new_empty(0) if t is None else t for t in outputs])
    *outputs, saved = kernel.forward(a, plan_of(kernel, a, needs))
    saved = saved if any(needs) else saved.new_empty(0)
    return (*[saved.new_empty(0) if t is None else t for t in outputs], saved)


def _backward(op: Op, flat: Sequence[Any]) -> Any:
    """The same, of a backward; an empty tensor for each gradient that is not needed."""
    count = len(op.results)
    a, (saved, bits_of_saved, bits, backend) = op.unflat(flat[count:])
    saved_for, needs = op.from_bits("saved_for", bits_of_saved), op.from_bits("needs", bits)
    a, kernel = _callable(op, a, backend)
    grads = op.complete(a, flat[:count])
    for grad, (name, out) in zip(grads, op.results.items()):
        if grad is not None:
            _expect(f"grad_{name}", grad, op.shape(a, out), out.dtype(a[0]), a[0])
    recover = getattr(kernel, "recover_plan", None)
    plan = saved_for if recover is None else recover(a, saved_for, saved.numel())
    _expect("saved", saved, (kernel.saved_size(a, plan),), accumulation_dtype(a[0].dtype), a[0])
    gradients = kernel.backward(grads, a, saved.contiguous(), plan, needs)
    everywhere = zip(op.differentiable, gradients)
    return _as_schema([a[0].new_empty(0, dtype=_dtype(op, a, i)) if g is None else g for i, g in everywhere])


def _callable(op: Op, a: Any, backend: str) -> tuple[Any, Any]:
    """Valid arguments, and the kernel module that runs them; an error else."""
    a = op.checked(a, autocast=False)
    chosen = registry.resolve(backend, op.problem(a))
    if chosen == "reference":
        raise ValueError(f"backend: expected one with kernels for this {op.name}, got {backend!r}")
    return a, registry.kernel(op.name, chosen)


def _expect(argument: str, t: Tensor, shape: tuple[int, ...], dtype: torch.dtype, x: Tensor) -> None:
    if tuple(t.shape) != shape or t.dtype != dtype or t.device != x.device:
        expected, got = f"{shape} of {dtype} on {x.device}", f"{tuple(t.shape)} of {t.dtype} on {t.device}"
        raise ValueError(f"{argument}: expected shape {expected}, got {got}")


def _fake_forward(op: Op, flat: Sequence[Any]) -> Any:
    """Tensors without data. How much is saved depends on the memory budget, and is known when it is done."""
    a, (bits, _) = op.unflat(flat)
    x = a[0]
    outputs = [x.new_empty(op.shape(a, out), dtype=out.dtype(x)) for out in op.results.values()]
    if not op.differentiable:
        return _as_schema(outputs)
    size = torch.library.get_ctx().new_dynamic_size() if bits else 0
    return (*outputs, x.new_empty(size, dtype=accumulation_dtype(x.dtype)))


def _fake_backward(op: Op, flat: Sequence[Any]) -> Any:
    a, (_, _, bits, _) = op.unflat(flat[len(op.results) :])
    gradients, needs = [], op.from_bits("needs", bits)
    for i, need in zip(op.differentiable, needs):
        shape = a[i].shape if need and isinstance(a[i], Tensor) else (0,)
        gradients.append(a[0].new_empty(shape, dtype=_dtype(op, a, i)))
    return _as_schema(gradients)


def _dtype(op: Op, a: Any, i: int) -> torch.dtype:
    """Of the gradient of field i."""
    return a[0].dtype if i in op.matrices else accumulation_dtype(a[0].dtype)


def _schema(op: Op, name: str, field: Field) -> str:
    """A field as a schema writes it."""
    if isinstance(field, RowFactor):
        return f"Tensor? {name}, float {name}_number"
    return f"{field.schema}{'?' if name in op.optional else ''} {name}"


def _places(op: Op) -> list[int]:
    """Where the differentiable fields are among the flat arguments."""
    return [i + sum(f < i for f in op.factors) for i in op.differentiable]


def _as_schema(results: Sequence[Tensor]) -> Any:
    """What a registered op returns: one result as it is, several as a tuple."""
    return tuple(results) if len(results) > 1 else results[0]


def _scattered(values: Sequence[Any], places: Sequence[int], count: int) -> tuple[Any, ...]:
    """`count` values, None but for those at the places."""
    everywhere = [None] * count
    for i, value in zip(places, values):
        everywhere[i] = value
    return tuple(everywhere)


def _only(outputs: Sequence[Tensor | None]) -> Any:
    """Those that are given; one alone as it is."""
    given = tuple([t for t in outputs if t is not None])
    return given[0] if len(given) == 1 else given


def _hints(named_tuple: Any) -> dict[str, Any]:
    return typing.get_type_hints(named_tuple, include_extras=True)


def _annotation(hint: Any, kind: type) -> Any:
    return next(m for m in typing.get_args(hint) if isinstance(m, kind))
