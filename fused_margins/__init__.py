"""Fused margin softmax, nearest-positive mining and magnet losses for PyTorch.

Everything is one of three reductions of a labelled similarity matrix; see `fused_margins.ops`. The losses are modules
here and functions in `fused_margins.functional`.
"""

import warnings as _warnings
from importlib.metadata import version as _version

from . import functional, losses
from .clusters import MagnetBatch, MagnetIndex
from .kmeans import kmeans_per_class
from .losses import *  # noqa: F403
from .ops import native as _native
from .ops.labels import checked
from .ops.registry import explain, memory_budget, set_memory_budget

__version__ = _version("fused-margins")

__all__ = [
    *losses.__all__,
    "MagnetBatch",
    "MagnetIndex",
    "checked",
    "explain",
    "functional",
    "kmeans_per_class",
    "losses",
    "memory_budget",
    "set_memory_budget",
]

if _native.module is None and _native.missing and "FUSED_MARGINS_BUILD=none" not in _native.missing:
    _warnings.warn(
        f"fused-margins runs on its PyTorch reference, without the C++ kernels: {_native.missing}. "
        "Install what is missing and reinstall fused-margins.",
        RuntimeWarning,
        stacklevel=2,
    )
