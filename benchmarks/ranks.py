"""Losses over 1, 2 and 4 gloo processes of one thread on this machine, beside what others compute there.

    python -m benchmarks.ranks [--rounds 5] [--ranks 1 2 4] [--workloads supcon ntxent classes classes-strong] [--write]

A step is a loss and all its gradients, and lasts until the last rank is done; its work is the CPU time of all ranks
together. Implementations take turns, and what they return is compared first. Where other programs run, or more
processes than there are cores, processes wait for cores: the work tells implementations apart, and nothing shows how
they scale. Memory is what a step adds at its peak to the rank that takes most.

- `supcon`, `ntxent`: the global batch, with as many rows on each rank (weak scaling). Ours gathered and in a ring;
  `pml`: DistributedLossWrapper of pytorch-metric-learning; `eager`: torch's all-gather, own rows in matrices.
- `classes`: a softmax over 200,000 classes of width 512, cut over the ranks, 128 rows on each (weak scaling), or, for
  `classes-strong`, 256 rows on all together; `partial-fc`: insightface's algorithm; `eager`: the same by PyTorch.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pytorch_metric_learning import losses as theirs
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from torch import Tensor
from torch import distributed as dist

from fused_margins import NTXentLoss, SupConLoss
from fused_margins.distributed import GlobalBatchLoss, ShardedMarginSoftmaxLoss

from . import machine, memory
from .peers_over_ranks import EagerClasses, PartialFC, Step, eager_pairs

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks" / "ranks.md"
SAMPLES_A_CLASS = 4
CLASSES, SCALE, MARGIN = 200_000, 64.0, 0.4
WIDTH = {"supcon": 128, "ntxent": 128, "classes": 512, "classes-strong": 512}
ROWS = {"supcon": 1024, "ntxent": 128, "classes": 128}  # of each rank
ALL_ROWS = {"classes-strong": 256}
LEFT_OUT_BYTES = 3e9  # an implementation whose matrices are larger than that, on all ranks together


class Figures(NamedTuple):
    """Medians over rounds: seconds of the slowest rank, seconds of CPU of all ranks; and the most bytes of a rank."""

    time_s: float
    work_s: float
    peak_bytes: float


def rows_of(workload: str, ranks: int) -> int:
    return ALL_ROWS[workload] // ranks if workload in ALL_ROWS else ROWS[workload]


def pair_losses(workload: str, rows: int, ranks: int) -> dict[str, Step]:
    """Those whose matrices fit, by name, ours first."""
    ours, peer = {
        "supcon": (lambda: SupConLoss(0.1), lambda: theirs.SupConLoss(temperature=0.1)),
        "ntxent": (lambda: NTXentLoss(0.07), lambda: theirs.NTXentLoss(temperature=0.07)),
    }[workload]
    everyone = rows * ranks
    pairs = everyone * (SAMPLES_A_CLASS - 1)
    # NTXent there makes a matrix of positive pairs x negative pairs on every rank: a mask, logits, their exponentials.
    matrices = pairs * everyone * (everyone - SAMPLES_A_CLASS) * 13 if workload == "ntxent" else everyone**2 * 20
    found: dict[str, Step] = {"gather": GlobalBatchLoss(ours()), "ring": GlobalBatchLoss(ours(), gather=False)}
    found["eager"] = eager_pairs(workload)
    if matrices * ranks <= LEFT_OUT_BYTES:
        found["pml"] = DistributedLossWrapper(peer())
    return found


def class_losses() -> dict[str, Step]:
    """By name, ours first, all with the same weight."""
    sharded = ShardedMarginSoftmaxLoss(CLASSES, WIDTH["classes"], scale=SCALE, margin=MARGIN)
    weight = sharded.weight.to_local().detach()
    first = dist.get_rank() * -(-CLASSES // dist.get_world_size())
    peers = {"eager": EagerClasses, "partial-fc": PartialFC}
    return {"sharded": sharded, **{name: kind(weight, first, SCALE, MARGIN) for name, kind in peers.items()}}


def measure(workload: str, rank: int, ranks: int, rounds: int) -> dict[str, Figures]:
    """Of a step of each implementation."""
    rows = rows_of(workload, ranks)
    draws = torch.Generator().manual_seed(rank)
    x = torch.randn(rows, WIDTH[workload], generator=draws)
    if workload.startswith("classes"):
        steps, labels = class_losses(), torch.randint(CLASSES, (rows,), generator=draws)
    else:
        steps = pair_losses(workload, rows, ranks)
        # A class has its samples spread over the ranks as far as there are ranks.
        labels = (torch.arange(rows) * ranks + rank) // SAMPLES_A_CLASS
    found: dict[str, Tensor] = {}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}

    def once(name: str) -> None:
        own = x.clone().requires_grad_()
        for parameter in getattr(steps[name], "parameters", list)():
            parameter.grad = None
        steps[name](own, labels).backward()
        found[name] = own.grad / own.grad.norm()  # some multiply it by the number of ranks

    peaks = {}
    for name in steps:  # which also warms up
        growth = torch.tensor(memory.peak_growth(lambda name=name: once(name), calls=1), dtype=torch.float64)
        dist.all_reduce(growth, dist.ReduceOp.MAX)
        peaks[name] = growth.item()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, found[next(iter(found))], rtol=1e-3, atol=1e-5, msg=f"{name}: wrong")
    for _ in range(rounds):
        for name in steps:
            dist.barrier()
            begin = time.perf_counter(), time.process_time()
            once(name)
            end = time.perf_counter(), time.process_time()
            elapsed, work = (torch.tensor(b - a, dtype=torch.float64) for a, b in zip(begin, end))
            dist.all_reduce(elapsed, dist.ReduceOp.MAX)
            dist.all_reduce(work)
            seconds[name].append((elapsed.item(), work.item()))
    return {name: Figures(*map(statistics.median, zip(*times)), peaks[name]) for name, times in seconds.items()}


def _work(rank: int, ranks: int, store: str, workloads: list[str], rounds: int, pipe: Any) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)  # what the eager ones take is deprecated, without an heir
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    for workload in workloads:
        found = measure(workload, rank, ranks, rounds)
        if rank == 0:
            pipe.send(found)
    dist.barrier()
    os._exit(0)


def run(ranks: int, workloads: list[str], rounds: int) -> dict[str, dict[str, Figures]]:
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


def table_of(workload: str, ranks: int, found: dict[str, Figures]) -> str:
    """Markdown; ratios are to ours, the first."""
    ours = next(iter(found.values()))
    lines = [f"**{workload}**, {ranks} {'rank' if ranks == 1 else 'ranks'} of {rows_of(workload, ranks)} rows", ""]
    lines += ["| | step, ms | over ours | CPU of all ranks, ms | over ours | peak memory of a rank, MiB | over ours |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|"]
    for name, figures in found.items():
        shown = (f"{value * unit:.1f}" for value, unit in zip(figures, (1e3, 1e3, 2**-20)))
        ratios = (f"{a / b:.2f}×" if b else "—" for a, b in zip(figures, ours))
        lines.append(f"| {name} | {' | '.join(f'{a} | {b}' for a, b in zip(shown, ratios))} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--workloads", nargs="+", choices=list(WIDTH), default=list(WIDTH))
    parser.add_argument("--write", action="store_true", help=f"also write {PAGE.name}")
    options = parser.parse_args()
    with_ = machine.RunsWith.now("cpu")
    measured = f"{with_.date}, commit {with_.commit}, {machine.this_machine('cpu').name}, torch {torch.__version__}"
    measured += f", beside a load of {with_.load_before:.1f}"
    head = f"# Many ranks\n\nWritten by `python -m benchmarks.ranks --write`. Measured {measured}.\n"
    parts = [head, f"{(__doc__ or '').split(chr(10) * 2, 2)[2]}\n"]
    for part in parts:
        print(part)
    for workload in options.workloads:
        for ranks in options.ranks:
            parts.append(table_of(workload, ranks, run(ranks, [workload], options.rounds)[workload]))
            print(parts[-1], flush=True)
    if options.write:
        PAGE.write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
