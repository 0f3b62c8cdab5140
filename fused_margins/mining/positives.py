"""Positives for anchors: easy, hard, drawn at random, and all there are."""

import torch
from torch import Tensor

from ..core import checks
from ..core.enums import Relation, Similarity
from .sides import Sides, below, check_labels, runs_of, sides_of

POSITIVE_STRATEGIES = ("easy", "hard")
POSITIVES = ("easy", "random", "hard", "all")


def mine_positives(
    embeddings: Tensor,
    labels: Tensor,
    *,
    strategy: str = "easy",
    similarity: str = "cosine",
    reference_embeddings: Tensor | None = None,
    reference_labels: Tensor | None = None,
    self_index: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Each anchor's easy positive, the most similar other sample of its class, or its hard one, the least similar.

        index_i = argmax (easy) or argmin (hard) over j != i with label_j = label_i of  u_ij

    Args:
        embeddings: (B, D) anchors. labels: (B,) integers; -2**63 is reserved for what nobody finds.
        strategy: "easy" or "hard".
        similarity: "cosine", "dot" or "negative_squared_euclidean".
        reference_embeddings, reference_labels: (N, D) and (N,): search these instead of the batch, a memory bank or a
            gathered batch.
        self_index: (B,) the reference that *is* the anchor and is never its positive, -1 for none. Within the batch it
            is 0 .. B-1; with references it is none unless given.
        backend: "auto", or the name of one.

    Returns:
        similarity (B,), float32 (float64 for float64), and index (B,) int64; -inf and -1 for an anchor alone in its
        class.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, unknown names. IndexError: a self index out of range.

    Gradients: none; gather the positives by their index and differentiate their similarity.

    Source: Levi et al., Rethinking preventing class-collapsing in metric learning with margin-based losses,
        2020, easy positive sampling; Hermans et al., In defense of the triplet loss for person re-identification,
        2017, the hardest positive of "batch hard".

    >>> import torch
    >>> from fused_margins.functional import mine_positives
    >>> embeddings = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [0.0, 2.0]])
    >>> mine_positives(embeddings, torch.tensor([0, 0, 0, 1]))
    (tensor([0.8000, 0.8000, 0.6000,   -inf]), tensor([ 1,  0,  1, -1]))
    >>> mine_positives(embeddings, torch.tensor([0, 0, 0, 1]), strategy="hard")[1]
    tensor([ 2,  2,  0, -1])
    """
    checks.one_of("strategy", strategy, POSITIVE_STRATEGIES)
    measure = checks.choice("similarity", similarity, Similarity)
    sides = sides_of(embeddings, labels, reference_embeddings, reference_labels, self_index)
    return nearest_positives(sides, measure, strategy == "easy", backend)


def nearest_positives(sides: Sides, similarity: Similarity, easy: bool, backend: str) -> tuple[Tensor, Tensor]:
    """`mine_positives` of both sides."""
    return sides.nearest(similarity, Relation.SAME, backend, largest=easy)


def random_positives(
    labels: Tensor, reference_labels: Tensor, self_index: Tensor | None, generator: torch.Generator | None = None
) -> Tensor:
    """For each anchor a reference of its class, drawn uniformly; O((B + N) log N), no B x N matrix.

    Args:
        labels: (B,) integers. reference_labels: (N,) integers.
        self_index: (B,) the reference that is the anchor and is never drawn, -1 for none; None for none anywhere.
        generator: draws the numbers; None for torch's global one.

    Returns:
        index (B,) int64, -1 for an anchor alone in its class.

    >>> import torch
    >>> labels = torch.tensor([3, 5, 3])
    >>> random_positives(labels, labels, self_index=torch.arange(3))
    tensor([ 2, -1,  0])
    """
    check_labels(labels, reference_labels, self_index)
    checks.generator(generator)
    if reference_labels.shape[0] == 0:
        return torch.full_like(labels, -1, dtype=torch.int64)
    runs = runs_of(labels, reference_labels, self_index)
    count = runs.positives()
    return torch.where(count > 0, runs.mate(below(count, generator)), -1)


def all_positives(labels: Tensor, reference_labels: Tensor, self_index: Tensor | None) -> tuple[Tensor, Tensor]:
    """Every pair of an anchor and another reference of its class: P pairs, the sum over anchors of their mates.

    Within a batch P = sum_c n_c (n_c - 1). Its number depends on the labels' values, so that a GPU synchronises once.

    Args:
        labels, reference_labels, self_index: as for `random_positives`.

    Returns:
        anchor (P,), ascending, and positive (P,), ascending for each anchor, int64.

    >>> import torch
    >>> labels = torch.tensor([3, 5, 3, 3])
    >>> all_positives(labels, labels, self_index=torch.arange(4))
    (tensor([0, 0, 2, 2, 3, 3]), tensor([2, 3, 0, 3, 0, 2]))
    """
    check_labels(labels, reference_labels, self_index)
    if reference_labels.shape[0] == 0:
        return labels.new_empty(0, dtype=torch.int64), labels.new_empty(0, dtype=torch.int64)
    runs = runs_of(labels, reference_labels, self_index)
    count = runs.positives()
    anchor = torch.arange(labels.shape[0], device=labels.device).repeat_interleave(count)
    i = torch.arange(anchor.shape[0], device=labels.device) - (count.cumsum(0) - count)[anchor]
    return anchor, runs.mate(i, anchor)
