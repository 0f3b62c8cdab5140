"""An import path that users have: see `fused_margins.losses.cross_batch_memory`."""

from .cross_batch_memory import CrossBatchMemory

__all__ = ["CrossBatchMemory"]
