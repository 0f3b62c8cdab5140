"""Every op of a backend once on small awkward problems, for compute-sanitizer: ``python -m tests.gpu.sanitize``.

The cases are those of the parity tests, forward and backward, and labels out of range. What is finite in the
definition's results must be finite, what is not must not be; the values are the parity tests' business. The definition
runs on the CPU, so that the GPU runs hardly anything but the kernels.
"""

import argparse
import sys
from typing import Any

import torch
from torch import Tensor

import fused_margins.functional  # noqa: F401  # every op registers itself
from fused_margins.backends import registry
from fused_margins.ops import cases

DTYPES = (torch.float32, torch.bfloat16)
INDICES = ("target", "self_index", "clusters")  # fields whose values are numbers of columns
BAD = (-7, 2**31, 2**40, -(2**62))  # numbers of no column; -1 is none


def refusal(op: str, backend: str, device: str, inputs: cases.Inputs) -> str | None:
    """Why a backend cannot run these inputs there, or None."""
    row = next(b for b in registry.BACKENDS if b.name == backend)
    shell: Any = registry.OPS[op]
    problem = shell.problem(shell.checked(shell.arguments(**inputs)))
    return registry.refusal(row, problem._replace(device=device))


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
    """A row of an index out of range is NaN, or draws nothing; the others are not. On a CPU it may be an IndexError."""
    module = cases.load(op)
    for field in INDICES:
        inputs = _with_index(op, field, backend, device)
        if inputs is None:
            continue
        index = inputs[field]
        bad = torch.arange(len(index)) % 9 == 4
        wrong = inputs | {field: torch.where(bad, torch.tensor(BAD).repeat(len(index))[: len(index)], index.long())}
        try:
            results = cases.evaluate(module, cases.convert(wrong, torch.float32, device), backend)
        except IndexError:
            assert device == "cpu", op
            continue
        expected = bad | _is_marked(cases.evaluate(module, inputs, "reference"))
        differs = _is_marked(results) != expected
        # A sample of no cluster leaves nothing certain about the others: means and variance are of all of them.
        assert not (differs[bad] if field == "clusters" else differs).any(), (
            f"{op}, {field}: rows {differs.nonzero()[:, 0].tolist()}"
        )


def _with_index(op: str, field: str, backend: str, device: str) -> cases.Inputs | None:
    """The first case that has the field and a result for each of several rows."""
    for case in cases.load(op).CASES:
        inputs = cases.convert(case.make(torch.Generator().manual_seed(0)), torch.float32)
        if field not in inputs or len(inputs["x"]) < 9:
            continue
        if "reduction" in inputs:
            inputs["reduction"] = "none"
        results = cases.evaluate(cases.load(op), inputs, "reference", gradients=False)
        if all(t.dim() for t in results.values()) and refusal(op, backend, device, inputs) is None:
            return inputs
    return None


def _is_marked(results: dict[str, Tensor]) -> Tensor:
    """The rows of the first output that are NaN, or -1 where it is an index."""
    first = next(iter(results.values())).cpu()
    first = first.reshape(first.shape[0], -1)
    return (first.isnan() if first.is_floating_point() else first == -1).any(1)


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
