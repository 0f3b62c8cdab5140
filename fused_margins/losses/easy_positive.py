"""Easy positives: an anchor is pulled to the nearest sample of its class alone, so that a class may keep several modes.

Here are the choice of positives and negatives, which three losses share, and the triplet loss; the margin loss and
InfoNCE have files of their own. `positives="random"` is the usual sampling that easy positives are compared with.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..functional import STRATEGIES, mine_negatives, mine_positives, search_sides
from ..ops import checks
from ..ops.similarity import accumulation_dtype, pair_similarity, take_rows, unit_rows
from ..reductions import REDUCTIONS, reduce_loss
from .sampling import distance_weighted_negatives, random_positives

POSITIVES = ("easy", "random")


def checked_margin(margin: float) -> float:
    if not margin >= 0:
        raise ValueError(f"margin: expected a number of at least 0, got {margin}")
    return float(margin)


class EasyPositiveLoss(nn.Module):
    """What the losses share: both sides of the search, and a positive and a negative for each anchor."""

    def __init__(
        self, positives: str, similarity: str, reduction: str, backend: str, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        checks.choice("positives", positives, POSITIVES)
        checks.similarity(similarity)
        checks.choice("reduction", reduction, REDUCTIONS)
        self.positives, self.similarity = positives, similarity
        self.reduction, self.backend, self.generator = reduction, backend, generator

    def _sides(
        self,
        embeddings: Tensor,
        labels: Tensor,
        reference_embeddings: Tensor | None,
        reference_labels: Tensor | None,
        self_index: Tensor | None,
        normalize: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """x (B, D), y (N, D), their labels, and which y is the x itself; without references y is x."""
        x, y, labels, column_labels, self_index = search_sides(
            embeddings, labels, reference_embeddings, reference_labels, self_index
        )
        checks.matrices(x, y, ("embeddings", "reference_embeddings"))
        checks.labels("labels", labels, x.shape[0], x)
        checks.labels("reference_labels", column_labels, y.shape[0], x)
        checks.labels("self_index", self_index, x.shape[0], x, optional=True)
        if normalize:
            within_batch = y is x
            x = unit_rows(x.to(accumulation_dtype(x.dtype)))
            y = x if within_batch else unit_rows(y.to(x.dtype))
        return x, y, labels, column_labels, self_index

    def _mine_positives(
        self, x: Tensor, y: Tensor, labels: Tensor, column_labels: Tensor, self_index: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Similarity (B,), not differentiable, and index (B,); -inf and -1 where an anchor is alone."""
        if self.positives == "easy":
            return mine_positives(
                x,
                labels,
                similarity=self.similarity,
                reference_embeddings=y,
                reference_labels=column_labels,
                self_index=self_index,
                backend=self.backend,
            )
        index = random_positives(labels, column_labels, self_index, self.generator)
        similarity = pair_similarity(x.detach(), take_rows(y.detach(), index), self.similarity)
        return torch.where(index >= 0, similarity, -torch.inf), index

    def _mine_negatives(
        self,
        strategy: str,
        positive_similarity: Tensor,
        x: Tensor,
        y: Tensor,
        labels: Tensor,
        column_labels: Tensor,
        self_index: Tensor | None,
    ) -> Tensor:
        """Index (B,), -1 where there is none."""
        if strategy == "distance-weighted":
            return distance_weighted_negatives(x, labels, y, column_labels, self.generator, self.backend)
        _, index = mine_negatives(
            x,
            labels,
            strategy=strategy,
            positive_similarity=positive_similarity,
            similarity=self.similarity,
            reference_embeddings=y,
            reference_labels=column_labels,
            self_index=self_index,
            backend=self.backend,
        )
        return index


class EasyPositiveTripletLoss(EasyPositiveLoss):
    """Triplet loss on each anchor's easy positive.

        loss_i = relu(margin + u_{i,n(i)} - u_{i,p(i)}),   p(i) = argmax over j != i with label_j = label_i of u_ij

    With u the negative squared distance this is relu(d^2_ap - d^2_an + margin). An anchor is active if it has a
    positive and a negative; the others have loss 0.

    Args:
        margin: at least 0, in units of u. Unit vectors at cosine c are at squared distance 2 - 2 c, so a margin of
            0.2 for squared distances is one of 0.1 for cosines.
        negatives: n(i) is the most similar negative ("hard"), or the most similar of those less similar than the
            positive ("semihard"; an anchor without one is inactive: it waits until its positive has come nearer).
        positives: "easy", or "random": drawn uniformly from the class, for comparison.
        similarity: u, "negative_squared_euclidean", "cosine" or "dot".
        normalize: bring the embeddings to unit length first.
        reduction: "mean" (over active anchors; 0 if there are none), "sum" or "none".
        backend: "auto", or the name of one; see `fused_margins.explain`.
        generator: draws random positives; None for torch's global one. torch.compile takes only None.

    Call: loss(embeddings (B, D), labels (B,) integers) gives a scalar, or (B,) for "none"; float32, float64 for
    float64. With reference_embeddings (N, D) and reference_labels (N,) (a memory bank) positives and negatives come
    from there; self_index (B,) then names the reference that is the anchor itself, -1 for none. A bank that holds the
    batch needs it.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, unknown names, a negative margin. IndexError: a self index out
            of range.

    Gradients: embeddings and reference_embeddings; the choice of positives and negatives has none.

    Source: Levi et al., Rethinking preventing class-collapsing in metric learning with margin-based losses, 2020, easy
    positive sampling; the triplet loss of Schroff et al., FaceNet, 2015, section 3.1.

    >>> import torch
    >>> from fused_margins import EasyPositiveTripletLoss
    >>> loss = EasyPositiveTripletLoss(margin=0.2, negatives="hard")
    >>> loss(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]), torch.tensor([0, 0, 1]))
    tensor(0.3000)
    """

    def __init__(
        self,
        margin: float = 0.2,
        negatives: str = "semihard",
        positives: str = "easy",
        *,
        similarity: str = "negative_squared_euclidean",
        normalize: bool = True,
        reduction: str = "mean",
        backend: str = "auto",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(positives, similarity, reduction, backend, generator)
        checks.choice("negatives", negatives, STRATEGIES)
        self.margin, self.negatives, self.normalize = checked_margin(margin), negatives, normalize

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        reference_embeddings: Tensor | None = None,
        reference_labels: Tensor | None = None,
        self_index: Tensor | None = None,
    ) -> Tensor:
        sides = self._sides(embeddings, labels, reference_embeddings, reference_labels, self_index, self.normalize)
        x, y, *_ = sides
        similarity, positive = self._mine_positives(*sides)
        negative = self._mine_negatives(self.negatives, similarity, *sides)
        active = (positive >= 0) & (negative >= 0)
        to_positive = pair_similarity(x, take_rows(y, positive), self.similarity)
        to_negative = pair_similarity(x, take_rows(y, negative), self.similarity)
        loss = torch.where(active, F.relu(self.margin + to_negative - to_positive), 0.0)
        return reduce_loss(loss, active.to(loss.dtype), self.reduction)

    def extra_repr(self) -> str:
        parts = [f"margin={self.margin:g}", f"negatives={self.negatives!r}", f"positives={self.positives!r}"]
        parts += [f"similarity={self.similarity!r}", f"normalize={self.normalize}"]
        return ", ".join([*parts, f"reduction={self.reduction!r}", f"backend={self.backend!r}"])
