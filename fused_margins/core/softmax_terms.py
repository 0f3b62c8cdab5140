"""What the loss of a row is made of once the classes are reduced: row code on vectors of length B.

Symbols: B rows x_i, C classes w_j, of which those at hand may be a part; z_ij the logits, z_{i,y_i} the one with the
margin; w_j also the weight of a class in the loss, as the text says.

The terms of all classes are those of parts of the classes, put together: log-sum-exps combine, everything else is
a sum. A row whose class is in another part has zeros here.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .indices import ABSENT
from .margins import Margin
from .reductions import log_odds, softplus
from .similarity import similarity_sum, take_rows


class Terms(NamedTuple):
    """Of the classes at hand.

    negative_lse: (B,) log-sum-exp of the logits of other classes. z: (B,) the logit of the own class.
    row_weight: (B,) the weight of the own class, None without class weights.
    everyone: (B,) sum_j w_j z_ij, and each: 0-d sum_j w_j, of label smoothing, else None.
    """

    negative_lse: Tensor
    z: Tensor
    row_weight: Tensor | None
    everyone: Tensor | None
    each: Tensor | None


def terms(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    u: Tensor,
    negative_lse: Tensor,
    own: Margin,
    scale: float | Tensor,
    logit_bias: Tensor | None,
    class_weight: Tensor | None,
    smooth: bool,
) -> Terms:
    """Of classes weight (C, D), from the two vectors u, negative_lse (B,) of `fused_margins.ops.contrast`.

    target: (B,) the column of the own class, ABSENT for one in another part. scale: a number, 0-d or (B,).
    """
    elsewhere = target == ABSENT
    own_bias = 0.0 if logit_bias is None else take_rows(logit_bias, target)
    z = torch.where(elsewhere, 0.0, scale * own.psi(u) + own_bias)
    row_weight = None if class_weight is None else torch.where(elsewhere, 0.0, take_rows(class_weight, target))
    if not smooth:
        return Terms(negative_lse, z, row_weight, None, None)
    # sum_j w_j z_j: all classes' logits at once, from one vector, the weighted sum of the class directions.
    each = class_weight if class_weight is not None else z.new_ones(weight.shape[0])
    with torch.autocast(x.device.type, enabled=False):
        everyone = scale * similarity_sum(x, weight, each, own.similarity)
    moved = (1.0 if row_weight is None else row_weight) * (z - scale * u - own_bias)
    everyone = everyone + torch.where(elsewhere, 0.0, moved)
    if logit_bias is not None:
        everyone = everyone + (each * logit_bias).sum()
    return Terms(negative_lse, z, row_weight, everyone, each.sum())


def losses(of_all: Terms, counted: Tensor, label_smoothing: float, num_classes: int) -> tuple[Tensor, Tensor]:
    """The loss (B,) of each row, 0 where it is not counted (B,) bool, and its weight (B,) in a mean."""
    negative_lse, z, row_weight, everyone, each = of_all
    loss = torch.where(counted, softplus(log_odds(negative_lse, z)), 0.0)
    weight = counted.to(loss.dtype)
    if row_weight is not None:
        weight = weight * row_weight
        loss = loss * weight
    if everyone is not None and each is not None:
        spread = torch.where(counted, torch.logaddexp(negative_lse, z) * each - everyone, 0.0)
        loss = (1 - label_smoothing) * loss + label_smoothing / max(num_classes, 1) * spread
    return loss, weight
