"""Random choices of positives and negatives; the nearest ones are in `fused_margins.functional`."""

import torch
from torch import Tensor

from ..functional import cluster_distances
from ..ops.labels import IGNORED, check_index
from ..ops.similarity import accumulation_dtype

NEAREST_DISTANCE, FARTHEST_DISTANCE = 0.5, 1.4
ENTRIES_AT_ONCE = 1 << 22  # distances are taken in blocks of rows that hold about this many


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
    size = reference_labels.shape[0]
    if size == 0:
        return torch.full_like(labels, -1, dtype=torch.int64)
    # Sorted by label, a class is one run of references: first .. last - 1.
    by_label, order = torch.sort(reference_labels.long(), stable=True)
    wanted = labels.long().contiguous()
    first = torch.searchsorted(by_label, wanted)
    last = torch.searchsorted(by_label, wanted, right=True)
    if self_index is None:
        own_place = torch.full_like(first, -1)
    else:
        place = torch.empty_like(order).scatter_(0, order, torch.arange(size, device=order.device))
        self_index = check_index(self_index, size, IGNORED, "self_index")
        own_place = torch.where(self_index >= 0, place[self_index.clamp(min=0)], -1)
    own_in_run = (own_place >= first) & (own_place < last)
    count = last - first - own_in_run.long()
    drawn = (_uniform(count.shape, count.device, generator) * count).long()
    drawn = first + torch.minimum(drawn, count - 1).clamp(min=0)
    drawn = drawn + (own_in_run & (drawn >= own_place)).long()  # the run without the anchor closes up by one
    return torch.where(count > 0, order[drawn.clamp(max=size - 1)], -1)


def distance_weighted_negatives(
    embeddings: Tensor,
    labels: Tensor,
    reference_embeddings: Tensor,
    reference_labels: Tensor,
    generator: torch.Generator | None = None,
    backend: str = "auto",
) -> Tensor:
    """For each anchor a reference of another class, drawn so that its distance d is spread evenly over its range.

        P(j) proportional to 1 / q(max(d_ij, 0.5)) where d_ij < 1.4
        log q(d) = (D - 2) log d + (D - 3)/2 log(1 - d^2 / 4)

    q is the density of distances between random points of the unit sphere in D dimensions. The draw is the arg-max of
    log P plus Gumbel noise, row by row: no weight is ever exponentiated, so none underflows. A row whose negatives all
    lie beyond 1.4 draws uniformly among them.

    Args:
        embeddings: (B, D) of unit length. labels: (B,) integers.
        reference_embeddings, reference_labels: (N, D) of unit length, and (N,).
        generator: draws the numbers; None for torch's global one.
        backend: of the distances.

    Returns:
        index (B,) int64, -1 for an anchor without a negative. Not differentiable.

    Source: Wu et al., Sampling matters in deep embedding learning, 2017, distance weighted sampling.

    >>> import torch
    >>> x = torch.eye(3)
    >>> distance_weighted_negatives(x[:1], torch.tensor([0]), x, torch.tensor([0, 1, 0]))
    tensor([1])
    """
    rows, columns, width = embeddings.shape[0], reference_embeddings.shape[0], embeddings.shape[1]
    if columns == 0:
        return torch.full_like(labels, -1, dtype=torch.int64)
    embeddings, reference_embeddings = embeddings.detach(), reference_embeddings.detach()
    step = max(1, ENTRIES_AT_ONCE // columns)
    drawn = []
    for i in range(0, max(1, rows), step):
        squared = cluster_distances(embeddings[i : i + step], reference_embeddings, backend=backend)
        squared = squared.to(accumulation_dtype(squared.dtype))
        negative = labels[i : i + step, None] != reference_labels
        log_weight = _log_weight(squared.clamp(min=0).sqrt(), width)
        near = negative & (log_weight > -torch.inf)
        any_near = near.any(1, keepdim=True)
        log_weight = torch.where(any_near, log_weight, 0.0)
        admitted = torch.where(any_near, near, negative)
        noise = -_exponential(log_weight.shape, log_weight.device, generator).log()  # Gumbel
        choice = torch.where(admitted, log_weight + noise, -torch.inf).argmax(1)
        drawn.append(torch.where(admitted.any(1), choice, -1))
    return torch.cat(drawn)


def _log_weight(distance: Tensor, width: int) -> Tensor:
    """-log q(d), d clamped below; -inf from the cut-off on, where a negative has no loss and its weight explodes."""
    d = distance.clamp(NEAREST_DISTANCE, FARTHEST_DISTANCE)
    log_weight = (2 - width) * d.log() - (width - 3) / 2 * torch.log1p(-d.square() / 4)
    return torch.where(distance < FARTHEST_DISTANCE, log_weight, -torch.inf)


def _uniform(shape: torch.Size, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """float32 in [0, 1); a generator draws on its own device, so that a CPU generator serves any."""
    source = device if generator is None else generator.device
    return torch.rand(shape, generator=generator, device=source).to(device)


def _exponential(shape: torch.Size, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Exp(1) variates, never 0: the uniform ones are multiples of 2^-24, and half of that stands for 0."""
    return -torch.log1p(-_uniform(shape, device, generator).clamp(min=2.0**-25))
