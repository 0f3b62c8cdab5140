"""The losses as modules, one file a family."""

from .cross_batch_memory import CrossBatchMemory
from .easy_positive import EasyPositiveTripletLoss
from .easy_positive_infonce import EasyPositiveInfoNCELoss
from .easy_positive_margin import EasyPositiveMarginLoss
from .magnet import MagnetLoss
from .margin_softmax import (
    ArcFaceLoss,
    CosFaceLoss,
    MarginSoftmaxLoss,
    NegativeMarginLoss,
    NegativeSoftmaxLoss,
    NormalizedSoftmaxLoss,
)
from .several_centers import SoftTripleLoss, SubCenterArcFaceLoss

__all__ = [
    "ArcFaceLoss",
    "CosFaceLoss",
    "CrossBatchMemory",
    "EasyPositiveInfoNCELoss",
    "EasyPositiveMarginLoss",
    "EasyPositiveTripletLoss",
    "MagnetLoss",
    "MarginSoftmaxLoss",
    "NegativeMarginLoss",
    "NegativeSoftmaxLoss",
    "NormalizedSoftmaxLoss",
    "SoftTripleLoss",
    "SubCenterArcFaceLoss",
]
