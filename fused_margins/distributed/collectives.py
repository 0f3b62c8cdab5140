"""Exchanges between the ranks of a process group that autograd goes through, exactly.

A tensor is in one of two states. It is *different* on each rank (own rows, own classes), and then its gradient on a
rank is the derivative of the whole objective by that rank's tensor; or it is the *same* on all ranks, its gradient is
the same on all of them too, and the objective is counted once. Each function goes from one state to the other, and the
backward of each is another of them:

    function          from, to                                      backward
    gather_rows       own rows, all rows that each rank uses        the sum over ranks of the gradients of own rows
                      in its own way                                (reduce-scatter)
    replicate_rows    own rows, all rows as the same tensor         the own rows of the gradient
    own_rows          the same tensor of all rows, own rows         gathers the gradients
    sum_over_ranks    different, their sum                          the gradient as it is
    share             the same tensor, one that each rank uses      the sum over ranks of the gradients
                      in its own way

All are differentiable to any order. Rows come in the order of the ranks; ranks may have different numbers of rows, or
none. Every rank of the group must make every call, and its backward. Without a process group, and in one of a single
rank, nothing is sent.

Bytes that a rank hands over and receives, for W ranks of at most n rows of width D and e bytes an entry: gather_rows
n D e and W n D e, and the other way round in its backward, where e is at least 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from ..core.ranks import all_gather_single, num_ranks, own_rank
from ..core.similarity import accumulation_dtype

__all__ = [
    "combine",
    "gather_rows",
    "num_ranks",
    "own_rank",
    "own_rows",
    "replicate_rows",
    "row_counts",
    "scale_gradient",
    "share",
    "sum_over_ranks",
]


def row_counts(rows: int, device: torch.device, group: dist.ProcessGroup | None = None) -> tuple[int, ...]:
    """Rows of each rank. On a GPU the host waits for the answer."""
    ranks = num_ranks(group)
    if ranks == 1:
        return (rows,)
    own = torch.tensor([rows], dtype=torch.int64, device=device)
    every = own.new_empty(ranks)
    all_gather_single(every, own, group)
    return tuple(every.tolist())


def gather_rows(x: Tensor, counts: Sequence[int], group: dist.ProcessGroup | None = None) -> Tensor:
    """All ranks' rows (sum of counts, ...), for each rank to use in its own way.

    Args:
        x: (counts[rank], ...), the rows of this rank; integers too, which have no gradient.
        counts: rows of each rank, as `row_counts` gives them.
        group: the process group, None for all ranks.

    Raises:
        ValueError: counts that are not one a rank, or another number of rows than they say.

    Gradients: x; the sum over ranks, in float32 where x is narrower.

    >>> import torch
    >>> from fused_margins.distributed.collectives import gather_rows
    >>> gather_rows(torch.ones(2, 3), [2]).shape  # one process, no process group
    torch.Size([2, 3])
    """
    counts = _checked(x, counts, group)
    return _Gather.apply(x, counts, group) if len(counts) > 1 else x.view_as(x)


def replicate_rows(x: Tensor, counts: Sequence[int], group: dist.ProcessGroup | None = None) -> Tensor:
    """All ranks' rows as one tensor that is the same on all ranks and used in the same way; as `gather_rows` else."""
    counts = _checked(x, counts, group)
    return _Replicate.apply(x, counts, group) if len(counts) > 1 else x.view_as(x)


def own_rows(x: Tensor, counts: Sequence[int], group: dist.ProcessGroup | None = None) -> Tensor:
    """The rows (counts[rank], ...) of this rank, of a tensor (sum of counts, ...) that is the same on all ranks."""
    if x.shape[0] != sum(counts):
        raise ValueError(f"x: expected {sum(counts)} rows, of all ranks together, got {x.shape[0]}")
    return _OwnRows.apply(x, tuple(counts), group) if len(counts) > 1 else x.view_as(x)


def sum_over_ranks(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The sum of all ranks' tensors, the same on all ranks; its gradient is that of each of them."""
    return _Sum.apply(x, group) if num_ranks(group) > 1 else x.view_as(x)


def share(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """A tensor that is the same on all ranks, for each to use in its own way: its gradients are summed over ranks."""
    return _Share.apply(x, group) if num_ranks(group) > 1 else x.view_as(x)


def combine(lse: Tensor, *summed: Tensor, group: dist.ProcessGroup | None = None) -> tuple[Tensor, ...]:
    """Of log-sum-exps (B,) over each rank's columns that over all columns, and sums over ranks of other vectors (B,).

        lse_i = m_i + log sum_r exp(lse_ri - m_i),   m_i = max_r lse_ri

    What only one rank knows of a row, such as the similarity with its positive, is summed with zeros of the others. Two
    all-reduces, however many vectors: the maxima (B,) and all sums (1 + vectors, B).

    Args:
        lse: (B,), -inf for a row without columns on this rank. summed: (B,) each, dtype of lse.
        group: the process group, None for all ranks.

    Returns:
        The log-sum-exp, -inf without a gradient where no rank has columns, and the sums: the same on all ranks.

    Gradients: lse and summed, to any order; the gradients that come in must be the same on all ranks.

    >>> import torch
    >>> from fused_margins.distributed.collectives import combine
    >>> combine(torch.tensor([0.5, -torch.inf]), torch.tensor([1.0, 2.0]))
    (tensor([0.5000,   -inf]), tensor([1., 2.]))
    """
    if num_ranks(group) == 1:
        return (lse, *summed)
    largest = lse.detach().clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    # Where no rank has columns nothing is taken off, so that nothing is ever inf - inf.
    finite = torch.where(largest.isfinite(), largest, 0.0)
    total, *others = sum_over_ranks(torch.stack([torch.exp(lse - finite), *summed]), group).unbind(0)
    empty = total == 0
    return (torch.where(empty, -torch.inf, finite + torch.where(empty, 1.0, total).log()), *others)


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x, whose gradient is multiplied by the factor on its way back."""
    return x if factor == 1 else _Scale.apply(x, factor)


def reduce_scatter_single(own: Tensor, every: Tensor, group: dist.ProcessGroup | None) -> None:
    """torch's collective of this name, which releases before 2.13 call otherwise."""
    named = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    named(own, every, group=group)


def _checked(x: Tensor, counts: Sequence[int], group: dist.ProcessGroup | None) -> tuple[int, ...]:
    ranks, rank = num_ranks(group), own_rank(group)
    if len(counts) != ranks:
        raise ValueError(f"counts: expected one of each of {ranks} ranks, got {len(counts)}")
    if x.shape[0] != counts[rank]:
        raise ValueError(f"x: expected the {counts[rank]} rows that counts says of rank {rank}, got {x.shape[0]}")
    return tuple(counts)


def _padded(x: Tensor, rows: int) -> Tensor:
    """x with zeros below, up to that many rows; contiguous."""
    missing = rows - x.shape[0]
    return F.pad(x, (0, 0) * (x.dim() - 1) + (0, missing)) if missing else x.contiguous()


def _all_gather(x: Tensor, counts: Sequence[int], group: dist.ProcessGroup | None) -> Tensor:
    """Rows of all ranks; on the way each has as many as the longest, since the ranks of a collective must agree."""
    longest = max(counts)
    every = x.new_empty(len(counts) * longest, *x.shape[1:])
    if every.numel():
        all_gather_single(every, _padded(x, longest), group)
    if min(counts) == longest:
        return every
    return torch.cat([part[:n] for part, n in zip(every.split(longest), counts)])


def _reduce_scatter(grad: Tensor, counts: Sequence[int], group: dist.ProcessGroup | None) -> Tensor:
    """Sums over ranks of the own rows; of narrow dtypes in float32, in which a sum of many ranks keeps its digits."""
    longest, rows = max(counts), counts[own_rank(group)]
    every = grad.to(accumulation_dtype(grad.dtype)).contiguous()
    if min(counts) != longest:
        every = torch.cat([_padded(part, longest) for part in every.split(list(counts))])
    own = every.new_empty(longest, *grad.shape[1:])
    if every.numel():
        reduce_scatter_single(own, every, group)
    return own[:rows].to(grad.dtype)


def _all_reduce(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    total = x.to(accumulation_dtype(x.dtype), copy=True, memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total.to(x.dtype)


def _slice(x: Tensor, counts: Sequence[int], group: dist.ProcessGroup | None) -> Tensor:
    rank = own_rank(group)
    first = sum(counts[:rank])
    return x[first : first + counts[rank]].clone()


class _OfRows(torch.autograd.Function):
    """Of x (rows, ...), the numbers of rows of the ranks, and a group."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.counts, ctx.group = inputs


class _Gather(_OfRows):
    @staticmethod
    def forward(x: Tensor, counts: tuple[int, ...], group: Any) -> Tensor:
        return _all_gather(x, counts, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _ReduceScatter.apply(grad, ctx.counts, ctx.group), None, None


class _ReduceScatter(_OfRows):
    @staticmethod
    def forward(grad: Tensor, counts: tuple[int, ...], group: Any) -> Tensor:
        return _reduce_scatter(grad, counts, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _Gather.apply(grad, ctx.counts, ctx.group), None, None


class _Replicate(_OfRows):
    @staticmethod
    def forward(x: Tensor, counts: tuple[int, ...], group: Any) -> Tensor:
        return _all_gather(x, counts, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _OwnRows.apply(grad, ctx.counts, ctx.group), None, None


class _OwnRows(_OfRows):
    @staticmethod
    def forward(x: Tensor, counts: tuple[int, ...], group: Any) -> Tensor:
        return _slice(x, counts, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _Replicate.apply(grad, ctx.counts, ctx.group), None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, group: Any) -> Tensor:
        return _all_reduce(x, group)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _Share.apply(grad, ctx.group), None


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, group: Any) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _Sum.apply(grad, ctx.group), None


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, factor: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return grad * ctx.factor, None
