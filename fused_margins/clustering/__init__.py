"""Clusters of a whole training set: k-means within classes, and the index that makes magnet batches."""

from .kmeans import kmeans_per_class
from .magnet_index import MagnetBatch, MagnetIndex

__all__ = ["MagnetBatch", "MagnetIndex", "kmeans_per_class"]
