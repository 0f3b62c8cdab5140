"""The readable definition of `sample`; every backend must agree with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...core.indices import IGNORED, INVALID, check_index
from ...core.similarity import accumulation_dtype, admitted, unit_rows

if TYPE_CHECKING:
    from .op import Sample

NEAREST_SQUARED, FARTHEST_SQUARED = 0.25, 1.96  # distances of 0.5, below which weights are equal, and 1.4
ENTRIES_AT_ONCE = 1 << 18  # rows are taken in blocks of about this many pairs, whose words stay in a CPU's cache
WORD = 0xFFFFFFFF  # the 32 bits of one


def reference(a: Sample) -> tuple[Tensor]:
    """index (B,)."""
    rows, columns, device = a.x.shape[0], a.y.shape[0], a.x.device
    self_index = None if a.self_index is None else check_index(a.self_index, columns, IGNORED, "self_index")
    if not columns:
        return (torch.full((rows,), -1, device=device),)
    y = unit_rows(a.y.to(accumulation_dtype(a.y.dtype)))
    step = max(1, ENTRIES_AT_ONCE // columns)
    drawn = []
    for first in range(0, max(1, rows), step):
        block = slice(first, first + step)
        cosine = unit_rows(a.x[block].to(y.dtype)) @ y.T
        own = None if self_index is None else self_index[block]
        mask = admitted(a.row_labels[block], a.column_labels, a.relation, own) & ~cosine.isnan()
        weight = log_weight(2 - 2 * cosine, a.x.shape[1])
        exponential = exponentials(first, cosine.shape[0], columns, a.seed, y.dtype)
        near = mask & (weight > -torch.inf)
        by_weight = torch.where(near, weight - exponential.log(), -torch.inf)
        evenly = torch.where(mask, -exponential, -torch.inf)
        index = torch.where(near.any(1), _first_largest(by_weight), _first_largest(evenly))
        drawn.append(torch.where(mask.any(1), index, -1))
    index = torch.cat(drawn)
    return (index if self_index is None else torch.where(self_index == INVALID, -1, index),)


def _first_largest(t: Tensor) -> Tensor:
    """Of each row the lowest column of its maximum; argmax may return any."""
    columns = torch.arange(t.shape[1], device=t.device)
    return torch.where(t == t.amax(1, keepdim=True), columns, t.shape[1] - 1).amin(1)


def log_weight(squared: Tensor, width: int) -> Tensor:
    """log w of squared distances, -inf from the cut-off on."""
    near = squared.clamp(NEAREST_SQUARED, FARTHEST_SQUARED)
    weight = (2 - width) / 2 * near.log() - (width - 3) / 2 * torch.log1p(-near / 4)
    return torch.where(squared < FARTHEST_SQUARED, weight, -torch.inf)


def exponentials(first_row: int, rows: int, columns: int, seed: Tensor, dtype: torch.dtype) -> Tensor:
    """E (rows, columns) of the rows from `first_row` on: exponential variates of mean 1."""
    row = first_row + torch.arange(rows, device=seed.device)[:, None]
    word, _ = philox(row, torch.arange(columns, device=seed.device), seed)
    uniform = ((word.to(dtype) + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return -torch.log1p(-uniform)


def philox(a: Tensor, b: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Philox 2x32-10: the two words of the counters (a, b), int64 tensors of 32-bit numbers."""
    for _ in range(10):
        product = a * 0xD256D193  # wraps around, and its bits are those of the unsigned product
        a, b = ((product >> 32) & WORD) ^ (key & WORD) ^ b, product & WORD
        key = key + 0x9E3779B9
    return a, b
