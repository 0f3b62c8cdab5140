"""The losses of pytorch-metric-learning; those below run on the kernels, in the calls that `calls` admits.

Each returns their own dictionary of losses and indices, so that reducers, regularizers and wrappers are theirs.
"""

# ruff: noqa: F401
from pytorch_metric_learning import losses as _theirs
from pytorch_metric_learning.losses import *  # noqa: F403

from .heads import (
    ArcFaceLoss,
    CosFaceLoss,
    LargeMarginSoftmaxLoss,
    NormalizedSoftmaxLoss,
    SoftTripleLoss,
    SphereFaceLoss,
    SubCenterArcFaceLoss,
)
from .memory import CrossBatchMemory
from .pairs import GeneralizedLiftedStructureLoss, MultiSimilarityLoss, NTXentLoss, SupConLoss
from .proxies import NCALoss, ProxyAnchorLoss, ProxyNCALoss
from .triplets import MarginLoss, TripletMarginLoss

__all__ = [name for name in dir(_theirs) if not name.startswith("_")]
