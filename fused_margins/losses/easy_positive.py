"""Easy positives: an anchor is pulled to the nearest sample of its class alone, so that a class may keep several modes.

Here are the choice of positives and negatives, which three losses share, and the triplet loss; the margin loss and
InfoNCE have files of their own. The other positives, "random", "hard" and "all", are what easy ones are compared with.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..backends import registry
from ..core import checks
from ..core.enums import Reduction, Relation, Similarity
from ..core.reductions import reduce_loss
from ..core.similarity import accumulation_dtype, take_rows, unit_rows
from ..mining.negatives import NEGATIVES, distance_weighted_negatives, nearest_negatives, random_negatives
from ..mining.positives import POSITIVES, all_positives, nearest_positives, random_positives
from ..mining.sides import Sides, check_sides


def checked_margin(margin: float) -> float:
    checked = checks.finite_number("margin", margin)
    if not checked >= 0:
        raise ValueError(f"margin: expected a number of at least 0, got {margin}")
    return checked


class Positives(NamedTuple):
    """P pairs of an anchor and a positive: one an anchor, in their order, or all there are."""

    anchor: Tensor | None  # (P,) None where pair i is that of anchor i
    reference: Tensor  # (P,) -1 for an anchor alone in its class
    similarity: Tensor | None  # (P,) not differentiable, -inf where there is none; None where nobody asks

    def of_anchor(self, t: Tensor) -> Tensor:
        """(P, ...) of each pair, from (B, ...) of each anchor."""
        return t if self.anchor is None or not t.shape[0] else take_rows(t, self.anchor)


class RowLosses(NamedTuple):
    """Losses before they are reduced: of each anchor, or of each pair."""

    loss: Tensor  # (P,)
    weight: Tensor  # (P,) how much each counts in a mean
    positives: Positives | None = None  # whose pairs they are; None for anchors


class EasyPositiveLoss(nn.Module):
    """What the losses share: both sides of the search, and positives and negatives for the anchors."""

    duplicates_above: float | None = None  # easy positives as similar as that are copies of the anchor, and none

    def __init__(
        self,
        positives: str,
        negatives: str,
        similarity: str,
        normalize: bool,
        reduction: str,
        backend: str,
        generator: torch.Generator | None,
        *,
        valid_negatives: tuple[str, ...] = NEGATIVES,
    ) -> None:
        super().__init__()
        checks.one_of("positives", positives, POSITIVES)
        checks.one_of("negatives", negatives, valid_negatives)
        checks.choice("similarity", similarity, Similarity)
        checks.choice("reduction", reduction, Reduction)
        self.positives, self.negatives = positives, negatives
        self.similarity, self.normalize = similarity, checks.flag("normalize", normalize)
        self.reduction, self.backend, self.generator = reduction, registry.known(backend), checks.generator(generator)

    @property
    def _similarity(self) -> Similarity:
        return checks.choice("similarity", self.similarity, Similarity)

    @property
    def _reduction(self) -> Reduction:
        return checks.choice("reduction", self.reduction, Reduction)

    def _sides(
        self,
        embeddings: Tensor,
        labels: Tensor,
        reference_embeddings: Tensor | None,
        reference_labels: Tensor | None,
        self_index: Tensor | None,
    ) -> Sides:
        """Checked, and of unit length where asked for."""
        draws = self.positives == "random" or self.negatives in ("random", "distance-weighted")
        if draws and self.generator is not None and not torch.compiler.is_compiling():
            checks.not_in_a_backward(f"{type(self).__name__} with a generator")
        sides = check_sides(embeddings, labels, reference_embeddings, reference_labels, self_index)
        if not self.normalize:
            return sides
        x = unit_rows(sides.x.to(accumulation_dtype(sides.x.dtype)))
        return sides._replace(x=x, y=x if sides.y is sides.x else unit_rows(sides.y.to(x.dtype)))

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        reference_embeddings: Tensor | None = None,
        reference_labels: Tensor | None = None,
        self_index: Tensor | None = None,
    ) -> Tensor:
        return self._loss(self._sides(embeddings, labels, reference_embeddings, reference_labels, self_index))

    def _loss(self, sides: Sides) -> Tensor:
        loss, weight, positives = self._row_losses(sides)
        return self._or_nan(reduce_loss(loss, weight, self._reduction), sides, positives)

    def _row_losses(self, sides: Sides) -> RowLosses:
        """What `_loss` reduces. Of the references it asks what `Sides` answers, and reads none itself."""
        raise NotImplementedError

    def _check_labels(self, labels: Tensor) -> None:
        """An IndexError for labels (B,) that the loss has nothing for."""

    def _or_nan(self, loss: Tensor, sides: Sides, positives: Positives | None = None) -> Tensor:
        """The loss of an anchor that is not finite is NaN, and so is that of all anchors where a reference is not.

        Whatever is not finite is never found as a positive or negative, so that without this a dead network would have
        the loss 0. Nothing is read by the host.
        """
        not_finite = sides.not_finite(self._similarity)
        if self._reduction != Reduction.NONE:
            not_finite = not_finite.sum()
        elif not_finite.dim() and positives is not None:
            not_finite = positives.of_anchor(not_finite)
        return loss * (1 + not_finite)

    def _find_positives(self, sides: Sides) -> Positives:
        if self.positives == "easy" and self.duplicates_above is not None:
            below = torch.full_like(sides.labels, self.duplicates_above, dtype=accumulation_dtype(sides.x.dtype))
            similarity, index = sides.nearest(self._similarity, Relation.SAME, self.backend, below=below)
            return Positives(None, index, similarity)
        if self.positives in ("easy", "hard"):
            similarity, index = nearest_positives(sides, self._similarity, self.positives == "easy", self.backend)
            return Positives(None, index, similarity)
        anchor, labels = None, (sides.labels, sides.reference_labels, sides.self_index)
        if self.positives == "random":
            index = random_positives(*labels, self.generator)
        else:
            anchor, index = all_positives(*labels)
        if self.negatives != "semihard":
            return Positives(anchor, index, None)
        with torch.no_grad():
            similarity = sides.pairs(anchor, index, self._similarity)
        return Positives(anchor, index, torch.where(index >= 0, similarity, -torch.inf))

    def _find_negatives(self, sides: Sides, positives: Positives) -> Tensor:
        """Index (P,), -1 where there is none. The hardest is the anchor's; the others are found for each pair."""
        if self.negatives == "hard":
            return positives.of_anchor(self._mine_negatives(sides, None))
        if positives.anchor is not None:
            of_self = None if sides.self_index is None else positives.of_anchor(sides.self_index)
            x, labels = positives.of_anchor(sides.x.detach()), positives.of_anchor(sides.labels)
            sides = sides._replace(x=x, labels=labels, self_index=of_self)
        if self.negatives == "semihard":
            return self._mine_negatives(sides, positives.similarity)
        if self.negatives == "random":
            return random_negatives(sides.labels, sides.reference_labels, sides.self_index, self.generator)
        return distance_weighted_negatives(
            sides.x, sides.labels, sides.y, sides.reference_labels, self.generator, self.backend, sides.self_index
        )

    def _mine_negatives(self, sides: Sides, below: Tensor | None) -> Tensor:
        return nearest_negatives(sides, self._similarity, below is not None, below, self.backend)[1]


class EasyPositiveTripletLoss(EasyPositiveLoss):
    """Triplet loss on each anchor's easy positive.

        loss_i = relu(margin + u_{i,n(i)} - u_{i,p(i)}),   p(i) = argmax over j != i with label_j = label_i of u_ij

    With u the negative squared distance this is relu(d^2_ap - d^2_an + margin). An anchor is active if it has a
    positive and a negative; the others have loss 0.

    Args:
        margin: at least 0, in units of u. Unit vectors at cosine c are at squared distance 2 - 2 c, so a margin of
            0.2 for squared distances is one of 0.1 for cosines.
        negatives: n(i) is the most similar negative ("hard"), the most similar of those less similar than the
            positive ("semihard"; an anchor without one is inactive: it waits until its positive has come nearer), one
            drawn uniformly ("random"), or one drawn evenly over the distances between unit vectors
            ("distance-weighted"; see `fused_margins.mining`).
        positives: "easy"; or for comparison "random" (drawn uniformly from the class), "hard" (the least similar of
            the class), or "all": each other sample of the class makes a pair with a negative of its own, P pairs of
            width D in all, and the loss is one of pairs.
        similarity: u, "negative_squared_euclidean", "cosine" or "dot".
        normalize: bring the embeddings to unit length first.
        reduction: "mean" (over active anchors or pairs; 0 if there are none), "sum" or "none".
        backend: "auto", or the name of one; see `fused_margins.explain`.
        generator: draws what is random; None for torch's global one. torch.compile takes only None, and not "all".

    Call: loss(embeddings (B, D), labels (B,) integers) gives a scalar, or for "none" (B,), with all positives (P,) in
    the order of the anchors and their positives; float32, float64 for float64. With reference_embeddings (N, D) and
    reference_labels (N,) (a memory bank; see `CrossBatchMemory`) positives and negatives come from there; self_index
    (B,) then names the reference that is the anchor itself, -1 for none. A bank that holds the batch needs it.

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
        super().__init__(positives, negatives, similarity, normalize, reduction, backend, generator)
        self.margin = checked_margin(margin)

    def _row_losses(self, sides: Sides) -> RowLosses:
        positives = self._find_positives(sides)
        negative = self._find_negatives(sides, positives)
        active = (positives.reference >= 0) & (negative >= 0)
        to_positive, to_negative = (
            sides.pairs(positives.anchor, reference, self._similarity) for reference in (positives.reference, negative)
        )
        loss = torch.where(active, F.relu(self.margin + to_negative - to_positive), 0.0)
        return RowLosses(loss, active.to(loss.dtype), positives)

    def extra_repr(self) -> str:
        parts = [f"margin={self.margin:g}", f"negatives={self.negatives!r}", f"positives={self.positives!r}"]
        parts += [f"similarity={self.similarity!r}", f"normalize={self.normalize}"]
        return ", ".join([*parts, f"reduction={self.reduction!r}", f"backend={self.backend!r}"])
