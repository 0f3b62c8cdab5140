"""The rows of all ranks as references that no rank holds: blocks of them travel from rank to rank.

In step s of W ranks, rank r has the rows of rank (r - s) mod W. It hands them on to rank r + 1 and receives the next
ones from rank r - 1 while it reduces what it has. In a backward the same blocks pass by once more, each with its
gradient so far, which is at home after W steps.

Bytes that a rank sends for W ranks of n rows of width D and e bytes an entry: (W - 1) n D e a search or a sum over the
references, and (W - 1) n D e + W n D max(e, 4) in the backward of a sum. Memory: O(n D), and a label of every row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from ..core.enums import Relation, Similarity
from ..core.similarity import accumulation_dtype
from ..mining.sides import Sides, zero_or_nan
from .collectives import own_rank, sum_over_ranks

_OfBlock = Callable[[int, Sides], Tensor]  # what the anchors (n, D) make of the rows of one rank: a vector
_ROWS, _GRADIENTS = 0, 1  # tags of what travels


class Ring:
    """Answers what `Sides` answers, of the own rows as anchors and the rows of all ranks as references.

    Every rank calls every method, and its backward, in the same order. Gradients of first order.

    Attributes:
        x: (n, D) own rows. labels: (n,). reference_labels: (N,) of all ranks. self_index: (n,) where the own rows are
            among all.
    """

    def __init__(
        self,
        x: Tensor,
        labels: Tensor,
        reference_labels: Tensor,
        counts: Sequence[int],
        group: dist.ProcessGroup | None,
    ) -> None:
        self.x, self.labels, self.reference_labels = x, labels, reference_labels
        self._counts, self._group, self._rank = tuple(counts), group, own_rank(group)
        self._first = [sum(counts[:rank]) for rank in range(len(counts))]
        self._itself = torch.arange(len(x), device=x.device)
        self.self_index = self._first[self._rank] + self._itself

    def nearest(
        self,
        similarity: Similarity,
        relation: Relation,
        backend: str,
        *,
        below: Tensor | None = None,
        largest: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """As `Sides.nearest`; of equals the one that is first in the order of the ranks."""
        best = torch.full(self.labels.shape, -torch.inf, dtype=accumulation_dtype(self.x.dtype), device=self.x.device)
        index = torch.full_like(self.self_index, -1)
        for source, block in self.blocks(self.x):
            value, place = block.nearest(similarity, relation, backend, below=below, largest=largest)
            found, place = place >= 0, place + self._first[source]
            nearer = (value > best) if largest else (value < best)
            takes = found & ((index < 0) | nearer | ((value == best) & (place < index)))
            best, index = torch.where(takes, value, best), torch.where(takes, place, index)
        return best, index

    def pairs(self, anchor: Tensor | None, reference: Tensor, similarity: Similarity) -> Tensor:
        """As `Sides.pairs`; 0 for a reference of index -1."""
        places = [
            ((reference >= first) & (reference < first + rows)).nonzero()[:, 0]
            for first, rows in zip(self._first, self._counts)
        ]

        def of_block(source: int, block: Sides) -> Tensor:
            at = places[source]
            return block.pairs(at if anchor is None else anchor[at], reference[at] - self._first[source], similarity)

        found = torch.cat(self._of_blocks(of_block))
        return found.new_zeros(reference.shape).index_copy(0, torch.cat(places), found)

    def log_sum_exp(self, relation: Relation, scale: float, backend: str, *, sign: int = 1) -> Tensor:
        """As `Sides.log_sum_exp`."""
        found = self._of_blocks(lambda _, block: block.log_sum_exp(relation, scale, backend, sign=sign))
        lse = torch.stack(found)  # (W, n)
        empty = (lse == -torch.inf).all(0)
        return torch.where(empty, -torch.inf, torch.logsumexp(torch.where(empty, 0.0, lse), 0))

    def sum_of_positives(self) -> Tensor:
        """As `Sides.sum_of_positives`."""
        return torch.stack(self._of_blocks(lambda _, block: block.sum_of_positives())).sum(0)

    def not_finite(self, similarity: Similarity) -> Tensor:
        """As `Sides.not_finite`."""
        found = zero_or_nan(self.x, self.labels, similarity)
        return found + sum_over_ranks(found.sum(), self._group)

    def blocks(self, x: Tensor) -> Iterator[tuple[int, Sides]]:
        """Each rank and its rows as references of x (n, D), without a graph, while the next ones are on their way."""
        x = y = x.detach().contiguous()
        ranks = len(self._counts)
        for step in range(ranks):
            source = (self._rank - step) % ranks
            if step + 1 < ranks:
                following = x.new_empty(self._counts[source - 1], x.shape[1])
                on_their_way = self.exchange(y, following, _ROWS)
            first = self._first[source]
            labels = self.reference_labels[first : first + self._counts[source]]
            own = source == self._rank
            yield source, Sides(x, y, labels if own else self.labels, labels, self._itself if own else None)
            if step + 1 < ranks:
                _wait(on_their_way)
                y = following

    def exchange(self, sent: Tensor, received: Tensor, tag: int) -> list[Any]:
        """To the next rank and from the one before; nothing where there are no rows, which both ends know."""
        peers = [(self._rank + step) % len(self._counts) for step in (1, -1)]
        if self._group is not None:
            peers = [dist.get_global_rank(self._group, peer) for peer in peers]
        todo = [
            dist.P2POp(does, t, peer, self._group, tag)
            for does, t, peer in zip((dist.isend, dist.irecv), (sent, received), peers)
            if t.numel()
        ]
        return dist.batch_isend_irecv(todo) if todo else []

    def gradient(self, x: Tensor, of_block: _OfBlock, grads: Sequence[Tensor]) -> Tensor:
        """Of x (n, D), as anchors here and as references on all ranks, of what `of_block` makes of each block."""
        dtype = accumulation_dtype(x.dtype)
        total = torch.zeros_like(x, dtype=dtype)
        arriving = torch.zeros_like(x, dtype=dtype)
        on_their_way: list[Any] = []
        for source, block in self.blocks(x):
            rows, columns = (t.detach().requires_grad_() for t in (block.x, block.y))
            with torch.enable_grad():
                value = of_block(source, block._replace(x=rows, y=columns))
            of_rows, of_columns = torch.autograd.grad(value, (rows, columns), grads[source], allow_unused=True)
            total += of_rows
            leaving = torch.zeros_like(columns, dtype=dtype) if of_columns is None else of_columns.to(dtype)
            _wait(on_their_way)
            leaving = (leaving + arriving).contiguous()
            arriving = leaving.new_empty(self._counts[source - 1], x.shape[1])
            on_their_way = self.exchange(leaving, arriving, _GRADIENTS)
        _wait(on_their_way)
        return total.add_(arriving).to(x.dtype)

    def _of_blocks(self, of_block: _OfBlock) -> tuple[Tensor, ...]:
        """A vector of each rank's rows, in the order of the ranks."""
        return _OfBlocks.apply(self, of_block, self.x)


class _OfBlocks(torch.autograd.Function):
    """The backward computes the blocks again, since what they would save is as large as all of them."""

    @staticmethod
    def forward(ctx: Any, ring: Ring, of_block: _OfBlock, x: Tensor) -> tuple[Tensor, ...]:
        ctx.ring, ctx.of_block = ring, of_block
        device = x.device.type
        ctx.autocast = {"dtype": torch.get_autocast_dtype(device), "enabled": torch.is_autocast_enabled(device)}
        ctx.save_for_backward(x)
        found = dict(sorted((source, of_block(source, block)) for source, block in ring.blocks(x)))
        return tuple(found.values())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        with torch.autocast(x.device.type, **ctx.autocast):
            return None, None, ctx.ring.gradient(x, ctx.of_block, grads)


def _wait(works: list[Any]) -> None:
    for work in works:
        work.wait()
