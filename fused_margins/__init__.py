"""Fused margin softmax, nearest-positive mining and magnet losses for PyTorch.

Everything is one of three reductions of a labelled similarity matrix; see `fused_margins.ops`. The losses are modules
here and functions in `fused_margins.functional`.
"""

import warnings as _warnings
from importlib.metadata import version as _version

from . import clusters as clusters  # import paths that users have
from . import functional, losses
from . import kmeans as kmeans
from . import margins as margins
from .backends import cpu as _cpu
from .backends.budget import memory_budget, set_exponential_budget, set_memory_budget
from .backends.registry import explain
from .clustering import MagnetBatch, MagnetIndex, kmeans_per_class
from .core.indices import checked
from .losses import *  # noqa: F403
from .losses import parameter_groups
from .mining import ClassBalancedBatches

__version__ = _version("fused-margins")

__all__ = [
    *losses.__all__,
    "ClassBalancedBatches",
    "MagnetBatch",
    "MagnetIndex",
    "checked",
    "explain",
    "functional",
    "kmeans_per_class",
    "losses",
    "memory_budget",
    "parameter_groups",
    "set_exponential_budget",
    "set_memory_budget",
]

if _cpu.module is None and _cpu.missing and "FUSED_MARGINS_BUILD=none" not in _cpu.missing:
    _warnings.warn(
        f"fused-margins runs on its PyTorch reference, without the C++ kernels: {_cpu.missing}. "
        "Install what is missing and reinstall fused-margins.",
        RuntimeWarning,
        stacklevel=2,
    )
