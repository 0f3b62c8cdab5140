"""The losses as modules, one file a family."""

from .cross_batch_memory import CrossBatchMemory
from .easy_positive import EasyPositiveTripletLoss
from .easy_positive_infonce import EasyPositiveInfoNCELoss
from .easy_positive_margin import EasyPositiveMarginLoss
from .face import AdaFaceLoss, ElasticFaceLoss, MagFaceLoss, SphereFaceLoss
from .magnet import MagnetLoss
from .margin_softmax import (
    ArcFaceLoss,
    CosFaceLoss,
    MarginSoftmaxLoss,
    NegativeMarginLoss,
    NegativeSoftmaxLoss,
    NormalizedSoftmaxLoss,
)
from .pairs import MultiSimilarityLoss, NTXentLoss, SupConLoss
from .parameters import parameter_groups as parameter_groups
from .proxies import ProxyAnchorLoss, ProxyNCALoss
from .several_centers import SoftTripleLoss, SubCenterArcFaceLoss

__all__ = [
    "AdaFaceLoss",
    "ArcFaceLoss",
    "CosFaceLoss",
    "CrossBatchMemory",
    "EasyPositiveInfoNCELoss",
    "EasyPositiveMarginLoss",
    "EasyPositiveTripletLoss",
    "ElasticFaceLoss",
    "MagFaceLoss",
    "MagnetLoss",
    "MarginSoftmaxLoss",
    "MultiSimilarityLoss",
    "NTXentLoss",
    "NegativeMarginLoss",
    "NegativeSoftmaxLoss",
    "NormalizedSoftmaxLoss",
    "ProxyAnchorLoss",
    "ProxyNCALoss",
    "SoftTripleLoss",
    "SphereFaceLoss",
    "SubCenterArcFaceLoss",
    "SupConLoss",
]
