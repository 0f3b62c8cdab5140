"""Losses on all pairs of a batch: every positive and every negative of an anchor, through sums over the columns."""

import torch

from ..core import checks
from ..core.enums import Relation
from ..core.indices import UNADMITTED
from ..core.reductions import softplus
from ..mining.sides import Sides, runs_of
from .easy_positive import EasyPositiveLoss, RowLosses
from .easy_positive_infonce import EasyPositiveInfoNCELoss


class NTXentLoss(EasyPositiveInfoNCELoss):
    """InfoNCE of every positive pair: each other sample of the class, one at a time, against all of other classes.

        loss_ip = -log( exp(u_ip / t) / (exp(u_ip / t) + sum_{j: label_j != label_i} exp(u_ij / t)) )

    with u the cosine, p over the samples of label_i but i. P pairs of width D are gathered, in the order of the
    anchors; of two views a class that is one pair an anchor.

    Args:
        temperature: t > 0, in units of cosine.
        reduction: "mean" (over pairs whose anchor has a negative; 0 if there are none), "sum" or "none", which gives
            (P,).
        backend: "auto", or the name of one; see `fused_margins.explain`.

    Call: as `EasyPositiveTripletLoss`, also with references. torch.compile breaks the graph where pairs are counted.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, unknown names, a temperature that is not positive.
        IndexError: a self index out of range.

    Gradients: embeddings and reference_embeddings.

    Source: Chen et al., A simple framework for contrastive learning of visual representations, 2020, eq. 1, with the
    labels' positives. Arguments and numbers are those of pytorch-metric-learning.

    >>> import torch
    >>> from fused_margins import NTXentLoss
    >>> loss = NTXentLoss(temperature=0.5)
    >>> loss(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]), torch.tensor([0, 0, 1]))
    tensor(0.5881)
    """

    def __init__(self, temperature: float = 0.07, *, reduction: str = "mean", backend: str = "auto") -> None:
        super().__init__(temperature, "all", reduction=reduction, backend=backend)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature:g}, reduction={self.reduction!r}, backend={self.backend!r}"


class _AllPairsLoss(EasyPositiveLoss):
    """One loss an anchor, of cosines with all of its class and with all others."""

    def __init__(self, reduction: str, backend: str) -> None:
        super().__init__("all", "all", "cosine", False, reduction, backend, None, valid_negatives=("all",))


class SupConLoss(_AllPairsLoss):
    """The mean over an anchor's positives of its cross entropy among all other samples.

        loss_i = log sum_{j != i} exp(u_ij / t) - mean_{p != i: label_p = label_i} u_ip / t,   u the cosine

    The mean is a product with the sum of the positives, so that no matrix is made. A loss below the rounding of 1 / t
    is lost to it; of one positive an anchor `NTXentLoss` is the same and keeps its digits. An anchor is active if it
    has a positive and a negative; the others have loss 0.

    Args:
        temperature: t > 0, in units of cosine.
        reduction: "mean" (over active anchors; 0 if there are none), "sum" or "none".
        backend: "auto", or the name of one; see `fused_margins.explain`.

    Call: as `EasyPositiveTripletLoss`, also with references.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, unknown names, a temperature that is not positive.
        IndexError: a self index out of range.

    Gradients: embeddings and reference_embeddings.

    Source: Khosla et al., Supervised contrastive learning, 2020, eq. 2. Arguments and numbers are those of
    pytorch-metric-learning.

    >>> import torch
    >>> from fused_margins import SupConLoss
    >>> loss = SupConLoss(temperature=0.5)
    >>> loss(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]), torch.tensor([0, 0, 1]))
    tensor(0.5881)
    """

    def __init__(self, temperature: float = 0.1, *, reduction: str = "mean", backend: str = "auto") -> None:
        super().__init__(reduction, backend)
        self.temperature = checks.positive_number("temperature", temperature)

    def _row_losses(self, sides: Sides) -> RowLosses:
        scale = 1 / self.temperature
        lse = sides.log_sum_exp(Relation.ANY, scale, self.backend)
        runs = runs_of(sides.labels, sides.reference_labels, sides.self_index)
        similarity = sides.sum_of_positives() / runs.positives().clamp(min=1)
        active = (runs.positives() > 0) & (runs.negatives() > 0)
        loss = torch.where(active, lse - scale * similarity, 0.0)
        return RowLosses(loss, active.to(loss.dtype))

    def extra_repr(self) -> str:
        return f"temperature={self.temperature:g}, reduction={self.reduction!r}, backend={self.backend!r}"


class MultiSimilarityLoss(_AllPairsLoss):
    """Soft maxima over positives that are too far and over negatives that are too near.

        loss_i = log(1 + sum_p exp(-alpha (u_ip - base))) / alpha + log(1 + sum_n exp(beta (u_in - base))) / beta

    with u the cosine, p over the samples of label_i but i, and n over those of other classes. An anchor without either
    has the rest of the loss.

    Args:
        alpha, beta: positive, in units of inverse cosine: how hard the maximum over positives and negatives is.
        base: the cosine that separates them.
        reduction: "mean" (over all anchors), "sum" or "none".
        backend: "auto", or the name of one; see `fused_margins.explain`.

    Call: as `EasyPositiveTripletLoss`, also with references. Pairs are not mined, which the source does before.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, unknown names, an alpha or beta that is not positive.
        IndexError: a self index out of range.

    Gradients: embeddings and reference_embeddings.

    Source: Wang et al., Multi-similarity loss with general pair weighting for deep metric learning, 2019, eq. 15.
    Arguments and numbers are those of pytorch-metric-learning.

    >>> import torch
    >>> from fused_margins import MultiSimilarityLoss
    >>> loss = MultiSimilarityLoss(alpha=2, beta=50, base=0.5)
    >>> loss(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]), torch.tensor([0, 0, 1]))
    tensor(0.3994)
    """

    def __init__(
        self,
        alpha: float = 2.0,
        beta: float = 50.0,
        base: float = 0.5,
        *,
        reduction: str = "mean",
        backend: str = "auto",
    ) -> None:
        super().__init__(reduction, backend)
        self.alpha, self.beta = checks.positive_number("alpha", alpha), checks.positive_number("beta", beta)
        self.base = checks.number("base", base)

    def _row_losses(self, sides: Sides) -> RowLosses:
        positive_lse = sides.log_sum_exp(Relation.SAME, self.alpha, self.backend, sign=-1)
        negative_lse = sides.log_sum_exp(Relation.DIFFERENT, self.beta, self.backend)
        too_far = softplus(positive_lse + self.alpha * self.base) / self.alpha
        too_near = softplus(negative_lse - self.beta * self.base) / self.beta
        counted = sides.labels.long() != UNADMITTED
        loss = torch.where(counted, too_far + too_near, 0.0)
        return RowLosses(loss, counted.to(loss.dtype))

    def extra_repr(self) -> str:
        numbers = f"alpha={self.alpha:g}, beta={self.beta:g}, base={self.base:g}"
        return f"{numbers}, reduction={self.reduction!r}, backend={self.backend!r}"
