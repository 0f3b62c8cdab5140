"""Schema, fake kernels and autograd of `margin_softmax`; the arithmetic is in the kernels."""

import inspect
from typing import Any

import torch
from torch import Tensor

from ...reductions import REDUCTIONS
from .. import checks, native, registry
from ..derivatives import double_backward, has_tangent
from ..kept import kept_blocks, saved_size
from . import reference
from .angle import check_angle

_library = torch.library.Library("fused_margins", "FRAGMENT")
# saved: what a kernel's backward need not compute again.
_library.define(
    "margin_softmax(Tensor x, Tensor y, Tensor scale, Tensor margin, Tensor target, str similarity, float angle_rad, "
    "str beyond_pi, bool straight_through, int ignore_index, str reduction, bool with_mean, SymInt kept_blocks, "
    "str backend) -> (Tensor loss, Tensor saved)"
)
_library.define(
    "margin_softmax_backward(Tensor grad_loss, Tensor x, Tensor y, Tensor scale, Tensor margin, Tensor target, "
    "Tensor saved, str similarity, float angle_rad, str beyond_pi, bool straight_through, int ignore_index, "
    "str reduction, bool with_mean, SymInt kept_blocks, bool[] needs, str backend) "
    "-> (Tensor grad_x, Tensor grad_y, Tensor grad_scale, Tensor grad_margin)"
)


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    *inputs, backend = args
    return registry.kernel("margin_softmax", backend).forward(*inputs)


def _backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *inputs, backend = args
    grads = registry.kernel("margin_softmax", backend).backward(*inputs)
    return tuple(t.new_empty(0) if g is None else g for t, g in zip(inputs[1:5], grads))  # type: ignore[return-value]


_library.impl("margin_softmax", _forward, "CompositeExplicitAutograd")
_library.impl("margin_softmax_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("fused_margins::margin_softmax", lib=_library)
def _(x, y, scale, margin, target, *options):  # type: ignore[no-untyped-def]
    *_, reduction, with_mean, kept_blocks, backend = options
    rows, width = x.shape
    saved = saved_size(rows, y.shape[0], width, with_mean, kept_blocks, backend)
    return scale.new_empty((rows,) if reduction == "none" else ()), scale.new_empty(saved)


@torch.library.register_fake("fused_margins::margin_softmax_backward", lib=_library)
def _(grad_loss, x, y, scale, margin, target, saved, *options):  # type: ignore[no-untyped-def]
    needs = options[-2]
    return tuple(t.new_empty(t.shape if need else 0) for t, need in zip((x, y, scale, margin), needs))


class _MarginSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(x, y, scale, margin, target, *rest):  # type: ignore[no-untyped-def]
        return torch.ops.fused_margins.margin_softmax(x, y, scale, margin, target, *rest)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        tensors, ctx.options, ctx.backend = inputs[:5], inputs[5:-1], inputs[-1]
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, output[1])

    @staticmethod
    def backward(ctx, grad_loss, _):  # type: ignore[no-untyped-def]
        return *_gradients(ctx, grad_loss, ctx.backend), *(None,) * 10


class _DirectMarginSoftmax(torch.autograd.Function):
    """The same around torch's dispatcher, where `native.direct` allows it: a third of the cost of a small call."""

    @staticmethod
    def forward(ctx, x, y, scale, margin, target, options, backend):  # type: ignore[no-untyped-def]
        ctx.options, ctx.backend = options, backend
        loss, saved = registry.kernel("margin_softmax", backend).forward(x, y, scale, margin, target, *options)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, y, scale, margin, target, saved)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):  # type: ignore[no-untyped-def]
        return *_gradients(ctx, grad_loss, ctx.backend), None, None, None


def _gradients(ctx: Any, grad_loss: Tensor | None, backend: str) -> tuple[Tensor | None, ...]:
    """Of x, y, scale and margin."""
    if grad_loss is None:
        return None, None, None, None
    tensors, needs = ctx.saved_tensors, list(ctx.needs_input_grad[:4])
    # Second derivatives are wanted where a graph is being made of this backward; a compiled graph has none.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        results = _MarginSoftmaxBackward.apply(grad_loss, *tensors, *ctx.options, needs, backend)
    elif backend in native.DIRECT and native.direct(grad_loss, *tensors):
        results = registry.kernel("margin_softmax", backend).backward(grad_loss, *tensors, *ctx.options, needs)
    else:
        results = torch.ops.fused_margins.margin_softmax_backward(grad_loss, *tensors, *ctx.options, needs, backend)
    return tuple(g if need else None for g, need in zip(results, needs))


class _MarginSoftmaxBackward(torch.autograd.Function):
    """The gradient as a function of its own: by the kernel, and once more differentiable by the reference."""

    @staticmethod
    def forward(grad_loss, *rest):  # type: ignore[no-untyped-def]
        return torch.ops.fused_margins.margin_softmax_backward(grad_loss, *rest)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        ctx.options, ctx.needs = inputs[7:13], inputs[15]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:6])

    @staticmethod
    def backward(ctx, *grad_grads):  # type: ignore[no-untyped-def]
        grad_loss, x, y, scale, margin, target = ctx.saved_tensors

        def formula(x, y, scale, margin):  # type: ignore[no-untyped-def]
            return (reference.margin_softmax(x, y, scale, margin, target, *ctx.options),)

        # An input that needed no gradient got an empty one, and so did its cotangent.
        cotangents = [g if need else None for g, need in zip(grad_grads, ctx.needs)]
        of_grad, *of_inputs = double_backward(formula, [x, y, scale, margin], [grad_loss], cotangents)
        return of_grad, *of_inputs, *(None,) * 12


# torch binds the arguments of `forward` at every call; with the signature at hand that takes a third of the time.
for _function in (_MarginSoftmax, _MarginSoftmaxBackward):
    _function.forward.__signature__ = inspect.signature(_function.forward)  # type: ignore[attr-defined]


def margin_softmax(
    x: Tensor,
    y: Tensor,
    target: Tensor,
    *,
    scale: float | Tensor,
    margin: float | Tensor = 0.0,
    angle_rad: float = 0.0,
    beyond_pi: str = "standard",
    straight_through: bool = False,
    similarity: str = "cosine",
    ignore_index: int = -1,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Softmax cross entropy over similarities, with margins on the own class's.

    Args, returns, rules and source: see `fused_margins.ops.margin_softmax`.
    """
    checks.similarity(similarity)
    checks.whole("ignore_index", ignore_index)
    checks.choice("reduction", reduction, REDUCTIONS)
    check_angle(angle_rad, beyond_pi, straight_through, similarity)
    x, y = checks.matrices(x, y)
    checks.labels("target", target, x.shape[0], x)
    scale = checks.row_factor("scale", scale, x, positive=True)
    margin = checks.row_factor("margin", margin, x, positive=False)
    angle = (float(angle_rad), beyond_pi, straight_through)
    return apply(x, y, target, scale, margin, angle, similarity, ignore_index, reduction, backend)


def apply(
    x: Tensor,
    y: Tensor,
    target: Tensor,
    scale: Tensor,
    margin: Tensor,
    angle: tuple[float, str, bool],
    similarity: str,
    ignore_index: int,
    reduction: str,
    backend: str,
) -> Tensor:
    """`margin_softmax` of arguments that are checked."""
    problem = registry.Problem("margin_softmax", x.device.type, x.dtype, x.shape[0], y.shape[0], x.shape[1])
    backend = registry.resolve(backend, problem)
    differentiable = (x, y, scale, margin)
    options: tuple[Any, ...] = (similarity, *angle, ignore_index, reduction)
    if backend == "reference" or has_tangent(differentiable):  # forward-mode derivatives, too, are the reference's
        with torch.autocast(x.device.type, enabled=False):
            return reference.margin_softmax(x, y, scale, margin, target, *options)
    direct = backend in native.DIRECT and native.direct(*differentiable, target)
    if torch.is_grad_enabled() and any(t.requires_grad for t in differentiable):
        options = (*options, x.requires_grad or scale.requires_grad, kept_blocks(problem, backend, y.requires_grad))
        if direct:
            return _DirectMarginSoftmax.apply(x, y, scale, margin, target, options, backend)
        # Dynamo refuses a Function that is handed one tensor twice (a batch against itself, one value for both factors).
        y, margin = y.view_as(y), margin.view_as(margin)
        return _MarginSoftmax.apply(x, y, scale, margin, target, *options, backend)[0]
    options = (*options, False, 0)
    if direct:
        return registry.kernel("margin_softmax", backend).forward(*differentiable, target, *options)[0]
    return torch.ops.fused_margins.margin_softmax(*differentiable, target, *options, backend)[0]
