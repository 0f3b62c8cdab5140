"""Which GPU backend "auto" takes: sizes up to which the CUDA kernels run, and up to which they are faster."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .registry import Problem

# What the CUDA kernels are made for: the most columns of a row of similarities, or None for any.
CUDA_COLUMNS = {"margin_softmax": 1024, "magnet": 1024}
# Rows x columns up to which they are taken. Measured on an H100: margin_softmax at 256 x 200 takes 0.67 ms for Triton's
# 1.70, nearest at 8192 x 8192 0.30 for 0.46, both before either was made faster; beyond these sizes the limits are
# estimates.
CUDA_FASTER = {"margin_softmax": 1 << 17, "nearest": 1 << 30}

# The most neighbours that the Triton kernel looks for.
NEIGHBOURS = 128


def cuda_refuses(problem: Problem) -> str | None:
    limit = CUDA_COLUMNS.get(problem.op)
    if limit is not None and problem.columns > limit:
        return f"takes up to {limit} columns, got {problem.columns}"
    if problem.op == "nearest" and problem.relation != "same":
        return f"searches within classes only, got relation {problem.relation!r}"
    return None


def cuda_slower(problem: Problem) -> str | None:
    limit = CUDA_FASTER.get(problem.op)
    if limit is not None and problem.rows * problem.columns > limit:
        return f"slower than Triton beyond {limit} similarities"
    return None
