"""InfoNCE on easy positives: the nearest sample of the class against all negatives at once."""

import torch
from torch import Tensor

from ..ops.contrast import contrast
from ..reductions import reduce_loss, softplus
from .easy_positive import EasyPositiveLoss


class EasyPositiveInfoNCELoss(EasyPositiveLoss):
    """InfoNCE on each anchor's easy positive: cross entropy of the positive among all samples of other classes.

        loss_i = -log( exp(u_{i,p(i)} / t) / (exp(u_{i,p(i)} / t) + sum_{j: label_j != label_i} exp(u_ij / t)) )
        p(i) = argmax over j != i with label_j = label_i of u_ij,   u the cosine

    computed as softplus(logsumexp over the negatives - u_positive / t). The rest of the class neither attracts nor
    repels. An anchor is active if it has a positive and a negative; the others have loss 0.

    Args:
        temperature: t > 0, in units of cosine.
        positives: "easy", or "random": drawn uniformly from the class, for comparison.
        reduction: "mean" (over active anchors; 0 if there are none), "sum" or "none".
        backend: "auto", or the name of one; see `fused_margins.explain`.
        generator: draws random positives; None for torch's global one. torch.compile takes only None.

    Call: as `EasyPositiveTripletLoss`, also with references.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, unknown names, a temperature that is not positive.
        IndexError: a self index out of range.

    Gradients: embeddings and reference_embeddings; the choice of positives has none.

    Source: van den Oord et al., Representation learning with contrastive predictive coding, 2018, InfoNCE; positives of
    Levi et al., Rethinking preventing class-collapsing in metric learning with margin-based losses, 2020, easy
    positive sampling.

    >>> import torch
    >>> from fused_margins import EasyPositiveInfoNCELoss
    >>> loss = EasyPositiveInfoNCELoss(temperature=0.5)
    >>> loss(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]), torch.tensor([0, 0, 1]))
    tensor(0.5881)
    """

    def __init__(
        self,
        temperature: float = 0.1,
        positives: str = "easy",
        *,
        reduction: str = "mean",
        backend: str = "auto",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(positives, "cosine", reduction, backend, generator)
        if not temperature > 0:
            raise ValueError(f"temperature: expected a positive number, got {temperature}")
        self.temperature = float(temperature)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        reference_embeddings: Tensor | None = None,
        reference_labels: Tensor | None = None,
        self_index: Tensor | None = None,
    ) -> Tensor:
        sides = self._sides(embeddings, labels, reference_embeddings, reference_labels, self_index, normalize=False)
        _, positive = self._mine_positives(*sides)
        scale = 1 / self.temperature
        u, negative_lse = contrast(
            sides[0], sides[1], positive, *sides[2:4], scale=scale, self_index=sides[4], backend=self.backend
        )
        active = (positive >= 0) & (negative_lse > -torch.inf)
        loss = torch.where(active, softplus(negative_lse - u * scale), 0.0)
        return reduce_loss(loss, active.to(loss.dtype), self.reduction)

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature:g}, positives={self.positives!r}, reduction={self.reduction!r}, "
            f"backend={self.backend!r}"
        )
