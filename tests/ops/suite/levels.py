"""A program: every case on each of some instruction sets, ``python -m tests.ops.suite.levels baseline v3``.

The C++ module chooses its instruction set once a process: each has a fork. What the definition says is computed before
them, once for all.
"""

import itertools
import os
import sys

import torch

from fused_margins.backends import budget, cpu, registry
from fused_margins.ops.cases import Case, Expected
from tests.conftest import poison_memory
from tests.forks import Forked
from tests.ops.suite import test_memory, test_parity
from tests.ops.suite.problems import OPS, make, refusal

LEVELS = {
    "baseline": "baseline",
    "v3": "x86-64-v3",
    "v4": "x86-64-v4",
    "v4-bf16": "x86-64-v4 with AVX512_BF16",
    "amx": "x86-64-v4 with AMX",
}
ON_CPU = [op for op in OPS if registry.has_kernel(op, "cpu")]


def check(level: str, of_cases: list[tuple[str, Case, Expected]]) -> None:
    """Parity, and that no bit of a gradient depends on what is saved."""
    os.environ["FUSED_MARGINS_ISA"] = level
    assert cpu.module is not None
    try:
        assert cpu.module.instruction_set() == LEVELS[level]
    except ValueError as error:
        print(error)
        return
    dtypes = [torch.bfloat16] if level == "v4-bf16" else test_parity.DTYPES  # else it is v4
    for op, case, of in of_cases:
        if of.dtype in dtypes and not refusal(op, of.rounded, "cpu"):
            test_parity.assert_agrees(op, case, "cpu", of)
    for op, backend in test_memory.PAIRS:
        if backend == "cpu":
            test_memory.test_the_memory_budget_changes_no_bit_of_a_gradient(op, backend)
            for dtype, num_bytes in itertools.product({torch.float64, torch.bfloat16} & {*dtypes}, test_memory.BUDGETS):
                with budget.within_memory_budget(num_bytes):
                    test_memory.test_a_forward_saves_as_much_as_its_kernel_says(op, backend, dtype, num_bytes)
    print("done")


def main(levels: list[str]) -> None:
    torch.set_num_threads(1)
    poison_memory()
    of_cases = [
        (op, case, Expected(OPS[op], make(case), dtype, exact=case.exact))
        for op in ON_CPU
        for case in OPS[op].CASES
        for dtype in test_parity.DTYPES
    ]
    for _, _, of in of_cases:  # and so is what is granted
        for name, truth in of.truth.items():
            if truth.is_floating_point():
                of.granted(name, 0.0)
    for level in levels:
        code, printed = Forked(check, level, of_cases).result(300)
        print(f"{level}: {printed}" if code == 0 else f"{level}: exit {code}\n{printed}", end="", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
