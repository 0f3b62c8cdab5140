"""Rows as a distance of pytorch-metric-learning compares them."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

LEAST_LENGTH = 1e-12  # by which shorter rows are divided, as they are by theirs


def rows_of(distance: Any, embeddings: Tensor) -> Tensor:
    """What `distance.maybe_normalize` gives; where that is a length of 1, as one node of the graph instead of four."""
    if not distance.normalize_embeddings or distance.p != 2 or torch.compiler.is_compiling():
        return distance.maybe_normalize(embeddings)
    return _UnitRows.apply(embeddings)


def both_rows(distance: Any, embeddings: Tensor, ref_emb: Tensor) -> tuple[Tensor, Tensor]:
    """`rows_of` both sides, which are one tensor if they were."""
    x = rows_of(distance, embeddings)
    return x, x if ref_emb is embeddings else rows_of(distance, ref_emb)


class _UnitRows(torch.autograd.Function):
    """u = x / max(|x|, LEAST_LENGTH), row by row: dL/dx = (g - <g, u> u) / |x|, without its second term if clamped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min_(LEAST_LENGTH)
        u = x / length
        ctx.save_for_backward(x, u, length)
        ctx.save_for_forward(u, length)
        return u

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, u, length = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return _tangent(u, length, grad).to(x.dtype)
        unit = F.normalize(x, eps=LEAST_LENGTH)  # for a second derivative
        return torch.autograd.grad(unit, x, grad.to(unit.dtype), create_graph=True)[0]

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        u, length = ctx.saved_tensors
        return _tangent(u, length, tangent).to(u.dtype)


def _tangent(u: Tensor, length: Tensor, direction: Tensor) -> Tensor:
    along = (u * direction).sum(1, keepdim=True) * (length > LEAST_LENGTH)
    return (direction - u * along) / length
