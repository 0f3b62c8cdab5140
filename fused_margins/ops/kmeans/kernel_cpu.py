"""`kmeans` on a CPU: in C++, a class a thread (csrc/kmeans/cpu.cpp), while classes fit a cache; else in passes."""

from typing import Any

import torch
from torch import Tensor

from ...backends.cpu import call, int64, module
from ...backends.registry import Problem
from ...core.similarity import accumulation_dtype
from .op import KMeans
from .reference import check_values, in_passes

# A class is read twice an iteration, by one thread: beyond a core's cache, many threads on all samples are faster.
CLASS_BYTES = 4 << 20


def _is_cached(largest_class: int, width: int, dtype: torch.dtype) -> bool:
    wide_enough = dtype in (torch.float32, torch.float64)
    return wide_enough and largest_class * width * dtype.itemsize <= CLASS_BYTES


def describe(problem: Problem) -> str:
    """Which of the two."""
    cached = _is_cached(problem.arguments.largest_class, problem.width, problem.dtype)
    return "every class in one call" if cached else "all classes in passes: a class does not fit into a core's cache"


def forward(a: KMeans, plan: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Centroids (K, D), assignments (n,), squared distances (n,) from the own centroid."""
    if not _is_cached(a.largest_class, a.x.shape[1], a.x.dtype):
        return in_passes(a, "cpu")
    check_values(a)
    first_member, first_cluster = (torch.cat([t.new_zeros(1), t.cumsum(0)]) for t in (int64(a.sizes), int64(a.slots)))
    dtype = accumulation_dtype(a.x.dtype)
    centroids = torch.empty(a.num_clusters, a.x.shape[1], dtype=dtype)
    assignments, squared = torch.empty(a.x.shape[0], dtype=torch.int64), torch.empty(a.x.shape[0], dtype=dtype)
    members, waiting = int64(a.members), a.waiting.contiguous()
    inputs = a.x, len(a.sizes), members, first_member, first_cluster, waiting, a.num_iterations
    call(module.kmeans, *inputs, centroids, assignments, squared)
    return centroids, assignments, squared
