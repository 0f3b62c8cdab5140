"""`sample` in C++ on a CPU (csrc/sample/cpu.cpp): the tensors' memory, handed over."""

from typing import Any

import torch
from torch import Tensor

from ...backends.cpu import call, int64, module
from .op import Sample


def forward(a: Sample, plan: Any) -> tuple[Tensor]:
    """index (B,) int64."""
    index = torch.empty(a.x.shape[0], dtype=torch.int64)
    labels = [int64(t) for t in (a.row_labels, a.column_labels, a.self_index)]
    call(module.sample, a.x, a.y, *labels, int(a.seed) & 0xFFFFFFFF, a.relation, index)
    return (index,)
