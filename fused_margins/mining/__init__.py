"""Positives and negatives for anchors: a file for each of the two, with every way to choose them; and batches."""

from .batches import ClassBalancedBatches, Lacking, batch_lacks
from .negatives import NEGATIVES, distance_weighted_negatives, mine_negatives, random_negatives
from .positives import POSITIVES, all_positives, mine_positives, random_positives

__all__ = [
    "NEGATIVES",
    "POSITIVES",
    "ClassBalancedBatches",
    "Lacking",
    "all_positives",
    "batch_lacks",
    "distance_weighted_negatives",
    "mine_negatives",
    "mine_positives",
    "random_negatives",
    "random_positives",
]
