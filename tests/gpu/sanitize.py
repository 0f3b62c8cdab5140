"""Every op of a backend once on small awkward problems, for compute-sanitizer: ``python -m tests.gpu.sanitize``.

The cases are those of the parity tests, forward and backward, and labels out of range. What is finite in the
definition's results must be finite, what is not must not be; the values are the parity tests' business. The definition
runs on the CPU, so that the GPU runs hardly anything but the kernels.
"""

import argparse
import sys

import torch
from torch import Tensor

from fused_margins.ops import cases, registry

DTYPES = (torch.float32, torch.bfloat16)
BAD = (-7, 5, 2**40, -(2**63))  # out of range for 5 columns; -1 is none


def refusal(op: str, backend: str, device: str, inputs: cases.Inputs) -> str | None:
    row = next(b for b in registry.BACKENDS if b.name == backend)
    x, columns = inputs["x"], inputs.get("y", inputs.get("cluster_labels"))
    relation = inputs.get("relation", "same" if op == "nearest" else "different")
    return registry.refusal(row, registry.Problem(op, device, x.dtype, x.shape[0], len(columns), x.shape[1], relation))


def check_cases(op: str, backend: str, device: str) -> int:
    """How many problems ran."""
    module, ran = cases.load(op), 0
    for dtype in DTYPES:
        for case in module.CASES:
            inputs = cases.convert(case.make(torch.Generator().manual_seed(0)), dtype)
            if refusal(op, backend, device, inputs) is not None:
                continue
            expected = cases.evaluate(module, inputs, "reference")
            results = cases.evaluate(module, cases.convert(inputs, dtype, device), backend)
            for name, result in results.items():
                where = f"{op}, {case.name}, {dtype}: {name}"
                assert result.shape == expected[name].shape, where
                assert torch.equal(result.cpu().isfinite(), expected[name].isfinite()), (
                    f"{where}: not finite, or finite"
                )
            ran += 1
    return ran


def check_bad_labels(op: str, backend: str, device: str) -> None:
    """A row of a label out of range is NaN, or draws nothing; the others are not. On a CPU it may be an IndexError."""
    rows, columns, width = 37, 5, 19
    bad = torch.arange(rows) % 9 == 4
    labels = torch.where(bad, torch.tensor(BAD).repeat(rows)[:rows], torch.arange(rows) % columns)
    x, y = torch.randn(rows, width), torch.randn(columns, width)
    inputs: cases.Inputs = {"x": x, "y": y, "target": labels, "scale": 4.0}
    if op in ("draw", "nearest"):
        inputs = {"x": x, "y": y, "row_labels": torch.arange(rows) % 2, "column_labels": torch.arange(columns) % 2}
        inputs |= {"self_index": labels} | ({"seed": torch.tensor(3)} if op == "draw" else {})
    elif op == "magnet":
        inputs = {"x": x, "clusters": labels, "cluster_labels": torch.arange(columns) % 2, "alpha": 3.0}
    if op in ("margin_softmax", "magnet"):
        inputs["reduction"] = "none"
    module = cases.load(op)
    if refusal(op, backend, device, inputs) is not None:
        return
    try:
        results = cases.evaluate(module, cases.convert(inputs, torch.float32, device), backend)
    except IndexError:
        assert device == "cpu", op
        return
    of_row: Tensor = results[module.OUTPUTS[0]].cpu().reshape(rows, -1)
    # A sample of no cluster leaves nothing certain about the others: means and variance are of all of them.
    marked = of_row == -1 if op == "draw" else of_row.isnan()
    wrong = marked.any(1) != bad
    assert not (wrong[bad] if op == "magnet" else wrong).any(), f"{op}: rows {wrong.nonzero()[:, 0].tolist()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="cuda", choices=[b.name for b in registry.BACKENDS])
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    total = 0
    for op in registry.OPS:
        ran = check_cases(op, arguments.backend, arguments.device)
        if ran:
            check_bad_labels(op, arguments.backend, arguments.device)
        print(f"{op}: {ran} problems", flush=True)
        total += ran
    if arguments.device == "cuda":
        torch.cuda.synchronize()
    if not total:
        sys.exit(f"backend {arguments.backend} ran nothing on {arguments.device}")


if __name__ == "__main__":
    main()
