"""The margin loss on easy positives: a distance of its own, per class, between positives and negatives."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core import checks
from ..core.enums import Similarity
from ..core.indices import ABSENT, IGNORED, INVALID, check_index
from ..mining.sides import Sides
from .easy_positive import EasyPositiveLoss, RowLosses, checked_margin


class EasyPositiveMarginLoss(EasyPositiveLoss):
    """Margin loss on each anchor's easy positive: positives inside a radius beta, negatives outside it.

        loss_i = relu(d_{i,p(i)} - beta + margin) + relu(beta - d_{i,n(i)} + margin)
        p(i) = argmin over j != i with label_j = label_i of d_ij

    d is the Euclidean distance of unit vectors, in [0, 2]. An anchor alone in its class has loss 0; one without a
    negative only the first term.

    Args:
        num_classes: C makes beta a parameter of shape (C,), one a class, and asks for labels in [0, C), or -1 for an
            anchor that counts for nothing; None keeps one fixed beta for all.
        margin: half the width of the gap, at least 0, in units of d.
        beta: the radius, where it starts if it learns; positive, in units of d.
        negatives: "distance-weighted", "hard", "semihard" (the nearest farther than the positive, none where there is
            none) or "random", as in `EasyPositiveTripletLoss`.
        positives: "easy", or for comparison "random", "hard" or "all", as in `EasyPositiveTripletLoss`.
        reduction: "mean" (over the terms that are not 0, at most two an anchor or pair), "sum" or "none".
        backend: "auto", or the name of one; see `fused_margins.explain`.
        generator: draws what is random; None for torch's global one. torch.compile takes only None, and not "all".

    Attributes:
        beta: (C,) parameter, or a 0-d buffer.

    Call: as `EasyPositiveTripletLoss`, also with references. A learnt beta is that of the anchor's class.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, unknown names, a negative margin or beta.
        IndexError: a self index or, with num_classes, a label out of range (on a GPU that row's loss is NaN).

    Gradients: embeddings, reference_embeddings, beta. That of a distance is 0 at distance 0.

    Source: Wu et al., Sampling matters in deep embedding learning, 2017, margin loss; positives of Levi et al.,
    Rethinking preventing class-collapsing in metric learning with margin-based losses, 2020, easy positive sampling.

    >>> import torch
    >>> from fused_margins import EasyPositiveMarginLoss
    >>> loss = EasyPositiveMarginLoss(num_classes=2, beta=1.0)
    >>> loss(torch.eye(3), torch.tensor([0, 0, 1]))  # every distance is sqrt 2: two positive terms of 0.614
    tensor(0.6142, grad_fn=<MulBackward0>)
    """

    def __init__(
        self,
        num_classes: int | None = None,
        margin: float = 0.2,
        beta: float = 1.2,
        negatives: str = "distance-weighted",
        positives: str = "easy",
        *,
        reduction: str = "mean",
        backend: str = "auto",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(positives, negatives, "negative_squared_euclidean", True, reduction, backend, generator)
        if num_classes is not None:
            num_classes = checks.integer("num_classes", num_classes, 1)
        self.num_classes, self.margin = num_classes, checked_margin(margin)
        self.initial_beta = checks.positive_number("beta", beta)
        if num_classes is None:
            self.register_buffer("beta", torch.empty(()))
        else:
            self.beta = nn.Parameter(torch.empty(num_classes))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Every radius is what it began with."""
        self.beta.fill_(self.initial_beta)

    def _row_losses(self, sides: Sides) -> RowLosses:
        positives = self._find_positives(sides)
        negative = self._find_negatives(sides, positives)
        beta, counted = self._beta_of_rows(positives.of_anchor(sides.labels))
        active = counted & (positives.reference >= 0)
        to_positive, to_negative = (
            _distance(sides.pairs(positives.anchor, reference, Similarity.NEGATIVE_SQUARED_EUCLIDEAN))
            for reference in (positives.reference, negative)
        )
        too_far = torch.where(active, F.relu(to_positive - beta + self.margin), 0.0)
        too_near = torch.where(active & (negative >= 0), F.relu(beta - to_negative + self.margin), 0.0)
        terms = (too_far > 0).to(too_far.dtype) + (too_near > 0).to(too_far.dtype)
        return RowLosses(too_far + too_near, terms, positives)

    def _check_labels(self, labels: Tensor) -> None:
        if self.num_classes is not None:
            check_index(labels, self.num_classes, IGNORED, "labels", absent=True)

    def _beta_of_rows(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """beta of each row, (P,) or 0-d, and which rows (P,) take part."""
        if self.num_classes is None:
            return self.beta, torch.ones_like(labels, dtype=torch.bool)
        row = check_index(labels, self.num_classes, IGNORED, "labels", absent=True)
        beta = self.beta[row.clamp(min=0)]
        return torch.where(row == INVALID, torch.nan, beta), (row != IGNORED) & (row != ABSENT)

    def extra_repr(self) -> str:
        learnt = f"num_classes={self.num_classes}, " if self.num_classes is not None else ""
        return (
            f"{learnt}margin={self.margin:g}, beta={self.initial_beta:g}, negatives={self.negatives!r}, "
            f"positives={self.positives!r}, reduction={self.reduction!r}, backend={self.backend!r}"
        )


def _distance(u: Tensor) -> Tensor:
    """|x_i - y_i| (B,) of -|x_i - y_i|^2; the square root at 0, where easy positives land, gets gradient 0 instead of
    infinity.
    """
    zero = u == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, -u).sqrt())
