"""What the loss of a row is made of once the classes are reduced: row code on vectors of length B.

Symbols: B rows x_i, C classes w_j, of which those at hand may be a part; z_ij the logits, z_{i,y_i} the one with the
margin; w_j also the weight of a class in the loss, as the text says.

The terms of all classes are those of parts of the classes, put together: log-sum-exps combine, everything else is
a sum. A row whose class is in another part has zeros here.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .margins import Margin
from .reductions import log_odds, softplus
from .similarity import take_rows


class Terms(NamedTuple):
    """Of the classes at hand.

    z: (B,) the logit of the own class. row_weight: (B,) the weight of the own class, None without class weights.
    everyone: (B,) sum_j w_j z_ij, and each: 0-d sum_j w_j, of label smoothing, else None.
    """

    z: Tensor
    row_weight: Tensor | None
    everyone: Tensor | None
    each: Tensor | None


def terms(
    target: Tensor,
    elsewhere: Tensor | None,
    u: Tensor,
    of_all: Tensor | None,
    own: Margin,
    scale: float | Tensor,
    logit_bias: Tensor | None,
    class_weight: Tensor | None,
    num_classes: int,
) -> Terms:
    """Of `num_classes` classes, from the similarities u (B,) with the own one.

    target: (B,) the column of the own class. elsewhere: (B,) bool, of which it is in another part; None where that does
    not matter. of_all: (B,) sum_j w_j u_ij, for label smoothing, else None. scale: a number, 0-d or (B,).
    """

    def here(t: Tensor) -> Tensor:
        return t if elsewhere is None else torch.where(elsewhere, 0.0, t)

    own_bias = 0.0 if logit_bias is None else take_rows(logit_bias, target)
    z = here(scale * own.psi(u) + own_bias)
    row_weight = None if class_weight is None else here(take_rows(class_weight, target))
    if of_all is None:
        return Terms(z, row_weight, None, None)
    # sum_j w_j z_j: as if no logit were moved by a margin, and what moves the own one.
    moved = (1.0 if row_weight is None else row_weight) * (z - scale * u - own_bias)
    everyone = scale * of_all + here(moved)
    if logit_bias is not None:
        each = torch.ones_like(logit_bias) if class_weight is None else class_weight
        everyone = everyone + (each * logit_bias).sum()
    return Terms(z, row_weight, everyone, z.new_tensor(num_classes) if class_weight is None else class_weight.sum())


def cross_entropy(negative_lse: Tensor, z: Tensor) -> Tensor:
    """(B,) of the own logit z among the others, whose log-sum-exp is negative_lse."""
    return softplus(log_odds(negative_lse, z))


def spread(plain: Tensor, of: Terms) -> Tensor | None:
    """(B,) sum_j w_j times the cross entropy with class j, from that with the own one; None without label smoothing."""
    if of.everyone is None or of.each is None:
        return None
    return (plain + of.z) * of.each - of.everyone  # plain + z: the log-sum-exp of all logits


def losses(
    plain: Tensor,
    row_weight: Tensor | None,
    spread: Tensor | None,
    counted: Tensor,
    label_smoothing: float,
    num_classes: int,
) -> tuple[Tensor, Tensor]:
    """The loss (B,) of each row, 0 where it is not counted (B,) bool, and its weight (B,) in a mean.

    plain: (B,) cross entropies. num_classes: in all.
    """
    loss = torch.where(counted, plain, 0.0)
    weight = counted.to(loss.dtype)
    if row_weight is not None:
        weight = weight * row_weight
        loss = loss * weight
    if spread is not None:
        smooth = label_smoothing / max(num_classes, 1)
        loss = (1 - label_smoothing) * loss + smooth * torch.where(counted, spread, 0.0)
    return loss, weight
