"""The readable definition of `nearest`; every backend must agree with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...core.enums import Similarity
from ...core.indices import IGNORED, INVALID, check_index
from ...core.similarity import accumulation_dtype, admitted, pair_similarity, unit_rows

if TYPE_CHECKING:
    from .op import Nearest

ENTRIES_AT_ONCE = 1 << 24  # rows are taken in blocks that need about this many intermediate numbers


def reference(a: Nearest) -> tuple[Tensor, Tensor]:
    """similarity (B, k), index (B, k)."""
    x, y, similarity = a.x, a.y, a.similarity
    self_index = None if a.self_index is None else check_index(a.self_index, y.shape[0], IGNORED, "self_index")
    if similarity == Similarity.COSINE:
        x, y = (unit_rows(t.to(accumulation_dtype(t.dtype))) for t in (x, y))
        similarity = Similarity.DOT
    sign = 1 if a.largest else -1  # the least similar column has the largest of the negated similarities
    step = max(1, ENTRIES_AT_ONCE // max(1, y.numel()))
    values, indices = [], []
    for start in range(0, max(1, x.shape[0]), step):
        rows = slice(start, start + step)
        # Pair by pair, not as a matrix product: equal columns then have equal bits, so that they tie, and distances are
        # differences, so that they compare with `below` as they are.
        u = pair_similarity(x[rows, None], y[None], similarity)  # (rows, N)
        own = None if self_index is None else self_index[rows]
        mask = admitted(a.row_labels[rows], a.column_labels, a.relation, own) & ~u.isnan()
        if a.below is not None:
            mask = mask & (u < a.below[rows, None])
        value, index = _largest(torch.where(mask, sign * u, -torch.inf), a.k)
        values.append(torch.where(index >= 0, sign * value, -torch.inf))
        indices.append(index)
    value, index = torch.cat(values), torch.cat(indices)
    if self_index is not None:
        value = torch.where((self_index == INVALID)[:, None], torch.nan, value)
    return value, index


def _largest(u: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row (rows, k) and their columns; -1 for -inf, and where there are fewer columns than k."""
    # A stable sort keeps equal similarities in column order: ties go to the lowest index.
    value, index = torch.sort(u, dim=1, descending=True, stable=True)
    missing = (0, max(0, k - u.shape[1]))
    value = torch.nn.functional.pad(value[:, :k], missing, value=-torch.inf)
    index = torch.nn.functional.pad(index[:, :k], missing, value=-1)
    return value, torch.where(value > -torch.inf, index, -1)
