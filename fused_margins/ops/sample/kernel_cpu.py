"""`sample` in C++ on a CPU (csrc/sample/cpu.cpp): the tensors' memory, handed over."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...backends.cpu import call, int64, module

if TYPE_CHECKING:
    from ...backends.registry import Problem
    from .op import Sample


def can_run(problem: Problem) -> str | None:
    """Every call."""
    return None


def forward(a: Sample, plan: Any) -> tuple[Tensor]:
    """index (B,) int64."""
    assert module is not None
    index = torch.empty(a.x.shape[0], dtype=torch.int64)
    labels = [int64(t) for t in (a.row_labels, a.column_labels, a.self_index)]
    call(module.sample, a.x, a.y, *labels, int(a.seed) & 0xFFFFFFFF, a.relation, index)
    return (index,)
