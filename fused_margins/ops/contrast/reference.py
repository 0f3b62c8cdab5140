"""The readable definition of `contrast`; every backend must agree with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...core import checks
from ...core.enums import MarginType
from ...core.indices import ABSENT, IGNORED, INVALID, check_index
from ...core.margins import Margin
from ...core.reductions import masked_logsumexp, reduce_loss
from ...core.similarity import admitted, best_of_groups, pair_similarity, similarity_matrix, similarity_sum, take_rows
from .epilogues import EPILOGUES, Epilogue

if TYPE_CHECKING:
    from .op import Contrast


def reference(a: Contrast) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """positive (B,) and negative_lse (B,), or the loss: plain PyTorch, any device, differentiable to any order."""
    positive, negative_lse = vectors(a)
    if a.epilogue == Epilogue.NONE:
        return positive, negative_lse, None
    row = EPILOGUES[a.epilogue]
    angle = Margin(MarginType.ANGULAR, 0.0, a.angle_rad, 1.0, a.beyond_pi, a.straight_through)
    loss = row.loss(positive, negative_lse, a.scale, a.margin, angle.psi)
    target = a.target.long()
    counted = row.counts(target, negative_lse, a.ignore_index)
    if a.smoothing:
        z = a.scale * (angle.psi(positive) - a.margin)
        of_all = similarity_sum(a.x, a.y, positive.new_ones(a.y.shape[0]), a.similarity)
        mean = (a.scale * (of_all - positive) + z) / max(1, a.y.shape[0])
        loss = loss + a.smoothing * torch.where(counted, z - mean, 0.0)
    loss = torch.where(target == ABSENT, 0.0, loss)
    return None, None, reduce_loss(loss, counted.to(loss.dtype), a.reduction)


def vectors(a: Contrast, any_scale: bool = False) -> tuple[Tensor, Tensor]:
    """positive (B,), negative_lse (B,).

    A scale that is not positive is an error where it can be read, and NaN for its row elsewhere or if `any_scale`.
    """
    if not any_scale:
        checks.positive("scale", a.scale)
    columns = a.y.shape[0]
    target = check_index(a.target, columns, a.ignore_index, "target", absent=True)
    row_labels = target if a.row_labels is None else a.row_labels
    column_labels = torch.arange(columns, device=a.y.device) if a.column_labels is None else a.column_labels
    self_index = a.self_index
    if self_index is not None:
        self_index = check_index(self_index, columns, IGNORED, "self_index")

    u = similarity_matrix(a.x, a.y, a.similarity)
    scale = a.scale
    if isinstance(scale, Tensor):
        scale = torch.where(scale > 0, scale, torch.nan).reshape(-1, 1)
    z = u * scale  # (B, N)
    if a.bias is not None:
        z = z + a.bias
    ignored, invalid, absent = target == IGNORED, target == INVALID, target == ABSENT
    if self_index is not None:
        invalid = invalid | (self_index == INVALID)
    mask = admitted(row_labels, column_labels, a.relation, self_index) & ~ignored[:, None]
    negative_lse = masked_logsumexp(z, best_of_groups(u, mask, a.group_size))

    positive = pair_similarity(a.x, take_rows(a.y, target), a.similarity)
    positive = torch.where(ignored | absent, 0.0, positive)
    return torch.where(invalid, torch.nan, positive), torch.where(invalid, torch.nan, negative_lse)
