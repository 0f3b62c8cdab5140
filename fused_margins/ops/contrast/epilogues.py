"""What a call of `contrast` makes of its two vectors before it returns: a table with a row for each epilogue.

A row is the definition. A kernel module runs the epilogues that it names in its `can_run`; the reference runs all.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.enums import Option
from ...core.indices import ABSENT
from ...core.margins import Margin
from ...core.reductions import log_odds, softplus


class Epilogue(Option):
    """What becomes of the similarity with the positive and the log-sum-exp over the negatives."""

    NONE = 0
    MARGIN_SOFTMAX = 1
    INFO_NCE = 2


@dataclass(frozen=True)
class Row:
    """An epilogue: the loss of each row, and which rows count in a mean.

    loss(positive, negative_lse, scale, margin, psi) -> (B,), for rows with a target; `Margin.psi` of the angle.
    counts(target, negative_lse, ignore_index) -> (B,) bool.
    margins: whether it takes a margin and an angle.
    """

    loss: Callable[[Tensor, Tensor, float | Tensor, float | Tensor, Margin], Tensor]
    counts: Callable[[Tensor, Tensor, int], Tensor]
    margins: bool = False


def _has_target(target: Tensor, negative_lse: Tensor, ignore_index: int) -> Tensor:
    return (target != ignore_index) & (target != ABSENT)


EPILOGUES: dict[Epilogue, Row] = {
    # Liu et al., Negative Margin Matters, 2020; with an angle Deng et al., ArcFace, 2019, eq. 3.
    Epilogue.MARGIN_SOFTMAX: Row(
        loss=lambda u, negative_lse, scale, margin, angle: softplus(
            log_odds(negative_lse, scale * (angle.psi(u) - margin))
        ),
        counts=_has_target,
        margins=True,
    ),
    # van den Oord et al., Representation learning with contrastive predictive coding, 2018, eq. 4.
    Epilogue.INFO_NCE: Row(
        loss=lambda u, negative_lse, scale, margin, angle: softplus(log_odds(negative_lse, scale * u)),
        counts=lambda target, negative_lse, ignore_index: (
            _has_target(target, negative_lse, ignore_index) & (negative_lse != -torch.inf)
        ),
    ),
}
