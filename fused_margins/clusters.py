"""An import path that users have: see `fused_margins.clustering.magnet_index`."""

from .clustering.magnet_index import MagnetBatch, MagnetIndex

__all__ = ["MagnetBatch", "MagnetIndex"]
