"""Positives and negatives for anchors: a file for each of the two, with every way to choose them."""

from .negatives import NEGATIVES, distance_weighted_negatives, mine_negatives, random_negatives
from .positives import POSITIVES, all_positives, mine_positives, random_positives

__all__ = [
    "NEGATIVES",
    "POSITIVES",
    "all_positives",
    "distance_weighted_negatives",
    "mine_negatives",
    "mine_positives",
    "random_negatives",
    "random_positives",
]
