"""`nearest` within classes in CUDA C++ (csrc/nearest/cuda.cu): the tensors' memory, handed over; one launch."""

from typing import Any

import torch
from torch import Tensor

from ...backends import cuda
from ...backends.cpu import int64, vector
from ...backends.registry import Problem
from ...core.enums import Relation
from ...core.similarity import accumulation_dtype
from .op import Nearest

# Rows x columns up to which it is taken. Measured on an H100 at 8192 x 8192: 0.30 ms for Triton's 0.46, both before
# either was made faster; beyond this size the limit is an estimate.
FASTER = 1 << 30


def can_run(problem: Problem) -> str | None:
    """Searches within classes."""
    relation = problem.arguments.relation
    return (
        None if relation == Relation.SAME else f"searches within classes only, got relation {relation.name.lower()!r}"
    )


def slower(problem: Problem) -> str | None:
    """Where Triton is faster."""
    return f"slower than Triton beyond {FASTER} similarities" if problem.rows * problem.columns > FASTER else None


def forward(a: Nearest, plan: Any) -> tuple[Tensor, Tensor]:
    """similarity (B, k) in the accumulation dtype, index (B, k) int64."""
    best = a.x.new_empty((a.x.shape[0], a.k), dtype=accumulation_dtype(a.x.dtype))
    index = a.x.new_empty((a.x.shape[0], a.k), dtype=torch.int64)
    labels, below = [int64(t) for t in (a.row_labels, a.column_labels, a.self_index)], vector(a.below)
    options = a.similarity, a.k, a.largest
    cuda.launch(cuda.module.nearest, a.x.device, a.x, a.y, *labels, below, *options, best, index)
    return best, index
