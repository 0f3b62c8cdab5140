"""Negatives for anchors: the hardest, semi-hard, drawn uniformly, and drawn evenly over distances."""

import torch
from torch import Tensor

from ..core import checks
from ..core.enums import Relation, Similarity
from ..core.similarity import less_by_rounding, take_rows
from ..ops.sample import sample
from .sides import CALLED, Sides, below, check_labels, runs_of, sides_of

STRATEGIES = ("hard", "semihard")
NEGATIVES = (*STRATEGIES, "random", "distance-weighted")


def mine_negatives(
    embeddings: Tensor,
    labels: Tensor,
    *,
    strategy: str = "hard",
    positive_similarity: Tensor | None = None,
    similarity: str = "cosine",
    reference_embeddings: Tensor | None = None,
    reference_labels: Tensor | None = None,
    self_index: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Each anchor's hardest negative, or the hardest that is less similar than its positive.

        index_i = argmax over j with label_j != label_i (and, semi-hard, u_ij < u_positive(i)) of  u_ij

    Less similar by more than rounding, (D + 8) eps of the lengths of anchor and positive (of a dot product's bound, if
    given): a copy of the positive with another label is none of them.

    Args:
        embeddings: (B, D) anchors. labels: (B,) integers; -2**63 is reserved for what nobody finds.
        strategy: "hard" or "semihard".
        positive_similarity: (B,) the bound of "semihard"; None mines the easy positives for it.
        similarity, reference_embeddings, reference_labels, self_index, backend: as for `mine_positives`.

    Returns:
        similarity (B,), float32 (float64 for float64), and index (B,) int64; -inf and -1 where no negative is admitted.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, unknown names. IndexError: a self index out of range.

    Gradients: none; gather the negatives by their index and differentiate their similarity.

    Source: Schroff et al., FaceNet: A unified embedding for face recognition and clustering, 2015, semi-hard
        negatives of section 3.2.

    >>> import torch
    >>> from fused_margins.functional import mine_negatives
    >>> embeddings = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.9, 0.1], [0.0, 1.0]])
    >>> mine_negatives(embeddings, torch.tensor([0, 0, 1, 1]), strategy="semihard")[1]
    tensor([ 3,  3, -1,  0])
    """
    checks.one_of("strategy", strategy, STRATEGIES)
    measure = checks.choice("similarity", similarity, Similarity)
    sides = sides_of(embeddings, labels, reference_embeddings, reference_labels, self_index)
    bound = positive_similarity
    if bound is not None:
        checks.matrices(sides.x, sides.y, ("embeddings", "reference_embeddings"))
        bound = checks.vector("positive_similarity", bound, embeddings.shape[0], embeddings)
    return nearest_negatives(sides, measure, strategy == "semihard", bound, backend)


def nearest_negatives(
    sides: Sides, similarity: Similarity, semihard: bool, bound: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    """`mine_negatives` of both sides; bound: the positive's similarity, if semi-hard."""
    x = sides.x
    most: Tensor | None = None
    if semihard:
        size = 1.0 if similarity == Similarity.COSINE else None
        if bound is None:
            bound, index = sides.nearest(similarity, Relation.SAME, backend)
            if similarity == Similarity.DOT:
                pair = x.detach(), take_rows(sides.y.detach(), index)
                size = pair[0].to(bound.dtype).norm(dim=1) * pair[1].to(bound.dtype).norm(dim=1)
        most = less_by_rounding(bound.detach(), x.shape[1], size)
    return sides.nearest(similarity, Relation.DIFFERENT, backend, below=most)


def random_negatives(
    labels: Tensor, reference_labels: Tensor, self_index: Tensor | None, generator: torch.Generator | None = None
) -> Tensor:
    """For each anchor a reference of another class, drawn uniformly; O((B + N) log N), no B x N matrix.

    Args:
        labels, reference_labels, self_index, generator: as for `random_positives`.

    Returns:
        index (B,) int64, -1 where every reference is of the anchor's class.

    >>> import torch
    >>> labels = torch.tensor([3, 5, 3])
    >>> random_negatives(labels[:2], labels[:2], None)
    tensor([1, 0])
    """
    check_labels(labels, reference_labels, self_index)
    checks.generator(generator)
    size = reference_labels.shape[0]
    if size == 0:
        return torch.full_like(labels, -1, dtype=torch.int64)
    runs = runs_of(labels, reference_labels, self_index)
    count = runs.negatives()
    place = runs.unadmitted + below(count, generator)
    # The order without the run and without the anchor closes up: open it again where each of them was.
    own = torch.where(runs.own >= runs.first, runs.own - runs.size, runs.own)
    place = place + (runs.own_outside() & (place >= own)).long()
    place = place + torch.where(place >= runs.first, runs.size, 0)
    return torch.where(count > 0, runs.order[place.clamp(max=size - 1)], -1)


def distance_weighted_negatives(
    embeddings: Tensor,
    labels: Tensor,
    reference_embeddings: Tensor,
    reference_labels: Tensor,
    generator: torch.Generator | None = None,
    backend: str = "auto",
    self_index: Tensor | None = None,
) -> Tensor:
    """For each anchor a reference of another class, drawn so that its distance d is spread evenly over its range.

        P(j) proportional to 1 / q(max(d_ij, 0.5)) where d_ij < 1.4
        log q(d) = (D - 2) log d + (D - 3)/2 log(1 - d^2 / 4)

    d is the distance of directions, q its density between random points of the unit sphere in D dimensions. A row whose
    negatives all lie beyond 1.4 draws uniformly among them. See `fused_margins.ops.sample` for how it draws.

    Args:
        embeddings: (B, D) of any length: their directions count. labels: (B,) integers.
        reference_embeddings, reference_labels: (N, D) and (N,).
        generator: draws a seed, of which all numbers follow; None for torch's global one.
        backend: "auto", or the name of one; see `fused_margins.explain`.
        self_index: (B,) the reference that is the anchor and is never drawn, -1 for none; None for none anywhere.

    Returns:
        index (B,) int64, -1 for an anchor without a negative. Not differentiable.

    Source: Wu et al., Sampling matters in deep embedding learning, 2017, distance weighted sampling.

    >>> import torch
    >>> x = torch.eye(3)
    >>> distance_weighted_negatives(x[:1], torch.tensor([0]), x, torch.tensor([0, 1, 0]))
    tensor([1])
    """
    checks.matrices(embeddings, reference_embeddings, ("embeddings", "reference_embeddings"))
    checks.labels("labels", labels, embeddings.shape[0], embeddings)
    checks.generator(generator)
    source = labels.device if generator is None else generator.device
    seed = torch.randint(1 << 32, (), generator=generator, device=source).to(labels.device)
    sides = (embeddings, reference_embeddings, labels, reference_labels)
    return sample(*sides, seed, self_index=self_index, backend=backend, names=CALLED)
