"""An import path that users have: see `fused_margins.core.margins`."""

from .core.margins import apply_margin

__all__ = ["apply_margin"]
