"""`nearest` in C++ on a CPU (csrc/nearest/cpu.cpp): the tensors' memory, handed over."""

import torch
from torch import Tensor

from ..native import call, int64, matrix, module, pointer
from ..similarity import accumulation_dtype


def forward(
    x: Tensor,
    y: Tensor,
    row_labels: Tensor,
    column_labels: Tensor,
    self_index: Tensor | None,
    below: Tensor | None,
    similarity: str,
    relation: str,
    k: int,
) -> tuple[Tensor, Tensor]:
    """similarity (B, k) in the accumulation dtype, index (B, k) int64."""
    assert module is not None
    best = torch.empty(x.shape[0], k, dtype=accumulation_dtype(x.dtype))
    index = torch.empty(x.shape[0], k, dtype=torch.int64)
    rows = int64(row_labels)
    # One vector of labels stays one: of a batch against itself the kernel takes half the products.
    labels = [rows, rows if column_labels is row_labels else int64(column_labels), int64(self_index)]
    below = None if below is None else below.contiguous()
    of_x = matrix(x)
    call(
        module.nearest_forward,
        of_x,
        of_x if y is x else matrix(y),
        *map(pointer, labels),
        pointer(below),
        similarity,
        relation,
        k,
        best.data_ptr(),
        index.data_ptr(),
    )
    return best, index
