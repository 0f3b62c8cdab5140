"""The losses as modules, one file a family."""

from .margin_softmax import (
    ArcFaceLoss,
    CosFaceLoss,
    MarginSoftmaxLoss,
    NegativeMarginLoss,
    NegativeSoftmaxLoss,
    NormalizedSoftmaxLoss,
)

__all__ = [
    "ArcFaceLoss",
    "CosFaceLoss",
    "MarginSoftmaxLoss",
    "NegativeMarginLoss",
    "NegativeSoftmaxLoss",
    "NormalizedSoftmaxLoss",
]
