"""Schema, fake kernels and autograd of `magnet`; the arithmetic is in the kernels."""

import inspect
from typing import Any

import torch
from torch import Tensor

from ...reductions import REDUCTIONS
from .. import checks, native, registry
from ..derivatives import double_backward, has_tangent
from ..similarity import accumulation_dtype
from . import reference

_library = torch.library.Library("fused_margins", "FRAGMENT")
# saved: what a kernel's backward need not compute again.
_library.define(
    "magnet(Tensor x, Tensor clusters, Tensor cluster_labels, float alpha, float variance_floor, str reduction, "
    "str backend) -> (Tensor loss, Tensor saved)"
)
_library.define(
    "magnet_backward(Tensor grad_loss, Tensor x, Tensor clusters, Tensor cluster_labels, Tensor saved, float alpha, "
    "float variance_floor, str reduction, str backend) -> Tensor"
)


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    *inputs, backend = args
    return registry.kernel("magnet", backend).forward(*inputs)


def _backward(*args: Any) -> Tensor:
    *inputs, backend = args
    return registry.kernel("magnet", backend).backward(*inputs)


_library.impl("magnet", _forward, "CompositeExplicitAutograd")
_library.impl("magnet_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("fused_margins::magnet", lib=_library)
def _(x, clusters, cluster_labels, alpha, variance_floor, reduction, backend):  # type: ignore[no-untyped-def]
    (rows, width), num_clusters = x.shape, cluster_labels.shape[0]
    dtype = accumulation_dtype(x.dtype)
    saved = num_clusters * ((width + 15) // 16 * 16) + rows * (num_clusters + 1) + 2
    return x.new_empty((rows,) if reduction == "none" else (), dtype=dtype), x.new_empty(saved, dtype=dtype)


@torch.library.register_fake("fused_margins::magnet_backward", lib=_library)
def _(grad_loss, x, clusters, cluster_labels, saved, alpha, variance_floor, reduction, backend):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


class _Magnet(torch.autograd.Function):
    @staticmethod
    def forward(x, clusters, cluster_labels, *rest):  # type: ignore[no-untyped-def]
        return torch.ops.fused_margins.magnet(x, clusters, cluster_labels, *rest)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        ctx.options, ctx.backend = inputs[3:-1], inputs[-1]
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:3], output[1])

    @staticmethod
    def backward(ctx, grad_loss, _):  # type: ignore[no-untyped-def]
        return _gradient(ctx, grad_loss, ctx.backend), *(None,) * 6


class _DirectMagnet(torch.autograd.Function):
    """The same around torch's dispatcher, where `native.direct` allows it: a third of the cost of a small call."""

    @staticmethod
    def forward(ctx, x, clusters, cluster_labels, *options):  # type: ignore[no-untyped-def]
        *ctx.options, ctx.backend = options
        loss, saved = registry.kernel("magnet", ctx.backend).forward(x, clusters, cluster_labels, *ctx.options)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, clusters, cluster_labels, saved)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):  # type: ignore[no-untyped-def]
        return _gradient(ctx, grad_loss, ctx.backend), *(None,) * 6


def _gradient(ctx: Any, grad_loss: Tensor | None, backend: str) -> Tensor | None:
    """Of x."""
    if grad_loss is None:
        return None
    tensors = ctx.saved_tensors
    # Second derivatives are wanted where a graph is being made of this backward; a compiled graph has none.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _MagnetBackward.apply(grad_loss, *tensors, *ctx.options, backend)
    if backend in native.DIRECT and native.direct(grad_loss, *tensors):
        return registry.kernel("magnet", backend).backward(grad_loss, *tensors, *ctx.options)
    return torch.ops.fused_margins.magnet_backward(grad_loss, *tensors, *ctx.options, backend)


class _MagnetBackward(torch.autograd.Function):
    """The gradient as a function of its own: by the kernel, and once more differentiable by the reference."""

    @staticmethod
    def forward(grad_loss, *rest):  # type: ignore[no-untyped-def]
        return torch.ops.fused_margins.magnet_backward(grad_loss, *rest)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        ctx.options = inputs[5:8]
        ctx.save_for_backward(*inputs[:4])

    @staticmethod
    def backward(ctx, grad_grad):  # type: ignore[no-untyped-def]
        grad_loss, x, clusters, cluster_labels = ctx.saved_tensors

        def formula(x):  # type: ignore[no-untyped-def]
            return (reference.magnet(x, clusters, cluster_labels, *ctx.options),)

        return *double_backward(formula, [x], [grad_loss], [grad_grad]), *(None,) * 7


# torch binds the arguments of `forward` at every call; with the signature at hand that takes a third of the time.
for _function in (_Magnet, _MagnetBackward):
    _function.forward.__signature__ = inspect.signature(_function.forward)  # type: ignore[attr-defined]


def magnet(
    x: Tensor,
    clusters: Tensor,
    cluster_labels: Tensor,
    *,
    alpha: float = 1.0,
    variance_floor: float = 1e-4,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """The magnet loss of a batch.

    Args, returns, rules and source: see `fused_margins.ops.magnet`.
    """
    return apply(x, clusters, cluster_labels, alpha, variance_floor, reduction, backend, "x")


def apply(
    x: Tensor,
    clusters: Tensor,
    cluster_labels: Tensor,
    alpha: float,
    variance_floor: float,
    reduction: str,
    backend: str,
    name: str,
) -> Tensor:
    """`magnet`, with the name that errors give to x."""
    checks.choice("reduction", reduction, REDUCTIONS)
    checks.number("alpha", alpha)
    checks.number("variance_floor", variance_floor)
    if not variance_floor > 0:
        raise ValueError(f"variance_floor: expected a positive number, got {variance_floor}")
    x, _ = checks.matrices(x, x, (name, name))
    checks.labels("clusters", clusters, x.shape[0], x)
    if not isinstance(cluster_labels, Tensor) or cluster_labels.dim() != 1:
        raise ValueError("cluster_labels: expected an integer tensor of shape (M,), the class of each cluster")
    num_clusters = cluster_labels.shape[0]
    checks.labels("cluster_labels", cluster_labels, num_clusters, x)

    problem = registry.Problem("magnet", x.device.type, x.dtype, x.shape[0], num_clusters, x.shape[1])
    backend = registry.resolve(backend, problem)
    options = (float(alpha), float(variance_floor), reduction)
    if backend == "reference" or has_tangent([x]):  # forward-mode derivatives, too, are the reference's
        with torch.autocast(x.device.type, enabled=False):
            return reference.magnet(x, clusters, cluster_labels, *options)
    direct = backend in native.DIRECT and native.direct(x, clusters, cluster_labels)
    if torch.is_grad_enabled() and x.requires_grad:
        if direct:
            return _DirectMagnet.apply(x, clusters, cluster_labels, *options, backend)
        return _Magnet.apply(x, clusters, cluster_labels, *options, backend)[0]
    if direct:
        return registry.kernel("magnet", backend).forward(x, clusters, cluster_labels, *options)[0]
    return torch.ops.fused_margins.magnet(x, clusters, cluster_labels, *options, backend)[0]
