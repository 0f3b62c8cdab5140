"""A program: what steps on 1 and 2 processes of one thread take, beside what is planned for them.

python -m tests.distributed.planned
"""

import tempfile
import time
from pathlib import Path

import torch

from fused_margins.distributed import ShardedMarginSoftmaxLoss
from fused_margins.distributed.plan import measured, plan

from . import ranks

SIZES = ((20_000, 512, 128), (50_000, 512, 128), (50_000, 128, 256), (200_000, 512, 128))  # classes, width, rows a rank
STEPS, SLOW_AT_FIRST = 9, 2


def median_step(rank: int, classes: int, width: int, rows: int) -> float:
    """Seconds, with SGD and momentum."""
    loss = ShardedMarginSoftmaxLoss(classes, width, margin=0.1)
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1, momentum=0.9)
    x, labels = torch.randn(rows, width, requires_grad=True), torch.randint(classes, (rows,))
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        optimizer.zero_grad()
        loss(x, labels).backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    times = sorted(times[SLOW_AT_FIRST:])
    return times[len(times) // 2]


def main() -> None:
    torch.set_num_threads(1)
    for num_ranks in (1, 2):
        for classes, width, rows in SIZES:
            planned = sum(plan(classes, width, num_ranks, rows, measured(width, rows * num_ranks)).seconds.values())
            with tempfile.TemporaryDirectory() as folder:
                took = max(ranks.run(median_step, num_ranks, Path(folder), classes, width, rows))
            of = f"{num_ranks} ranks, {classes} classes, width {width}, {rows} rows a rank"
            print(f"{of}: planned {planned:.3f} s, took {took:.3f} s, {took / planned:.2f}", flush=True)


if __name__ == "__main__":
    main()
