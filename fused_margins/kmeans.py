"""An import path that users have: see `fused_margins.clustering.kmeans`."""

from .clustering.kmeans import kmeans_per_class, sum_by

__all__ = ["kmeans_per_class", "sum_by"]
