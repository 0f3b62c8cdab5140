"""The readable definition of `contrast`; every backend must agree with it."""

import torch
from torch import Tensor

from .. import checks
from ..labels import IGNORED, INVALID, check_index
from ..similarity import admitted, pair_similarity, similarity_matrix, take_rows


def contrast(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_labels: Tensor | None,
    column_labels: Tensor | None,
    self_index: Tensor | None,
    similarity: str,
    relation: str,
    ignore_index: int,
    any_scale: bool = False,
) -> tuple[Tensor, Tensor]:
    """positive (B,), negative_lse (B,): plain PyTorch, any device, differentiable to any order.

    A scale that is not positive is an error where it can be read, and NaN for its row elsewhere or if `any_scale`.
    """
    if not any_scale:
        checks.positive("scale", scale)
    rows, columns = x.shape[0], y.shape[0]
    target = check_index(target, columns, ignore_index, "target")
    row_labels = target if row_labels is None else row_labels
    column_labels = torch.arange(columns, device=y.device) if column_labels is None else column_labels
    if self_index is not None:
        self_index = check_index(self_index, columns, IGNORED, "self_index")

    u = similarity_matrix(x, y, similarity)
    scale = torch.where(scale > 0, scale, torch.nan)
    z = u * scale.reshape(-1, 1)  # (B, N); scale is 0-d or (B,)
    if bias is not None:
        z = z + bias
    ignored, invalid = target == IGNORED, target == INVALID
    if self_index is not None:
        invalid = invalid | (self_index == INVALID)
    mask = admitted(row_labels, column_labels, relation, self_index) & ~ignored[:, None]
    empty = ~mask.any(dim=1)
    # A row that admits nothing is summed over zeros and then replaced, so that no gradient of it is ever inf - inf.
    z = torch.where(mask, z, torch.where(empty[:, None], 0.0, -torch.inf))
    negative_lse = (
        torch.where(empty, -torch.inf, torch.logsumexp(z, dim=1)) if columns else z.new_full((rows,), -torch.inf)
    )

    positive = pair_similarity(x, take_rows(y, target), similarity)
    positive = torch.where(ignored, 0.0, positive)
    return torch.where(invalid, torch.nan, positive), torch.where(invalid, torch.nan, negative_lse)
