"""k-means of each class apart in C++ on a CPU (csrc/kmeans/cpu.cpp): the tensors' memory, handed over."""

import torch
from torch import Tensor

from .native import call, matrix, module

# A class is read twice an iteration, by one thread: beyond a core's cache, many threads on all samples are faster.
CLASS_BYTES = 4 << 20


def refuses(x: Tensor, sizes: Tensor) -> str | None:
    """Why classes of these sizes (C,) are not clustered in one call, or None."""
    if module is None or x.device.type != "cpu":
        return "the kernel is not there"
    if int(sizes.max()) * x.shape[1] * x.element_size() > CLASS_BYTES:
        return "a class does not fit into a core's cache"
    return None


def cluster(
    x: Tensor, members: Tensor, sizes: Tensor, slots: Tensor, waiting: Tensor, num_iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Centroids (K, D), assignments (n,), squared distances (n,) from the own centroid, of x's dtype.

    Args:
        x: (n, D) float32 or float64. members: (n,) samples by class, ascending within one.
        sizes, slots: (C,) samples and clusters of a class, int64.
        waiting: (most slots, n) float64, standard exponential.
    """
    assert module is not None
    first_member, first_cluster = (torch.cat([t.new_zeros(1), t.cumsum(0)]) for t in (sizes, slots))
    centroids = x.new_empty(int(slots.sum()), x.shape[1])
    assignments, squared = torch.empty_like(members), x.new_empty(x.shape[0])
    call(
        module.kmeans,
        matrix(x),
        len(sizes),
        *(t.data_ptr() for t in (members, first_member, first_cluster, waiting)),
        num_iterations,
        *(t.data_ptr() for t in (centroids, assignments, squared)),
    )
    return centroids, assignments, squared
