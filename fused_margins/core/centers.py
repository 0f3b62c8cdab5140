"""Classes with several centers: one similarity of a row and a class is made of those with its centers.

    u_ic = max_k u(x_i, w_ck)                                  at temperature 0
    u_ic = sum_k softmax_k(u(x_i, w_ck) / t) u(x_i, w_ck)      at temperature t > 0

Symbols: B rows x_i (B, D), C classes of K centers w (C, K, D). What a head needs of the B x C similarities are the two
vectors of `contrast`, so the classes are taken in pieces.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .enums import Similarity
from .indices import ABSENT, IGNORED, INVALID, check_index
from .reductions import masked_logsumexp
from .similarity import accumulation_dtype, pair_similarity, similarity_matrix, take_rows, unit_rows


def class_similarity(u: Tensor, temperature: float) -> Tensor:
    """(...) of similarities with the centers (K, ...)."""
    if temperature == 0:
        return u.max(dim=0).values
    return ((u / temperature).softmax(0) * u).sum(0)


def class_similarities(x: Tensor, centers: Tensor, similarity: Similarity, temperature: float) -> Tensor:
    """(B, C), accumulated in float32 or float64."""
    u = similarity_matrix(x, centers.flatten(0, 1), similarity).unflatten(1, centers.shape[:2])
    return class_similarity(u.movedim(2, 0), temperature)


def center_vectors(
    x: Tensor,
    centers: Tensor,
    target: Tensor,
    scale: float | Tensor,
    *,
    similarity: Similarity = Similarity.COSINE,
    temperature: float = 0.0,
    ignore_index: int = IGNORED,
    piece_bytes: int = 2**23,
) -> tuple[Tensor, Tensor]:
    """positive (B,) and negative_lse (B,): the similarity with the own class, log-sum-exp of scale times the others.

    scale: a number, or a 0-d or (B,) tensor. piece_bytes: of the similarities with the centers of some classes; these
    are dropped and made again in the backward pass, unless one piece takes all. Rows that are ignored count as in
    `fused_margins.ops.contrast`.
    """
    num_classes, num_centers, width = centers.shape
    target = check_index(target, num_classes, ignore_index, "labels", absent=True)
    x, centers = (t.to(accumulation_dtype(t.dtype)) for t in (x, centers))
    if similarity == Similarity.COSINE:
        x, centers, similarity = unit_rows(x), unit_rows(centers), Similarity.DOT
    of_row = scale[:, None] if isinstance(scale, Tensor) and scale.dim() else scale

    def negatives(x: Tensor, piece: Tensor, first: int) -> Tensor:
        """Log-sum-exp (B,) over the classes of a piece, from `first` on, that are not the own one."""
        z = of_row * class_similarities(x, piece, similarity, temperature)
        classes = torch.arange(first, first + piece.shape[0], device=x.device)
        return masked_logsumexp(z, (classes != target[:, None]) & (target != IGNORED)[:, None])

    together = max(2, piece_bytes // max(1, x.shape[0] * num_centers * x.dtype.itemsize))
    if together >= num_classes:
        negative_lse = negatives(x, centers, 0)
    else:
        of_pieces = [
            checkpoint(negatives, x, piece, i * together, use_reentrant=False, preserve_rng_state=False)
            for i, piece in enumerate(centers.split(together))
        ]
        lse = torch.stack(of_pieces, dim=1)  # (B, pieces)
        negative_lse = masked_logsumexp(lse, lse != -torch.inf)
    own = take_rows(centers.flatten(1), target).unflatten(1, (num_centers, width))  # (B, K, D)
    positive = class_similarity(pair_similarity(x[:, None], own, similarity).T, temperature)
    positive = torch.where((target == IGNORED) | (target == ABSENT), 0.0, positive)
    invalid = target == INVALID
    return torch.where(invalid, torch.nan, positive), torch.where(invalid, torch.nan, negative_lse)
