"""`nearest` in C++ on a CPU (csrc/nearest/cpu.cpp): the tensors' memory, handed over."""

from typing import Any

import torch
from torch import Tensor

from ...backends.cpu import call, int64, module, vector
from ...core.similarity import accumulation_dtype
from .op import Nearest


def forward(a: Nearest, plan: Any) -> tuple[Tensor, Tensor]:
    """similarity (B, k) in the accumulation dtype, index (B, k) int64."""
    best = torch.empty(a.x.shape[0], a.k, dtype=accumulation_dtype(a.x.dtype))
    index = torch.empty(a.x.shape[0], a.k, dtype=torch.int64)
    rows = int64(a.row_labels)
    # One vector of labels stays one: of a batch against itself the kernel takes half the products.
    columns = rows if a.column_labels is a.row_labels else int64(a.column_labels)
    own, below = int64(a.self_index), vector(a.below)
    options = a.similarity, a.relation, a.k, a.largest
    call(module.nearest, a.x, a.y, rows, columns, own, below, *options, best, index)
    return best, index
