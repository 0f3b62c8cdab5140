"""Of the cosines of rows with columns the sums, and those of each row's own column, without the matrix.

Symbols: B rows x_i and N columns y_j of width D, x^_i and y^_j of unit length, u_ij = <x^_i, y^_j>, w_j weights. One
vector says all of the columns that sums depend on, s = sum_j w_j y^_j, for sum_j w_j u_ij = <x^_i, s>; another one all
of the rows that the gradients of columns depend on.
"""

from typing import Any

import torch
from torch import Tensor

from .dispatcher import can_bypass_dispatcher
from .enums import Similarity
from .similarity import accumulation_dtype, pair_similarity, similarity_sum, take_rows

_USUAL = 1e-15  # squares of lengths between it and its inverse are far within the range of float32


def cosine_sums(x: Tensor, y: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """u_{i, target_i} and sum_j weight_j u_ij, both (B,), as `pair_similarity` and `similarity_sum` define them.

    target: (B,) int64; where it is no column, the first value is of some column, and nobody counts it.
    """
    x, y = (t.to(accumulation_dtype(t.dtype)) for t in (x, y))
    if not torch.is_autocast_enabled(x.device.type):
        return _cosine_sums(x, y, weight, target)
    with torch.autocast(x.device.type, enabled=False):
        return _cosine_sums(x, y, weight, target)


def _cosine_sums(x: Tensor, y: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    if y.numel() and can_bypass_dispatcher((x, y, weight, target)):
        return _apply(x, y, weight, target.clamp(0, y.shape[0] - 1))  # type: ignore[no-any-return]
    return _defined(x, y, weight, target)


def _defined(x: Tensor, y: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return pair_similarity(x, take_rows(y, target), Similarity.COSINE), similarity_sum(x, y, weight, Similarity.COSINE)


def _inverse_lengths(x: Tensor) -> Tensor:
    """(n,), what `unit_rows` multiplies rows (n, D) by."""
    length = torch.linalg.vector_norm(x, dim=1)
    if x.device.type == "cpu" and x.shape[0]:
        shortest, longest = length.aminmax()
        if shortest.item() > _USUAL and longest.item() < 1 / _USUAL:
            return length.reciprocal_()
    largest = torch.linalg.vector_norm(x, torch.inf, dim=1)
    length = largest * torch.linalg.vector_norm(x / torch.where(largest == 0, 1.0, largest)[:, None], dim=1)
    return torch.where(length < 1 / torch.finfo(x.dtype).max, 0.0, 1 / length)


class _CosineSums(torch.autograd.Function):
    """The gradients in a few passes over either side: those of unit vectors, less what is along the vectors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        of_x, of_y = _inverse_lengths(x), _inverse_lengths(y)  # inverse lengths
        own_unit = y.index_select(0, target).mul_(of_y.index_select(0, target)[:, None])
        direction = (weight * of_y) @ y  # (D,)
        own, total = (x * own_unit).sum(1).mul_(of_x), (x @ direction).mul_(of_x)
        ctx.save_for_backward(x, y, weight, target, of_x, of_y, own_unit, direction, own, total)
        return own, total

    @staticmethod
    def backward(ctx: Any, of_own: Tensor, of_total: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, y, weight, target, of_x, of_y, own_unit, direction, own, total = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled() or not can_bypass_dispatcher((of_own, of_total)):
            # For second derivatives, and for many gradients at once.
            with torch.enable_grad():
                # As views: one side may be made of the other, and its gradient is that of itself alone.
                x, y, weight = (t.view_as(t) for t in (x, y, weight))
                outputs = zip(_defined(x, y, weight, target), (of_own, of_total))
            wanted = [t for t, needed in zip((x, y, weight), needs) if needed]
            given = [(output, grad) for output, grad in outputs if output.requires_grad]
            options = {"create_graph": torch.is_grad_enabled(), "materialize_grads": True}
            found = iter(torch.autograd.grad([o for o, _ in given], wanted, [g for _, g in given], **options))
            return *(next(found) if needed else None for needed in needs), None
        unit = x * of_x[:, None]
        grad_x = grad_y = grad_weight = None
        if needs[0]:
            grad_x = (own_unit * of_own[:, None]).addr_(of_total, direction)
            grad_x.addcmul_(unit, (of_own * own + of_total * total)[:, None], value=-1).mul_(of_x[:, None])
        if needs[1] or needs[2]:
            of_direction = of_total @ unit  # (D,)
            grad_weight = (y @ of_direction).mul_(of_y)
        if needs[1]:
            # Of all columns the part of the sums; then, of those that are somebody's own, theirs. Inverse lengths come
            # last: their squares may be beyond any range.
            grad_y = (y * (grad_weight * of_y).neg_()[:, None]).add_(of_direction).mul_((weight * of_y)[:, None])
            rows = unit.addcmul_(own_unit, own[:, None], value=-1).mul_(
                (of_own * of_y.index_select(0, target))[:, None]
            )
            if y.device.type == "cpu":
                grad_y.index_add_(0, target, rows)
            else:  # there its additions meet in atomics; an embedding's have an order
                grad_y += torch.ops.aten.embedding_dense_backward(rows, target, len(y), -1, False)
        return grad_x, grad_y, grad_weight if needs[2] else None, None


# torch's own `apply` looks for the transforms that `can_bypass_dispatcher` has looked for.
_apply = super(torch.autograd.Function, _CosineSums).apply
