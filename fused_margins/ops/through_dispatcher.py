"""Through torch's dispatcher: an op and its backward as torch knows them, made of the op's fields.

Schemas, what the dispatcher calls (anybody may: it checks everything), fake kernels for compilation, and the autograd
Functions that torch.func and torch.compile understand.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..backends import registry
from ..core import checks
from ..core.similarity import accumulation_dtype
from .around_dispatcher import plan_of
from .fields import Choice, Field, RowFactor

if TYPE_CHECKING:
    from .op import Op

_library = torch.library.Library("fused_margins", "FRAGMENT")


def as_bits(needs: Sequence[bool]) -> int:
    """A number, since a traced graph holds no list of truth values."""
    return sum(1 << i for i, need in enumerate(needs) if need)


def define(op: Op) -> None:
    """Register an op and its backward with torch; make the Functions that torch.func and torch.compile understand."""
    fields, results = list(op.fields.items()), list(op.results)
    written = ", ".join(_schema(op, name, field) for name, field in fields)
    made = ", ".join(f"Tensor {name}" for name in results)
    has_backward = bool(op.differentiable)
    saved = ", Tensor saved" if has_backward else ""
    _library.define(f"{op.name}({written}, int needs, str backend) -> ({made}{saved})")
    _library.impl(op.name, lambda *flat: _forward(op, flat), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fused_margins::{op.name}", lambda *flat: _fake_forward(op, flat), lib=_library)
    registered = op.registered = getattr(torch.ops.fused_margins, op.name).default
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
    registered_backward = op.registered_backward = getattr(torch.ops.fused_margins, name).default
    # Where the differentiable fields are among the flat arguments, of which a row factor is two.
    places = [i + sum(f < i for f in op.factors) for i in op.differentiable]
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

    def refuse(*args):  # type: ignore[no-untyped-def]
        raise RuntimeError(
            f'{called}: expected no torch.vmap over gradients, as jacrev has it; backend="reference" takes it'
        )

    op.through_dispatcher, op.differentiable_backward = ThroughDispatcher, Backward
    for function in (ThroughDispatcher, Backward):
        function.vmap = staticmethod(refuse)  # type: ignore[assignment,method-assign]
        # torch binds the arguments of `forward` at every call; with the signature at hand in a third of the time.
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
    needs = tuple([need and isinstance(a[i], Tensor) for i, need in zip(op.differentiable, needs)])
    for name, grad in zip(op.results, flat[:count]):
        checks.dense(f"grad_{name}", grad)
    grads = op.complete(a, flat[:count])
    for grad, (name, out) in zip(grads, op.results.items()):
        if grad is not None:
            _expect(f"grad_{name}", grad, op.shape(a, out), out.dtype(a[0]), a[0])
    if saved is None:
        raise TypeError("saved: expected what the forward saved, got None")
    checks.dense("saved", saved)
    recover = getattr(kernel, "recover_plan", None)
    plan = saved_for if recover is None else recover(a, saved_for, saved.numel())
    _expect("saved", saved, (kernel.saved_size(a, plan),), accumulation_dtype(a[0].dtype), a[0])
    gradients = kernel.backward(grads, a, saved.contiguous(), plan, needs)
    everywhere = zip(op.differentiable, gradients)
    return _as_schema([a[0].new_empty(0, dtype=_dtype(op, a, i)) if g is None else g for i, g in everywhere])


def _callable(op: Op, a: Any, backend: str) -> tuple[Any, Any]:
    """Valid arguments, and the kernel module that runs them; an error else."""
    a = op.checked(op.arguments._make(map(_option, op.fields.items(), a)), autocast=False)
    chosen = registry.resolve(backend, op.problem(a))
    if chosen == "reference":
        raise ValueError(f"backend: expected one with kernels for this {op.name}, got {backend!r}")
    return a, registry.kernel(op.name, chosen)


def _option(named: tuple[str, Field], value: Any) -> Any:
    """The option of a number, of a field that has options; what else there is as it is."""
    name, field = named
    if not isinstance(field, Choice):
        return value
    if value in field.options._value2member_map_:
        return field.options(value)
    raise ValueError(f"{name}: expected a number in [0, {len(field.options)}), got {value}")


def _expect(argument: str, t: Tensor, shape: tuple[int, ...], dtype: torch.dtype, x: Tensor) -> None:
    if tuple(t.shape) != shape or t.dtype != dtype or t.device != x.device:
        expected, got = f"{shape} of {dtype} on {x.device}", f"{tuple(t.shape)} of {t.dtype} on {t.device}"
        raise ValueError(f"{argument}: expected shape {expected}, got {got}")


def _fake_forward(op: Op, flat: Sequence[Any]) -> Any:
    """Tensors without data. How much is saved depends on the memory budget, and is known when it is done."""
    a, (bits, _) = op.unflat(flat)
    x = a[0]
    _expect_one_device(op, a)
    outputs = [x.new_empty(op.shape(a, out), dtype=out.dtype(x)) for out in op.results.values()]
    if not op.differentiable:
        return _as_schema(outputs)
    size = torch.library.get_ctx().new_dynamic_size() if bits else 0
    return (*outputs, x.new_empty(size, dtype=accumulation_dtype(x.dtype)))


def _expect_one_device(op: Op, a: Any) -> None:
    """Of tensors with and without data torch takes this implementation, whose outputs nobody would write."""
    if not isinstance(a[0], Tensor):
        raise TypeError(f"{next(iter(op.fields))}: expected a tensor, got {type(a[0]).__name__}")
    for name, value in zip(op.fields, a):
        if isinstance(value, Tensor) and value.device != a[0].device:
            raise ValueError(f"{name}: expected device {a[0].device}, got {value.device}")


def _fake_backward(op: Op, flat: Sequence[Any]) -> Any:
    a, (_, _, bits, _) = op.unflat(flat[len(op.results) :])
    _expect_one_device(op, a)
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


def _as_schema(results: Sequence[Tensor]) -> Any:
    """What a registered op returns: one result as it is, several as a tuple."""
    return tuple(results) if len(results) > 1 else results[0]


def _scattered(values: Sequence[Any], places: Sequence[int], count: int) -> tuple[Any, ...]:
    """`count` values, None but for those at the places."""
    everywhere = [None] * count
    for i, value in zip(places, values):
        everywhere[i] = value
    return tuple(everywhere)
