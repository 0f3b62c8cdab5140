"""`draw` in C++ on a CPU (csrc/draw/cpu.cpp): the tensors' memory, handed over."""

import torch
from torch import Tensor

from ..native import call, int64, matrix, module, pointer


def forward(
    x: Tensor,
    y: Tensor,
    row_labels: Tensor,
    column_labels: Tensor,
    seed: Tensor,
    self_index: Tensor | None,
    relation: str,
) -> Tensor:
    """index (B,) int64."""
    assert module is not None
    index = torch.empty(x.shape[0], dtype=torch.int64)
    labels = [int64(t) for t in (row_labels, column_labels, self_index)]
    of_x = matrix(x)
    of_y = of_x if y is x else matrix(y)
    call(module.draw, of_x, of_y, *map(pointer, labels), int(seed) & 0xFFFFFFFF, relation, index.data_ptr())
    return index
