"""The readable definition of `nearest`; every backend must agree with it."""

import torch
from torch import Tensor

from ..labels import IGNORED, INVALID, check_index
from ..similarity import accumulation_dtype, admitted, pair_similarity, unit_rows

ENTRIES_AT_ONCE = 1 << 24  # rows are taken in blocks that need about this many intermediate numbers


def nearest(
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
    """similarity (B, k), index (B, k)."""
    if self_index is not None:
        self_index = check_index(self_index, y.shape[0], IGNORED, "self_index")
    if similarity == "cosine":
        x, y = (unit_rows(t.to(accumulation_dtype(t.dtype))) for t in (x, y))
        similarity = "dot"
    step = max(1, ENTRIES_AT_ONCE // max(1, y.numel()))
    blocks = [
        _nearest_block(
            x[i : i + step],
            y,
            row_labels[i : i + step],
            column_labels,
            None if self_index is None else self_index[i : i + step],
            None if below is None else below[i : i + step],
            similarity,
            relation,
            k,
        )
        for i in range(0, max(1, x.shape[0]), step)
    ]
    return torch.cat([s for s, _ in blocks]), torch.cat([i for _, i in blocks])


def _nearest_block(
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
    # Pair by pair, not as a matrix product: equal columns then have equal bits, so that they tie, and distances are
    # differences, so that they compare with `below` as they are.
    u = pair_similarity(x[:, None], y[None], similarity)  # (B, N)
    mask = admitted(row_labels, column_labels, relation, self_index) & ~u.isnan()
    if below is not None:
        mask = mask & (u < below[:, None])
    u = torch.where(mask, u, -torch.inf)
    # A stable sort keeps equal similarities in column order: ties go to the lowest index.
    value, index = torch.sort(u, dim=1, descending=True, stable=True)
    value, index = value[:, :k], index[:, :k]
    missing = k - value.shape[1]
    if missing > 0:
        value = torch.nn.functional.pad(value, (0, missing), value=-torch.inf)
        index = torch.nn.functional.pad(index, (0, missing), value=-1)
    found = value > -torch.inf
    if self_index is not None:
        value = torch.where((self_index == INVALID)[:, None], torch.nan, value)
    return value, torch.where(found, index, -1)
