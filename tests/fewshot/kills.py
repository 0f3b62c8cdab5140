"""A program: a training and a study of two workers are killed at random moments, until they end with the same bits.

python -m tests.fewshot.kills [--kills 25] [--seed 0]
"""

import argparse
import contextlib
import io
import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch._dynamo  # which the first optimizer imports, for seconds

from fused_margins.fewshot import cli, trainer
from fused_margins.fewshot.runs import Run

SMALL = ["--backbone", "convnet", "--blocks", "2", "--channels", "8", "--embedding-size", "8", "--episodes", "20"]
TRAIN = ["train", "--dataset", "digits", "--loss", "triplet", "--epochs", "12", *SMALL, "--threads", "1"]
STUDY = ["sweep", "--dataset", "digits", "--margin", "-0.1", "0.1", "--seeds", "0", "1", "2", "--epochs", "6", *SMALL]


def start(arguments: list[str]) -> int:
    """A child that runs the command, with children of its own as one group."""
    child = os.fork()
    if child:
        return child
    os.setsid()
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        code = cli.main(arguments)
    if code:
        os.write(2, said.getvalue().encode())
    os._exit(code)


def ended_within(child: int, seconds: float) -> int | None:
    """The exit code, None if it runs on."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def bits(folder: Path) -> dict[str, object]:
    """Of every run below the folder: figures, losses, and the numbers of its checkpoint."""
    found: dict[str, object] = {}
    for file in sorted(folder.rglob("checkpoint.pt")):
        run = Run(file.parent)
        states: list[dict[str, object]] = []
        run.load_checkpoint(states.append)
        figures = json.dumps(run.result()["figures"], sort_keys=True)
        model = b"".join(t.numpy().tobytes() for t in states[0]["model"].values())  # type: ignore[attr-defined]
        found[str(file.parent.relative_to(folder))] = figures, run.read_metrics(), model
    return found


def killed_until_done(
    arguments: Callable[[Path], list[str]], folder: Path, kills: int, moment: Callable[[], float]
) -> int:
    """Kill the command at random moments, at most so often, and call it again until it has ended; how many kills."""
    killed = 0
    while True:
        child = start(arguments(folder))
        if killed < kills:
            code = ended_within(child, moment())
            if code is None:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                killed += 1
                continue
        else:
            code = ended_within(child, 600)
        if code != 0:
            raise SystemExit(f"after {killed} kills: {' '.join(arguments(folder))} ended with {code}")
        return killed


def train(folder: Path) -> list[str]:
    begun = (folder / "run" / "config.json").exists() and (folder / "run" / "checkpoint.pt").exists()
    if begun:
        return ["train", "--resume", "--output", str(folder / "run")]
    # Killed between its first two files, a run is none yet; whoever starts it again chooses a new folder, or this.
    if (folder / "run").exists():
        for file in (folder / "run").iterdir():
            file.unlink()
    return [*TRAIN, "--output", str(folder / "run")]


def study(folder: Path) -> list[str]:
    return [*STUDY, "--workers", "2", "--output", str(folder / "study")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    trainer.CHECKPOINT_SECONDS = 0.1  # so that a run of seconds has many
    for arguments in (train, study):
        with tempfile.TemporaryDirectory() as scratch:
            whole, begin = Path(scratch) / "whole", time.monotonic()
            if ended_within(start(arguments(whole)), 600) != 0:
                raise SystemExit(f"{arguments.__name__} fails by itself")
            longest = time.monotonic() - begin
            expected, killed, times = bits(whole), 0, 0
            while killed < options.kills:
                folder = Path(scratch) / f"killed{times}"
                killed += killed_until_done(
                    arguments, folder, options.kills - killed, lambda longest=longest: draw.uniform(0, longest)
                )
                times += 1
                if bits(folder) != expected:
                    raise SystemExit(
                        f"{arguments.__name__}: after {killed} kills in all, other bits than uninterrupted"
                    )
            print(f"{arguments.__name__}: {killed} kills in {times} runs, the same bits", flush=True)


if __name__ == "__main__":
    main()
