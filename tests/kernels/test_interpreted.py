"""The Triton kernels without a GPU: interpreted against the definition, in processes of their own, and compiled.

Interpreted and compiled kernels cannot share a process.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


def interpreted(*options: str) -> None:
    """Run tests with the kernels interpreted; none may skip for want of the backend."""
    command = [sys.executable, "-m", "pytest", "--require-backends=triton", "-W", "ignore::RuntimeWarning", *options]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]


@pytest.mark.parametrize("op", ["contrast", "draw", "margin_softmax", "nearest", "scores"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_interpreted_kernels_agree_with_the_definition(op, dtype):
    # Gradients where there are any: they come with the outputs.
    function = "test_forward" if op in ("draw", "nearest") else "test_gradients"
    interpreted("tests/ops/test_parity.py", "-k", f"{function}[{op}- and -triton-{dtype}")


def test_interpreted_kernels_recompute_what_they_may_not_keep():
    interpreted("tests/ops/test_parity.py", "-k", "test_gradients_without_kept_weights and softmax and triton")


def test_interpreted_kernels_at_the_edges():
    names = "near_duplicates or memory_bank or not_a_number or subnormal or differences or outlier or negative"
    interpreted("tests/ops/test_extremes.py", "-k", f"triton and ({names})")


def test_interpreted_searches():
    interpreted("tests/ops/test_rank.py", "tests/ops/test_semihard.py", "-k", "test_rank or triton")


def test_interpreted_derivatives():
    interpreted("tests/ops/test_gradients.py", "-k", "triton and (exactly_zero or budget or undefined)")
