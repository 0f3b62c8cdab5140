"""The labelled similarity matrix that every op reduces: its entries, and which of them a row admits.

u_ij is one of

- ``"cosine"``: <x_i, y_j> / (|x_i| |y_j|), and 0 (with zero gradient) where either vector is zero;
- ``"dot"``: <x_i, y_j>;
- ``"negative_squared_euclidean"``: -|x_i - y_j|^2. As a matrix it is expanded around the mean of y, and its error is a
  few roundings of the squared distance from there: one far outlier costs the others digits. Single pairs are exact.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .enums import Relation, Similarity
from .indices import UNADMITTED


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit_rows(x: Tensor) -> Tensor:
    """Rows divided by their length; where its inverse would overflow the row counts as zero, and passes no gradient."""
    if x.shape[-1] == 0:
        return x
    # Relative to their largest entry, which changes no direction, squares neither overflow nor vanish.
    largest = x.detach().abs().amax(dim=-1, keepdim=True)
    x = x / torch.where(largest == 0, 1.0, largest)
    squared = x.square().sum(dim=-1, keepdim=True)
    zero = largest * squared.detach().sqrt() < 1 / torch.finfo(x.dtype).max
    return x * torch.where(zero, 0.0, torch.where(zero, 1.0, squared).rsqrt())


def _centred(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both from the centre of y on: an expanded distance cancels far from the origin, and changes by nothing else."""
    centre = y.detach().nan_to_num(0.0, 0.0, 0.0).mean(dim=0) if y.shape[0] else 0.0
    return x - centre, y - centre


def similarity_matrix(x: Tensor, y: Tensor, similarity: Similarity) -> Tensor:
    """u (B, N), accumulated in float32 or float64."""
    x, y = (t.to(accumulation_dtype(t.dtype)) for t in (x, y))
    if similarity == Similarity.COSINE:
        return unit_rows(x) @ unit_rows(y).T
    if similarity == Similarity.DOT:
        return x @ y.T
    x, y = _centred(x, y)
    u = 2 * x @ y.T - x.square().sum(1, keepdim=True) - y.square().sum(1)
    return u - u.detach().clamp(min=0)  # at most 0 in spite of rounding; a clamp would lose the second derivative


def pair_similarity(x: Tensor, y: Tensor, similarity: Similarity) -> Tensor:
    """u of row i of x with row i of y, over the last axis. Distances as sum (x - y)^2: exact at and near 0."""
    x, y = (t.to(accumulation_dtype(t.dtype)) for t in (x, y))
    if similarity == Similarity.COSINE:
        return (unit_rows(x) * unit_rows(y)).sum(-1)
    if similarity == Similarity.DOT:
        return (x * y).sum(-1)
    return -(x - y).square().sum(-1)


def similarity_sum(x: Tensor, y: Tensor, weight: Tensor, similarity: Similarity) -> Tensor:
    """sum_j weight_j u_ij (B,), from one vector of width D instead of the matrix; under autocast in full, too."""
    x, y = (t.to(accumulation_dtype(t.dtype)) for t in (x, y))
    with torch.autocast(x.device.type, enabled=False):
        if similarity == Similarity.COSINE:
            x, y = unit_rows(x), unit_rows(y)
        elif similarity == Similarity.NEGATIVE_SQUARED_EUCLIDEAN:
            x, y = _centred(x, y)
        together = (x * (weight @ y)).sum(1)
        if similarity != Similarity.NEGATIVE_SQUARED_EUCLIDEAN:
            return together
        return 2 * together - x.square().sum(1) * weight.sum() - (weight @ y.square()).sum()


def take_rows(t: Tensor, index: Tensor) -> Tensor:
    """t[index] (B, ...); some row, which nobody counts, where the index is out of range, and zeros where t has none.

    An embedding look-up adds the gradients of a row in a fixed order; those of t[index] meet in atomics on a CPU.
    """
    if not t.shape[0]:
        return t.new_zeros(index.shape[0], *t.shape[1:])
    # An embedding of nothing has no second derivative; nor has a graph, whose number of pairs may be unknown.
    if not torch.compiler.is_compiling() and not index.shape[0]:
        return t[:0]
    if t.dim() == 2 and not t.shape[1]:
        return t.new_zeros(index.shape[0], 0)  # nor one of vectors without entries, on a GPU, a first one
    index = index.long().clamp(0, t.shape[0] - 1)
    return F.embedding(index, t) if t.dim() == 2 else F.embedding(index, t[:, None])[:, 0]


def admitted(row_labels: Tensor, column_labels: Tensor, relation: Relation, self_index: Tensor | None) -> Tensor:
    """(B, N) bool: the columns that each row may use; neither the column that is the row itself nor UNADMITTED ones."""
    if relation == Relation.DIFFERENT:
        mask = row_labels[:, None] != column_labels
    elif relation == Relation.SAME:
        mask = row_labels[:, None] == column_labels
    else:
        mask = torch.ones(row_labels.shape[0], column_labels.shape[0], dtype=torch.bool, device=row_labels.device)
    mask = mask & (column_labels.long() != UNADMITTED)
    if self_index is not None:
        columns = torch.arange(column_labels.shape[0], device=column_labels.device)
        mask = mask & (self_index[:, None] != columns)
    return mask


def best_of_groups(u: Tensor, mask: Tensor, group_size: int) -> Tensor:
    """(B, N) bool: of each group of columns the most similar one that the mask admits, the first of equal ones."""
    if group_size == 1 or not mask.numel():
        return mask
    seen = torch.where(mask, u.detach(), -torch.inf).unflatten(1, (mask.shape[1] // group_size, group_size))
    best = seen.argmax(2, keepdim=True) == torch.arange(group_size, device=u.device)
    return mask & best.flatten(1)


def less_by_rounding(u: Tensor, width: int, size: float | Tensor | None) -> Tensor:
    """u less what the rounding of a sum of `width` products can make of it, which are `size` in all; None: |u|."""
    lower = u - (width + 8) * torch.finfo(u.dtype).eps * (u.abs() if size is None else size)
    return torch.where(u.isfinite() & lower.isfinite(), lower, u)
