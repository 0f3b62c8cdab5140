"""Losses on all pairs of a batch: every positive and every negative of an anchor, through sums over the columns."""

import torch
from torch import Tensor

from ..core import checks
from ..core.enums import Relation
from ..core.indices import UNADMITTED
from ..core.reductions import reduce_loss, softplus
from ..core.similarity import accumulation_dtype, take_rows, unit_rows
from ..mining.sides import Sides, runs_of
from ..ops.contrast.op import Contrast, contrast
from .easy_positive import EasyPositiveLoss
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

    def _log_sum_exp(self, sides: Sides, relation: Relation, scale: float, sign: int = 1) -> Tensor:
        """(B,) of scale sign u_ij over the columns of that relation, -inf for none; any target will do."""
        if not sides.y.shape[0]:
            return sides.x.to(accumulation_dtype(sides.x.dtype)).sum(1) * 0 - torch.inf  # with a gradient, of 0
        target = torch.zeros_like(sides.labels, dtype=torch.int64)
        x = sides.x if sign > 0 else -sides.x
        call = Contrast(x, sides.y, target, *sides[2:], scale)
        return contrast.run(call._replace(relation=relation), self.backend, valid=False)[1]


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

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        reference_embeddings: Tensor | None = None,
        reference_labels: Tensor | None = None,
        self_index: Tensor | None = None,
    ) -> Tensor:
        sides = self._sides(embeddings, labels, reference_embeddings, reference_labels, self_index)
        scale = 1 / self.temperature
        lse = self._log_sum_exp(sides, Relation.ANY, scale)
        similarity, active = _mean_of_positives(sides)
        loss = torch.where(active, lse - scale * similarity, 0.0)
        return self._or_nan(reduce_loss(loss, active.to(loss.dtype), self._reduction), sides)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature:g}, reduction={self.reduction!r}, backend={self.backend!r}"


def _mean_of_positives(sides: Sides) -> tuple[Tensor, Tensor]:
    """Mean cosine (B,) of each anchor with its positives, and whether it has positives and negatives (B,)."""
    dtype, (columns, width) = accumulation_dtype(sides.x.dtype), sides.y.shape
    if not columns:
        return sides.x.to(dtype).sum(1), torch.zeros_like(sides.labels, dtype=torch.bool)
    x = unit_rows(sides.x.to(dtype))
    y = x if sides.y is sides.x else unit_rows(sides.y.to(dtype))
    runs = runs_of(*sides[2:])
    # A class is a run of the references sorted by label, and the place where it begins is its number.
    number = runs_of(sides.reference_labels, sides.reference_labels, None).first
    total = take_rows(y.new_zeros(columns, width).index_add(0, number, y), runs.first)
    count = runs.size - runs.own_inside.long()
    if sides.self_index is not None:
        total = total - torch.where(runs.own_inside[:, None], take_rows(y, sides.self_index), 0.0)
    own_outside = (runs.own >= runs.unadmitted) & ~runs.own_inside
    negatives = columns - runs.unadmitted - runs.size - own_outside.long()
    with torch.autocast(x.device.type, enabled=False):
        return (x * total).sum(1) / count.clamp(min=1), (count > 0) & (negatives > 0)


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

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        reference_embeddings: Tensor | None = None,
        reference_labels: Tensor | None = None,
        self_index: Tensor | None = None,
    ) -> Tensor:
        sides = self._sides(embeddings, labels, reference_embeddings, reference_labels, self_index)
        positive_lse = self._log_sum_exp(sides, Relation.SAME, self.alpha, sign=-1)
        negative_lse = self._log_sum_exp(sides, Relation.DIFFERENT, self.beta)
        too_far = softplus(positive_lse + self.alpha * self.base) / self.alpha
        too_near = softplus(negative_lse - self.beta * self.base) / self.beta
        counted = labels.long() != UNADMITTED
        loss = torch.where(counted, too_far + too_near, 0.0)
        return self._or_nan(reduce_loss(loss, counted.to(loss.dtype), self._reduction), sides)

    def extra_repr(self) -> str:
        numbers = f"alpha={self.alpha:g}, beta={self.beta:g}, base={self.base:g}"
        return f"{numbers}, reduction={self.reduction!r}, backend={self.backend!r}"
