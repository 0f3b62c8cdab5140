"""InfoNCE on easy positives: the nearest sample of the class against all negatives at once, or against one."""

from typing import Any

import torch
from torch import Tensor

from ..core import checks
from ..core.enums import Relation, Similarity
from ..core.reductions import log_odds, softplus
from ..mining.negatives import NEGATIVES
from ..mining.sides import Sides
from ..ops.contrast.epilogues import Epilogue
from ..ops.contrast.op import Contrast, contrast
from .easy_positive import EasyPositiveLoss, RowLosses


class EasyPositiveInfoNCELoss(EasyPositiveLoss):
    """InfoNCE on each anchor's easy positive: cross entropy of the positive among all samples of other classes.

        loss_i = -log( exp(u_{i,p(i)} / t) / (exp(u_{i,p(i)} / t) + sum_{j: label_j != label_i} exp(u_ij / t)) )
        p(i) = argmax over j != i with label_j = label_i of u_ij,   u the cosine

    computed as softplus(logsumexp over the negatives - u_positive / t). The rest of the class neither attracts nor
    repels. An anchor is active if it has a positive and a negative; the others have loss 0.

    Args:
        temperature: t > 0, in units of cosine.
        positives: "easy", or for comparison "random", "hard" or "all", as in `EasyPositiveTripletLoss`.
        negatives: "all", the sum above; or for comparison a sum of one term, whose n(i) is "random", "semihard", "hard"
            or "distance-weighted", as in `EasyPositiveTripletLoss`.
        reduction: "mean" (over active anchors or pairs; 0 if there are none), "sum" or "none".
        backend: "auto", or the name of one; see `fused_margins.explain`.
        generator: draws what is random; None for torch's global one. torch.compile takes only None, and not "all"
            positives.
        duplicates_above: samples of the class whose cosine is not below this are taken for copies of the anchor and
            passed over in the search for "easy" positives. None: no sample is.
        drop_dissimilar: anchors whose positive or whose one negative has a cosine of 0 or less have loss 0 and do not
            count; for negatives other than "all".

    `EasyPositiveInfoNCELoss.ephn()` has the settings of Xuan et al.

    Call: as `EasyPositiveTripletLoss`, also with references.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, unknown names, a temperature that is not positive.
        IndexError: a self index out of range.

    Gradients: embeddings and reference_embeddings; the choice of positives has none.

    Source: van den Oord et al., Representation learning with contrastive predictive coding, 2018, InfoNCE; positives of
    Levi et al., Rethinking preventing class-collapsing in metric learning with margin-based losses, 2020, easy
    positive sampling; Xuan et al., Improved embeddings with easy positive triplet mining, 2020, for `ephn`.

    >>> import torch
    >>> from fused_margins import EasyPositiveInfoNCELoss
    >>> loss = EasyPositiveInfoNCELoss(temperature=0.5)
    >>> loss(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]), torch.tensor([0, 0, 1]))
    tensor(0.5881)
    """

    drop_dissimilar = False  # of a module that an earlier version pickled

    def __init__(
        self,
        temperature: float = 0.1,
        positives: str = "easy",
        *,
        negatives: str = "all",
        reduction: str = "mean",
        backend: str = "auto",
        generator: torch.Generator | None = None,
        duplicates_above: float | None = None,
        drop_dissimilar: bool = False,
    ) -> None:
        super().__init__(
            positives,
            negatives,
            "cosine",
            False,  # the cosine sees to it
            reduction,
            backend,
            generator,
            valid_negatives=("all", *NEGATIVES),
        )
        self.temperature = checks.positive_number("temperature", temperature)
        if 1 / self.temperature > torch.finfo(torch.float32).max:
            raise ValueError(f"temperature: expected a number whose inverse float32 can hold, got {temperature}")
        if duplicates_above is not None:
            duplicates_above = checks.number("duplicates_above", duplicates_above, "a number or None")
            if positives != "easy":
                raise ValueError(f"duplicates_above: expected with positives 'easy' alone, got {positives!r}")
        self.duplicates_above = duplicates_above
        self.drop_dissimilar = checks.flag("drop_dissimilar", drop_dissimilar)
        if self.drop_dissimilar and negatives == "all":
            raise ValueError("drop_dissimilar: expected with one negative an anchor, got negatives 'all'")

    @classmethod
    def ephn(cls, negatives: str = "hard", **options: Any) -> "EasyPositiveInfoNCELoss":
        """Easy positives and hard negatives (EPHN), or with "semihard" EPSHN, as the authors train them.

            loss_i = -log( exp(u_{i,p(i)} / 0.1) / (exp(u_{i,p(i)} / 0.1) + exp(u_{i,n(i)} / 0.1)) )

        Dropped, as in their code: positives of a cosine above 0.9999, which are duplicates, so that the next one is
        taken; anchors whose positive or negative has a cosine that is not above 0. The mean is over what is left.

        Args:
            negatives: "hard" or "semihard". options: as for the constructor; they override these settings.

        >>> from fused_margins import EasyPositiveInfoNCELoss
        >>> EasyPositiveInfoNCELoss.ephn().temperature
        0.1
        """
        settings = {"temperature": 0.1, "duplicates_above": 0.9999, "drop_dissimilar": True}
        return cls(negatives=negatives, **(settings | options))

    def _loss(self, sides: Sides) -> Tensor:
        if self.negatives != "all" or self.positives == "all":
            return super()._loss(sides)
        positives = self._find_positives(sides)
        of_sides = sides.x, sides.y, positives.reference, sides.labels, sides.reference_labels, sides.self_index
        call = Contrast(*of_sides, 1 / self.temperature, epilogue=Epilogue.INFO_NCE, reduction=self._reduction)
        return self._or_nan(contrast.run(call, self.backend, valid=False), sides, positives)

    def _row_losses(self, sides: Sides) -> RowLosses:
        positives, scale = self._find_positives(sides), 1 / self.temperature
        u = sides.pairs(positives.anchor, positives.reference, Similarity.COSINE)
        if self.negatives == "all":  # once an anchor, not once a pair
            negative_lse = positives.of_anchor(sides.log_sum_exp(Relation.DIFFERENT, scale, self.backend))
        else:
            negative = self._find_negatives(sides, positives)
            negative_lse = sides.pairs(positives.anchor, negative, Similarity.COSINE) * scale
            negative_lse = torch.where(negative >= 0, negative_lse, -torch.inf)
        active = (positives.reference >= 0) & (negative_lse > -torch.inf)
        if self.drop_dissimilar:
            active = active & ~(u <= 0) & ~(negative_lse <= 0)  # what is not a number stays, and is seen
        loss = torch.where(active, softplus(log_odds(negative_lse, u * scale)), 0.0)
        return RowLosses(loss, active.to(loss.dtype), positives)

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature:g}, positives={self.positives!r}, negatives={self.negatives!r}, "
            f"reduction={self.reduction!r}, backend={self.backend!r}"
        )
