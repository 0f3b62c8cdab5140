"""The same bits in every repeat, whatever else the device does: ``python -m tests.gpu.determinism``.

At the sizes that are measured, forward and backward. Between the repeats another stream keeps the device busy, so that
blocks run in other orders and on other multiprocessors.
"""

import argparse
import itertools
import sys

import torch

from fused_margins.backends import registry
from fused_margins.ops import cases

from .sanitize import refusal

REPEATS = 20
DTYPES = (torch.float32, torch.bfloat16)


def disturb(stream: "torch.cuda.Stream", repeat: int) -> None:
    with torch.cuda.stream(stream):
        t = torch.randn(256 + 64 * repeat, 512, device="cuda")
        for _ in range(repeat % 4):
            t = (t @ t.T @ t).tanh()


def differing(op: str, inputs: cases.Inputs, backend: str, repeats: int) -> dict[str, int]:
    """The outputs and gradients that were not the first call's bits, and how often."""
    module = cases.load(op)
    stream = torch.cuda.Stream() if inputs["x"].device.type == "cuda" else None
    first = cases.evaluate(module, inputs, backend)
    found: dict[str, int] = {}
    for repeat in range(1, repeats):
        if stream is not None:
            disturb(stream, repeat)
        for name, result in cases.evaluate(module, inputs, backend).items():
            if not torch.equal(result, first[name]):
                found[name] = found.get(name, 0) + 1
    return found


def main() -> None:
    backends = [b.name for b in registry.BACKENDS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", default=["cuda", "triton"], choices=backends, metavar="NAME")
    parser.add_argument("--ops", nargs="+", default=list(registry.OPS), choices=list(registry.OPS), metavar="NAME")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=REPEATS)
    arguments = parser.parse_args()
    faults, ran = [], dict.fromkeys(arguments.backends, 0)
    problems = itertools.product(arguments.backends, arguments.ops, DTYPES)
    for backend, op, dtype in problems:
        for shape in cases.load(op).SHAPES:
            inputs = cases.load(op).make_benchmark(shape, dtype, torch.Generator().manual_seed(0))
            if refusal(op, backend, arguments.device, inputs) is not None:
                continue
            found = differing(op, cases.convert(inputs, dtype, arguments.device), backend, arguments.repeats)
            faults += [
                f"{backend}, {op}, {shape.name}, {dtype}: {name}: {count} of {arguments.repeats} repeats differ"
                for name, count in found.items()
            ]
            ran[backend] += 1
    print("\n".join(faults) or f"the same bits in {arguments.repeats} repeats: {ran}")
    if nothing := [name for name, count in ran.items() if not count]:
        sys.exit(f"{', '.join(nothing)} ran nothing on {arguments.device}")
    if faults:
        sys.exit(1)


if __name__ == "__main__":
    main()
