"""A program: random cases, each a function of the seed and its number, so that whatever it finds can be replayed.

``python -m tests.fuzz`` runs all of them and ends with 1 where it found something; each finding comes with the command
that replays it.
"""

import argparse
import sys
import time

import torch

from . import calls, files, ops
from .children import run

# Cases, and how many a child runs: what happens in one is not to hide in what came before.
PARTS = {"calls": (calls.case, 20_000, 500), "ops": (ops.case, 5_000, 500), "files": (files.case, 2_000, 50)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    for part, (_, count, _) in PARTS.items():
        parser.add_argument(f"--{part}", type=int, nargs="?", const=count, metavar="COUNT", help=f"{count} if not said")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no child after so long")
    arguments = vars(parser.parse_args())
    counts = {part: arguments[part] for part in PARTS}
    if not any(counts.values()):
        counts = {part: count for part, (_, count, _) in PARTS.items()}
    torch.set_num_threads(1)  # no pool that a child would miss
    begin, findings = time.monotonic(), 0
    for part, count in counts.items():
        if not count:
            continue
        case, _, of_child = PARTS[part]
        if part == "files":
            files.trained()  # before there are children
        numbers = range(arguments["first"], arguments["first"] + count)
        before, done = time.monotonic(), 0
        while done < count and time.monotonic() - begin < arguments["seconds"]:
            children = numbers[done : done + of_child]
            for number, text in run(case, arguments["seed"], children):
                findings += 1
                print(f"{part} {number}: {text}")
                command = f"python -m tests.fuzz --{part} 1 --seed {arguments['seed']} --first {number}"
                print(f"  again: {command} (in a child that began with {children[0]})", flush=True)
            done += len(children)
        print(f"{part}: {done} of {count} cases in {time.monotonic() - before:.0f} s", flush=True)
    print(f"{findings} findings")
    return int(findings > 0)


if __name__ == "__main__":
    sys.exit(main())
