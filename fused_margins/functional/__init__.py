"""The losses and miners as functions. Each is a few lines over what one of the ops returns."""

from ..core.class_counts import bias_from_counts, margin_from_counts
from ..mining.negatives import mine_negatives
from ..mining.positives import mine_positives
from .clusters import cluster_distances, magnet_loss
from .margin_softmax import margin_logits, margin_softmax_loss

__all__ = [
    "bias_from_counts",
    "cluster_distances",
    "magnet_loss",
    "margin_from_counts",
    "margin_logits",
    "margin_softmax_loss",
    "mine_negatives",
    "mine_positives",
]
