"""Schema, fake kernels and autograd of `scores`; the arithmetic is in the kernels."""

import inspect
from typing import Any

import torch
from torch import Tensor

from .. import checks, native, registry
from ..derivatives import double_backward, has_tangent
from . import reference

_library = torch.library.Library("fused_margins", "FRAGMENT")
_library.define(
    "scores(Tensor x, Tensor y, Tensor scale, Tensor? bias, Tensor margin, Tensor? target, str similarity, "
    "int ignore_index, str backend) -> Tensor"
)
_library.define(
    "scores_backward(Tensor grad_scores, Tensor x, Tensor y, Tensor scale, Tensor? bias, Tensor margin, "
    "Tensor? target, str similarity, int ignore_index, bool[] needs, str backend)"
    " -> (Tensor grad_x, Tensor grad_y, Tensor grad_scale, Tensor grad_bias, Tensor grad_margin)"
)


def _forward(*args: Any) -> Tensor:
    *inputs, backend = args
    return registry.kernel("scores", backend).forward(*inputs)


def _backward(*args: Any) -> tuple[Tensor, ...]:
    *inputs, backend = args
    return registry.kernel("scores", backend).backward(*inputs)


_library.impl("scores", _forward, "CompositeExplicitAutograd")
_library.impl("scores_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("fused_margins::scores", lib=_library)
def _(x, y, scale, bias, margin, target, similarity, ignore_index, backend):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], y.shape[0])


@torch.library.register_fake("fused_margins::scores_backward", lib=_library)
def _(grad_scores, x, y, scale, bias, margin, target, similarity, ignore_index, needs, backend):  # type: ignore[no-untyped-def]
    tensors = (x, y, scale, scale if bias is None else bias, margin)
    return tuple(t.new_empty(t.shape) if need else t.new_empty(0) for t, need in zip(tensors, needs))


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(x, *rest):  # type: ignore[no-untyped-def]
        return torch.ops.fused_margins.scores(x, *rest)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        *tensors, ctx.similarity, ctx.ignore_index, ctx.backend = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad_scores):  # type: ignore[no-untyped-def]
        return *_gradients(ctx, grad_scores), *(None,) * 4


class _DirectScores(torch.autograd.Function):
    """The same around torch's dispatcher, where `native.direct` allows it: less to do for a small call."""

    @staticmethod
    def forward(ctx, *inputs):  # type: ignore[no-untyped-def]
        *arguments, ctx.backend = inputs
        *tensors, ctx.similarity, ctx.ignore_index = arguments
        ctx.save_for_backward(*tensors)
        return registry.kernel("scores", ctx.backend).forward(*arguments)

    @staticmethod
    def backward(ctx, grad_scores):  # type: ignore[no-untyped-def]
        return *_gradients(ctx, grad_scores), *(None,) * 4


def _gradients(ctx: Any, grad_scores: Tensor) -> tuple[Tensor | None, ...]:
    """Of x, y, scale, bias and margin."""
    needs = [bool(n) for n in ctx.needs_input_grad[:5]]
    args = (grad_scores.contiguous(), *ctx.saved_tensors, ctx.similarity, ctx.ignore_index, needs)
    # Second derivatives are wanted where a graph is being made of this backward; a compiled graph has none.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        results = _ScoresBackward.apply(*args, ctx.backend)
    elif ctx.backend in native.DIRECT and native.direct(*args[:7]):
        results = registry.kernel("scores", ctx.backend).backward(*args)
    else:
        results = torch.ops.fused_margins.scores_backward(*args, ctx.backend)
    return tuple(g if need else None for g, need in zip(results, needs))


class _ScoresBackward(torch.autograd.Function):
    """The gradient as a function of its own: by the kernel, and once more differentiable by the reference."""

    @staticmethod
    def forward(grad_scores, *rest):  # type: ignore[no-untyped-def]
        return torch.ops.fused_margins.scores_backward(grad_scores, *rest)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        *tensors, ctx.similarity, ctx.ignore_index, ctx.needs, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, *grad_grads):  # type: ignore[no-untyped-def]
        grad_scores, x, y, scale, bias, margin, target = ctx.saved_tensors

        def formula(x, y, scale, margin, *bias):  # type: ignore[no-untyped-def]
            u = reference.scores(
                x, y, scale, bias[0] if bias else None, margin, target, ctx.similarity, ctx.ignore_index
            )
            return (u,)

        # An input that needed no gradient got an empty one, and so did its cotangent.
        of_x, of_y, of_scale, of_bias, of_margin = (g if need else None for g, need in zip(grad_grads, ctx.needs))
        inputs, cotangents = [x, y, scale, margin], [of_x, of_y, of_scale, of_margin]
        if bias is not None:
            inputs, cotangents = [*inputs, bias], [*cotangents, of_bias]
        to_grad, to_x, to_y, to_scale, to_margin, *to_bias = double_backward(formula, inputs, [grad_scores], cotangents)
        return to_grad, to_x, to_y, to_scale, to_bias[0] if to_bias else None, to_margin, *(None,) * 5


# torch binds the arguments of `forward` at every call; with the signature at hand that takes a third of the time.
for _function in (_Scores, _ScoresBackward):
    _function.forward.__signature__ = inspect.signature(_function.forward)  # type: ignore[attr-defined]


def scores(
    x: Tensor,
    y: Tensor,
    *,
    similarity: str = "cosine",
    scale: float | Tensor = 1.0,
    bias: Tensor | None = None,
    target: Tensor | None = None,
    margin: float | Tensor = 0.0,
    ignore_index: int = -1,
    backend: str = "auto",
) -> Tensor:
    """The similarity matrix itself, with margin and scale applied.

    Args, returns, rules and source: see `fused_margins.ops.scores`.
    """
    checks.similarity(similarity)
    checks.whole("ignore_index", ignore_index)
    x, y = checks.matrices(x, y)
    rows, columns = x.shape[0], y.shape[0]
    checks.labels("target", target, rows, x, optional=True)
    scale = checks.row_factor("scale", scale, x, positive=True)
    margin = checks.row_factor("margin", margin, x, positive=False)
    bias = checks.vector("bias", bias, columns, x)

    problem = registry.Problem("scores", x.device.type, x.dtype, rows, columns, x.shape[1])
    backend = registry.resolve(backend, problem)
    args = (scale, bias, margin, target, similarity, ignore_index)
    differentiable = [t for t in (x, y, scale, bias, margin) if t is not None]
    # Forward-mode derivatives, too, are the reference's.
    if backend == "reference" or has_tangent(differentiable):
        with torch.autocast(x.device.type, enabled=False):
            return reference.scores(x, y, *args)
    direct = backend in native.DIRECT and native.direct(x, y, scale, bias, margin, target)
    if torch.is_grad_enabled() and any(t.requires_grad for t in differentiable):
        if direct:
            return _DirectScores.apply(x, y, *args, backend)
        # Dynamo refuses a Function that is handed one tensor twice: a batch against itself.
        return _Scores.apply(x, y.view_as(y), *args, backend)
    if direct:
        return registry.kernel("scores", backend).forward(x, y, *args)
    return torch.ops.fused_margins.scores(x, y, *args, backend)
