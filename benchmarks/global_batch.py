"""Weak scaling of the losses on the global batch: 1, 2 and 4 gloo processes of one thread on this machine.

    python -m benchmarks.global_batch [--rounds 5] [--ranks 1 2 4] [--workloads supcon ntxent]

A step is a loss and the gradient of the own embeddings, and lasts until the last rank is done; its work is what all
ranks together compute. Implementations take turns. Where other programs run, or more processes than there are cores,
processes wait for cores: the work tells implementations apart, and nothing shows how they scale. Beside ours, gathered
and in a ring:

- `pml`: DistributedLossWrapper of pytorch-metric-learning around its loss. Every rank computes the global loss.
- `eager`: torch's differentiable all-gather, and the loss of the own rows in matrices B_r x B.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed.nn
from pytorch_metric_learning import losses as theirs
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from torch import Tensor
from torch import distributed as dist

from fused_margins import NTXentLoss, SupConLoss
from fused_margins.distributed import GlobalBatchLoss

WIDTH, SAMPLES_A_CLASS = 128, 4
ROWS = {"supcon": 1024, "ntxent": 128}  # of each rank
LEFT_OUT_BYTES = 3e9  # an implementation whose matrices are larger than that, on all ranks together

Step = Callable[[Tensor, Tensor], Tensor]


def eager(workload: str) -> Step:
    """The formula in matrices, of the own rows; the mean over all rows where every rank has as many."""

    def loss(x: Tensor, labels: Tensor) -> Tensor:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        every = torch.cat(torch.distributed.nn.all_gather(x))
        gathered = [torch.empty_like(labels) for _ in range(ranks)]
        dist.all_gather(gathered, labels)
        all_labels = torch.cat(gathered)
        u = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(every).T
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
            mean = torch.nn.functional.softplus(lse[:, None] - z)[positive]
        return mean.mean() / ranks

    return loss


def implementations(workload: str, rows: int, ranks: int) -> dict[str, Step]:
    """Those whose matrices fit, by name."""
    ours, peer = {
        "supcon": (lambda: SupConLoss(0.1), lambda: theirs.SupConLoss(temperature=0.1)),
        "ntxent": (lambda: NTXentLoss(0.07), lambda: theirs.NTXentLoss(temperature=0.07)),
    }[workload]
    everyone = rows * ranks
    pairs = everyone * (SAMPLES_A_CLASS - 1)
    # NTXent there makes a matrix of positive pairs x negative pairs on every rank: a mask, logits, their exponentials.
    matrices = pairs * everyone * (everyone - SAMPLES_A_CLASS) * 13 if workload == "ntxent" else everyone**2 * 20
    found: dict[str, Step] = {"gather": GlobalBatchLoss(ours()), "ring": GlobalBatchLoss(ours(), gather=False)}
    found["eager"] = eager(workload)
    if matrices * ranks <= LEFT_OUT_BYTES:
        found["pml"] = DistributedLossWrapper(peer())
    return found


def measure(workload: str, rank: int, ranks: int, rounds: int) -> dict[str, tuple[float, ...]]:
    """Of a step of each implementation the median time of the slowest rank, and of the work of all ranks, in s."""
    rows = ROWS[workload]
    draws = torch.Generator().manual_seed(rank)
    x = torch.randn(rows, WIDTH, generator=draws)
    # A class has its samples spread over the ranks as far as there are ranks.
    labels = (torch.arange(rows) * ranks + rank) // SAMPLES_A_CLASS
    steps = implementations(workload, rows, ranks)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for turn in range(rounds + 1):  # the first one warms up
        for name, step in steps.items():
            own = x.clone().requires_grad_()
            dist.barrier()
            begin = time.perf_counter(), time.process_time()
            step(own, labels).backward()
            end = time.perf_counter(), time.process_time()
            elapsed, work = (torch.tensor(b - a, dtype=torch.float64) for a, b in zip(begin, end))
            dist.all_reduce(elapsed, dist.ReduceOp.MAX)
            dist.all_reduce(work)
            if turn:
                seconds[name].append((elapsed.item(), work.item()))
    return {name: tuple(map(statistics.median, zip(*times))) for name, times in seconds.items()}


def _work(rank: int, ranks: int, store: str, workloads: list[str], rounds: int, pipe: Any) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)  # what the eager one takes is deprecated, and has no heir
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    for workload in workloads:
        found = measure(workload, rank, ranks, rounds)
        if rank == 0:
            pipe.send(found)
    dist.barrier()
    os._exit(0)


def run(ranks: int, workloads: list[str], rounds: int) -> dict[str, dict[str, tuple[float, ...]]]:
    """What `measure` says, by workload."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fused_margins.distributed", "pytorch_metric_learning.losses", "torch._dynamo"])
    receive, send = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, f"{folder}/store", workloads, rounds, send)
        workers = [context.Process(target=_work, args=(rank, *arguments), daemon=True) for rank in range(ranks)]
        for worker in workers:
            worker.start()
        send.close()
        try:
            return {workload: receive.recv() for workload in workloads}
        finally:
            for worker in workers:
                worker.join(10)
                worker.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--workloads", nargs="+", choices=list(ROWS), default=list(ROWS))
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}", flush=True)
    for ranks in options.ranks:
        for workload, found in run(ranks, options.workloads, options.rounds).items():
            print(f"{workload}, {ranks} ranks of {ROWS[workload]} rows")
            for name, numbers in found.items():
                ratios = [number / ours for number, ours in zip(numbers, found["gather"])]
                (time_s, work_s), (by_time, by_work) = numbers, ratios
                time_of_step = f"time {time_s * 1e3:8.1f} ms ({by_time:6.2f} x gather)"
                print(f"  {name:7}{time_of_step}, work {work_s * 1e3:8.1f} ms ({by_work:6.2f} x gather)", flush=True)


if __name__ == "__main__":
    main()
