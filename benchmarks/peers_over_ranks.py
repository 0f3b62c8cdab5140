"""What others compute over the ranks of a process group, written down for the benchmark.

Each takes the embeddings (n, D) and labels (n,) of its rank and gives a loss whose gradients are those of the mean over
all rows, times the number of ranks where the original has them so.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed.nn
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

Step = Callable[[Tensor, Tensor], Tensor]


def gathered_labels(labels: Tensor) -> Tensor:
    every = [torch.empty_like(labels) for _ in range(dist.get_world_size())]
    dist.all_gather(every, labels)
    return torch.cat(every)


def eager_pairs(workload: str) -> Step:
    """SupCon or NT-Xent in matrices, of the own rows; the mean over all rows where every rank has as many."""

    def loss(x: Tensor, labels: Tensor) -> Tensor:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        every = torch.cat(torch.distributed.nn.all_gather(x))
        all_labels = gathered_labels(labels)
        u = F.normalize(x) @ F.normalize(every).T
        itself = torch.arange(len(every)) == torch.arange(len(x))[:, None] + rank * len(x)
        same = labels[:, None] == all_labels
        positive = same & ~itself
        if workload == "supcon":
            z = u / 0.1
            lse = z.masked_fill(itself, -math.inf).logsumexp(1)
            mean = ((lse[:, None] - z) * positive).sum(1) / positive.sum(1)
        else:
            z = u / 0.07
            lse = z.masked_fill(same, -math.inf).logsumexp(1)
            mean = F.softplus(lse[:, None] - z)[positive]
        return mean.mean() / ranks

    return loss


class EagerClasses(nn.Module):
    """Cosine logits (B, C_local) of all rows with the own classes by PyTorch, log-sum-exps combined over ranks."""

    def __init__(self, weight: Tensor, first: int, scale: float, margin: float) -> None:
        super().__init__()
        self.weight, self.first, self.scale, self.margin = nn.Parameter(weight), first, scale, margin

    def logits(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of all rows; the rows whose class is here, and its column."""
        column = gathered_labels(labels) - self.first
        here = ((column >= 0) & (column < len(self.weight))).nonzero()[:, 0]
        return F.linear(F.normalize(x), F.normalize(self.weight)), here, column[here]

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        z, here, column = self.logits(torch.cat(torch.distributed.nn.all_gather(x)), labels)
        margins = torch.zeros_like(z)
        margins[here, column] = self.margin
        z = self.scale * (z - margins)
        largest = z.detach().max(1).values
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        total = torch.distributed.nn.all_reduce((z - largest[:, None]).exp().sum(1))
        own = torch.distributed.nn.all_reduce(z.new_zeros(len(z)).index_put((here,), z[here, column]))
        return (largest + total.log() - own).mean() / dist.get_world_size()


class PartialFC(EagerClasses):
    """As insightface publishes it (An et al., 2022): cosines in a matrix (B, C_local), its softmax in another.

    The gradient of the embeddings is the sum over ranks times their number, which DDP divides by. The margin is that of
    CosFace, the cheapest of its heads.
    """

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        z, here, column = self.logits(_GatherRows.apply(x), labels)
        z = z.clamp(-1, 1)
        z[here, column] = z[here, column] - self.margin
        return _CrossEntropyOverRanks.apply(self.scale * z, here, column)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        every = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(every, x)
        return torch.cat(every)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        parts = [part.contiguous() for part in grad.chunk(dist.get_world_size())]
        for work in [dist.reduce(part, rank, async_op=True) for rank, part in enumerate(parts)]:
            work.wait()
        return parts[dist.get_rank()] * dist.get_world_size()


class _CrossEntropyOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, here: Tensor, column: Tensor) -> Tensor:
        largest = z.max(1, keepdim=True).values
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        p = z.sub_(largest).exp_()
        total = p.sum(1, keepdim=True)
        dist.all_reduce(total)
        p.div_(total)
        own = p.new_zeros(len(p)).index_put((here,), p[here, column])
        dist.all_reduce(own)
        ctx.save_for_backward(p, here, column)
        return -own.clamp_min(1e-30).log().mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        p, here, column = ctx.saved_tensors
        one_hot = torch.zeros(len(here), p.shape[1]).scatter_(1, column[:, None], 1)
        p[here] -= one_hot
        return p.div_(len(p)) * grad, None, None
