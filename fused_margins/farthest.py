"""The least similar sample of the same label, by the search for the most similar one."""

from typing import Any

import torch
from torch import Tensor

from .ops import checks
from .ops.nearest import nearest
from .ops.similarity import accumulation_dtype, pair_similarity, take_rows


def farthest(
    x: Tensor,
    y: Tensor,
    row_labels: Tensor,
    column_labels: Tensor,
    self_index: Tensor | None,
    similarity: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Similarity (B,) and index (B,) of the least similar column of the row's label; -inf and -1 where there is none.

    For cosines and dot products it is the nearest to -x_i. For squared distances it is the largest

        |y_j|^2 - 2 x_i y_j = (-2 x_i, 1) . (y_j, |y_j|^2)

    whose terms would cancel where a class lies far from the origin. Only samples of one label meet, so one of them can
    be their origin: then the farthest is at least half as far away as any of the terms is long, and the choice is right
    to a few roundings of its distance. It costs a copy of both sides.
    """
    checks.similarity(similarity)
    options: dict[str, Any] = {"self_index": self_index, "relation": "same", "backend": backend}
    if similarity != "negative_squared_euclidean":
        value, index = nearest(-x, y, row_labels, column_labels, similarity=similarity, **options)
        value, index = -value[:, 0], index[:, 0]
    else:
        checks.matrices(x, y)
        left, right = (t.detach().to(accumulation_dtype(t.dtype)) for t in (x, y))
        for name, labels, side in (("row_labels", row_labels, left), ("column_labels", column_labels, right)):
            checks.labels(name, labels, side.shape[0], x)
        by_label, order = torch.sort(column_labels.long(), stable=True)

        def from_origin(t: Tensor, labels: Tensor) -> Tensor:
            first = torch.searchsorted(by_label, labels.long().contiguous())  # of the label's columns, or beyond
            origin = take_rows(right, take_rows(order, first))
            return t - origin.nan_to_num(0.0, 0.0, 0.0)  # not finite, it would spoil its whole class

        left, right = from_origin(left, row_labels), from_origin(right, column_labels)
        left = torch.cat([-2 * left, torch.ones_like(left[:, :1])], dim=1)
        right = torch.cat([right, right.square().sum(1, keepdim=True)], dim=1)
        with torch.autocast(x.device.type, enabled=False):
            index = nearest(left, right, row_labels, column_labels, similarity="dot", **options)[1][:, 0]
        value = pair_similarity(x.detach(), take_rows(y.detach(), index), similarity)
    return torch.where(index >= 0, value, -torch.inf), index
