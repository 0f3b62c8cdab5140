"""A training on several ranks, which torchrun starts: each embeds its share of every batch, and all see the same loss.

All ranks draw the same batches and the same augmentation from the same generator, exchange their embeddings, and
compute the loss of the whole batch, whatever the loss. So numbers are those of one process to rounding, but for batch
norms, which see a rank's share alone (their running statistics are averaged), and dropped features, which each rank
draws.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch import distributed as dist

from ..core.ranks import num_ranks
from ..core.ranks import own_rank as own_rank  # which the commands ask, too
from .errors import UserError
from .process import started_ranks
from .terminal import console


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Within this block the ranks that torchrun started are a process group, of which the first alone speaks."""
    if started_ranks() == 1:
        yield
        return
    on_gpus = device.startswith("cuda")
    if on_gpus:
        if device != "cuda":
            raise UserError(f"device: expected cuda, of which each rank takes its own, got {device}")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpus else "gloo")
    console.quiet = own_rank() > 0
    try:
        yield
    finally:
        console.quiet = False
        dist.destroy_process_group()


def check_batch(rows: int) -> None:
    """Refuse batches of which a rank would get no rows."""
    if rows < num_ranks():
        raise UserError(f"batch_size: expected at least a sample for each of {num_ranks()} ranks, got {rows}")


def replica(network: nn.Module) -> nn.Module:
    """The network as it is trained: on several ranks with their gradients averaged."""
    if num_ranks() == 1:
        return network
    return nn.parallel.DistributedDataParallel(network)


def embed_share(network: nn.Module, images: Tensor, generator: torch.Generator | None) -> Tensor:
    """Embeddings (B, D) of a batch (B, ...) by a `replica`, in which each rank computes its own rows."""
    if num_ranks() == 1:
        return network(images, generator)
    from ..distributed.collectives import replicate_rows, scale_gradient  # a second to import, which one rank saves

    if generator is not None:
        generator.manual_seed(generator.initial_seed() + own_rank())
    shares = images.tensor_split(num_ranks())
    embeddings = scale_gradient(network(shares[own_rank()], generator), num_ranks())  # the sum, of the average
    return replicate_rows(embeddings, [len(share) for share in shares])


def average_statistics(network: nn.Module) -> None:
    """Give the running statistics of all ranks their mean, so that they embed the same."""
    for statistics in network.buffers() if num_ranks() > 1 else ():
        if statistics.is_floating_point():
            dist.all_reduce(statistics)
            statistics.div_(num_ranks())


def together(stop: Callable[[], bool], device: torch.device) -> Callable[[], bool]:
    """Whether any rank was asked to stop: all of them have to stop after the same step."""
    if num_ranks() == 1:
        return stop

    def any_stops() -> bool:
        asked = torch.tensor(int(stop()), device=device)
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        return bool(asked)

    return any_stops
