"""Schema, fake kernels and autograd of `contrast`; the arithmetic is in the kernels."""

import inspect
from typing import Any

import torch
from torch import Tensor

from .. import checks, native, registry
from ..derivatives import double_backward, has_tangent
from ..kept import kept_blocks, kept_size, mean_size
from . import reference

_library = torch.library.Library("fused_margins", "FRAGMENT")
# For a kernel's backward: mean where `with_mean`, the columns averaged under each row's softmax weights (on a GPU
# factors of rows and columns), and the softmax weights of the first `kept_blocks` blocks of columns, which it need not
# compute again.
_library.define(
    "contrast(Tensor x, Tensor y, Tensor scale, Tensor? bias, Tensor target, Tensor? row_labels, "
    "Tensor? column_labels, Tensor? self_index, str similarity, str relation, int ignore_index, bool with_mean, "
    "SymInt kept_blocks, str backend) -> (Tensor positive, Tensor negative_lse, Tensor mean, Tensor kept)"
)
_library.define(
    "contrast_backward(Tensor grad_positive, Tensor grad_negative_lse, Tensor x, Tensor y, Tensor scale, Tensor? bias, "
    "Tensor target, Tensor? row_labels, Tensor? column_labels, Tensor? self_index, Tensor negative_lse, Tensor mean, "
    "Tensor kept, str similarity, str relation, int ignore_index, SymInt kept_blocks, bool[] needs, str backend)"
    " -> (Tensor grad_x, Tensor grad_y, Tensor grad_scale, Tensor grad_bias)"
)


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *inputs, backend = args
    return registry.kernel("contrast", backend).forward(*inputs)


def _backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *inputs, backend = args
    return registry.kernel("contrast", backend).backward(*inputs)


_library.impl("contrast", _forward, "CompositeExplicitAutograd")
_library.impl("contrast_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("fused_margins::contrast", lib=_library)
def _(x, y, scale, bias, target, row_labels, column_labels, self_index, similarity, relation, ignore_index, with_mean, kept_blocks, backend):  # type: ignore[no-untyped-def]  # fmt: skip
    rows, width = x.shape
    row = scale.new_empty(rows)
    columns = y.shape[0]
    mean = scale.new_empty(mean_size(rows, width, columns, backend) if with_mean or backend != "cpu" else 0)
    kept = scale.new_empty(kept_size(rows, columns, kept_blocks, backend))
    return row, torch.empty_like(row), mean, kept


@torch.library.register_fake("fused_margins::contrast_backward", lib=_library)
def _(grad_positive, grad_negative_lse, x, y, scale, bias, target, row_labels, column_labels, self_index, negative_lse, mean, kept, similarity, relation, ignore_index, kept_blocks, needs, backend):  # type: ignore[no-untyped-def]  # fmt: skip
    def like(t, need):  # type: ignore[no-untyped-def]
        return t.new_empty(t.shape) if need else t.new_empty(0)

    bias = scale if bias is None else bias
    return tuple(like(t, need) for t, need in zip((x, y, scale, bias), needs))


class _Contrast(torch.autograd.Function):
    @staticmethod
    def forward(x, y, scale, bias, *rest):  # type: ignore[no-untyped-def]
        return torch.ops.fused_margins.contrast(x, y, scale, bias, *rest)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        x, y, scale, bias, target, row_labels, column_labels, self_index, *options, ctx.backend = inputs
        ctx.options = [*options[:3], options[4]]  # all but `with_mean`
        _, *saved = output
        ctx.mark_non_differentiable(*saved[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, y, scale, bias, target, row_labels, column_labels, self_index, *saved)

    @staticmethod
    def backward(ctx, grad_positive, grad_negative_lse, *_):  # type: ignore[no-untyped-def]
        return *_gradients(ctx, grad_positive, grad_negative_lse), *(None,) * 10


class _DirectContrast(torch.autograd.Function):
    """The same around torch's dispatcher, where `native.direct` allows it: a fifth of the cost of a small call."""

    @staticmethod
    def forward(ctx, *inputs):  # type: ignore[no-untyped-def]
        *arguments, ctx.backend = inputs
        positive, *saved = registry.kernel("contrast", ctx.backend).forward(*arguments)
        ctx.options = [*arguments[8:11], arguments[12]]  # all but `with_mean`
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*arguments[:8], *saved)
        return positive, saved[0]

    @staticmethod
    def backward(ctx, grad_positive, grad_negative_lse):  # type: ignore[no-untyped-def]
        return *_gradients(ctx, grad_positive, grad_negative_lse), *(None,) * 10


def _gradients(ctx: Any, grad_positive: Tensor | None, grad_negative_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of x, y, scale and bias."""
    tensors = ctx.saved_tensors
    grads = [torch.zeros_like(tensors[8]) if g is None else g.contiguous() for g in (grad_positive, grad_negative_lse)]
    needs = [bool(n) for n in ctx.needs_input_grad[:4]]
    # Second derivatives are wanted where a graph is being made of this backward; a compiled graph has none.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        results = _ContrastBackward.apply(*grads, *tensors, *ctx.options, needs, ctx.backend)
    elif ctx.backend in native.DIRECT and native.direct(*grads, *tensors):
        results = registry.kernel("contrast", ctx.backend).backward(*grads, *tensors, *ctx.options, needs)
    else:
        results = torch.ops.fused_margins.contrast_backward(*grads, *tensors, *ctx.options, needs, ctx.backend)
    return tuple(g if need else None for g, need in zip(results, needs))


class _ContrastBackward(torch.autograd.Function):
    """The gradient as a function of its own: by the kernel, and once more differentiable by the reference."""

    @staticmethod
    def forward(grad_positive, *rest):  # type: ignore[no-untyped-def]
        return torch.ops.fused_margins.contrast_backward(grad_positive, *rest)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        *tensors, ctx.similarity, ctx.relation, ctx.ignore_index, _, ctx.needs, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[:10])

    @staticmethod
    def backward(ctx, *grad_grads):  # type: ignore[no-untyped-def]
        grad_positive, grad_negative_lse, x, y, scale, bias, *integers = ctx.saved_tensors

        def formula(x, y, scale, *bias):  # type: ignore[no-untyped-def]
            given = (x, y, scale, bias[0] if bias else None, *integers, ctx.similarity, ctx.relation, ctx.ignore_index)
            return reference.contrast(*given)

        inputs = [x, y, scale] if bias is None else [x, y, scale, bias]
        # An input that needed no gradient got an empty one, and so did its cotangent.
        cotangents = [g if need else None for g, need in zip(grad_grads, ctx.needs)][: len(inputs)]
        results: list[Tensor | None] = list(
            double_backward(formula, inputs, [grad_positive, grad_negative_lse], cotangents)
        )
        results += [None] * (6 - len(results))
        return *results, *(None,) * 13


# torch binds the arguments of `forward` at every call; with the signature at hand that takes a third of the time.
for _function in (_Contrast, _ContrastBackward):
    _function.forward.__signature__ = inspect.signature(_function.forward)  # type: ignore[attr-defined]


def contrast(
    x: Tensor,
    y: Tensor,
    target: Tensor,
    row_labels: Tensor | None = None,
    column_labels: Tensor | None = None,
    *,
    scale: float | Tensor,
    bias: Tensor | None = None,
    similarity: str = "cosine",
    relation: str = "different",
    self_index: Tensor | None = None,
    ignore_index: int = -1,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Similarity of each row with its positive column, and log-sum-exp over the columns that its label admits.

    Args, returns, rules and source: see `fused_margins.ops.contrast`.
    """
    checks.similarity(similarity)
    checks.whole("ignore_index", ignore_index)
    checks.relation(relation)
    x, y = checks.matrices(x, y)
    rows, columns = x.shape[0], y.shape[0]
    checks.labels("target", target, rows, x)
    checks.labels("row_labels", row_labels, rows, x, optional=True)
    checks.labels("column_labels", column_labels, columns, x, optional=True)
    checks.labels("self_index", self_index, rows, x, optional=True)
    scale = checks.row_factor("scale", scale, x, positive=True)
    bias = checks.vector("bias", bias, columns, x)

    problem = registry.Problem("contrast", x.device.type, x.dtype, rows, columns, x.shape[1])
    backend = registry.resolve(backend, problem)
    args: tuple[Any, ...] = (target, row_labels, column_labels, self_index, similarity, relation, ignore_index)
    differentiable = [t for t in (x, y, scale, bias) if t is not None]
    # Forward-mode derivatives, too, are the reference's.
    if backend == "reference" or has_tangent(differentiable):
        with torch.autocast(x.device.type, enabled=False):
            return reference.contrast(x, y, scale, bias, *args)
    direct = backend in native.DIRECT and native.direct(x, y, scale, bias, *args[:4])
    if torch.is_grad_enabled() and any(t.requires_grad for t in differentiable):
        with_mean = x.requires_grad or scale.requires_grad
        of_columns = y.requires_grad or (bias is not None and bias.requires_grad)
        options = (with_mean, kept_blocks(problem, backend, of_columns), backend)
        if direct:
            return _DirectContrast.apply(x, y, scale, bias, *args, *options)
        # Dynamo refuses a Function that is handed one tensor twice (a batch against itself, labels as targets and as
        # row labels).
        args = tuple(t.view_as(t) if isinstance(t, Tensor) else t for t in args)
        positive, negative_lse, *_ = _Contrast.apply(x, y.view_as(y), scale, bias, *args, *options)
    elif direct:
        positive, negative_lse, *_ = registry.kernel("contrast", backend).forward(x, y, scale, bias, *args, False, 0)
    else:
        positive, negative_lse, *_ = torch.ops.fused_margins.contrast(x, y, scale, bias, *args, False, 0, backend)
    return positive, negative_lse
