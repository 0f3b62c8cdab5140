"""One of four ranks is killed at a random moment: the others end with an error, and the last checkpoint is whole.

python -m tests.distributed.faults [repetitions]
"""

import pickle
import random
import sys
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fused_margins.distributed import ShardedMarginSoftmaxLoss, load_checkpoint, save_checkpoint

from . import ranks
from .test_recipes import whole

RANKS, STEPS, TIMEOUT_S, CLASSES = 4, 200, 10.0, 1000


def made() -> tuple[nn.ModuleDict, torch.optim.Optimizer]:
    torch.manual_seed(0)
    both = nn.ModuleDict({"loss": ShardedMarginSoftmaxLoss(CLASSES, 32, margin=0.2, scale=8.0)})
    return both, torch.optim.AdamW(both.parameters(), lr=0.01)


def train(rank: int, folder: str, first: int, last: int) -> list[Tensor]:
    """Steps with a checkpoint after each; the weight after each, of which a sum will do."""
    both, optimizer = made()
    if first:
        assert load_checkpoint(folder, both, optimizer, step=0) == {"step": first}
    sums = [whole(both["loss"].weight).double().sum()]
    for step in range(first, last):
        draws = torch.Generator().manual_seed(step * RANKS + rank)
        optimizer.zero_grad()
        x = torch.randn(8, 32, generator=draws, requires_grad=True)
        both["loss"](x, torch.randint(CLASSES, (8,), generator=draws)).backward()
        optimizer.step()
        save_checkpoint(folder, both, optimizer, step=step + 1)
        sums.append(whole(both["loss"].weight).double().sum())
    return sums


def last_step(rank: int, folder: str) -> tuple[int, Tensor]:
    both, optimizer = made()
    return load_checkpoint(folder, both, optimizer, step=0)["step"], whole(both["loss"].weight).double().sum()


def kill_one(folder: Path, draws: random.Random) -> tuple[int, float, list[str]]:
    """Which rank was killed, after how many seconds, and what the others said, all within the time-out."""
    checkpoint = folder / "last"
    workers, pipes = ranks.start(train, RANKS, folder, str(checkpoint), 0, STEPS, timeout_s=TIMEOUT_S)
    try:
        while not (checkpoint / ".metadata").exists():
            time.sleep(0.01)
        victim, after = draws.randrange(RANKS), draws.uniform(0.0, 2.0)
        time.sleep(after)
        workers[victim].kill()
        began, said = time.monotonic(), []
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank != victim}
        while waiting:
            ready = wait(list(waiting), timeout=3 * TIMEOUT_S)
            assert ready, f"ranks {sorted(waiting.values())} did not end within {3 * TIMEOUT_S} s"
            for pipe in ready:
                rank = waiting.pop(pipe)  # type: ignore[call-overload]
                ended_well, result = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
                assert not ended_well, f"rank {rank} ended without an error"
                said.append(result.strip().splitlines()[-1])
        assert time.monotonic() - began < 3 * TIMEOUT_S
        return victim, after, said
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def main(repetitions: int) -> None:
    draws = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "whole")
        folder.mkdir()
        expected = ranks.run(train, RANKS, folder, str(folder / "last"), 0, STEPS // 4, limit_s=600.0)[0]
        for i in range(repetitions):
            folder = Path(name, str(i))
            folder.mkdir()
            victim, after, said = kill_one(folder, draws)
            found: list[Any] = ranks.run(last_step, RANKS - 1, folder, str(folder / "last"))
            step, total = found[0]
            if step < len(expected):
                torch.testing.assert_close(total, expected[step])
            known = "compared" if step < len(expected) else "beyond what is compared"
            print(
                f"{i}: rank {victim} killed after {after:.2f} s; step {step} is whole ({known}); {said[0][:90]}",
                flush=True,
            )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
