"""The miners of pytorch-metric-learning; those below run on the kernels, in the calls that `calls` admits."""

from typing import Any

import torch
from pytorch_metric_learning import miners as _theirs
from pytorch_metric_learning.miners import *  # noqa: F403
from torch import Tensor

from ...core.enums import Relation, Similarity
from ...mining.positives import all_positives
from ...mining.sides import Sides
from ...ops.nearest.op import nearest
from . import calls

__all__ = [name for name in dir(_theirs) if not name.startswith("_")]

_OF_SEARCHES = calls.Hooks(
    _theirs.BatchEasyHardMiner,
    "get_positives",
    "get_negatives",
    "get_mine_function",
    "get_max_per_row",
    "get_min_per_row",
    "get_x_per_row",
    "set_stats",
)


class BatchEasyHardMiner(_theirs.BatchEasyHardMiner):
    """Theirs, without a matrix of distances. Ties go to the first sample.

    Source: Xuan et al., Improved embeddings with easy positive triplet mining, 2020; Hermans et al., In defense of the
    triplet loss for person re-identification, 2017, "batch hard".
    """

    def mine(self, embeddings: Any, labels: Any, ref_emb: Any, ref_labels: Any) -> tuple[Tensor, ...]:
        sides = None
        if self._has_a_kernel():
            sides = calls.sides_of(self.distance, embeddings, labels, None, ref_emb, ref_labels)
        if sides is None:
            return super().mine(embeddings, labels, ref_emb, ref_labels)
        measure = Similarity.NEGATIVE_SQUARED_EUCLIDEAN if calls.is_euclidean(self.distance) else Similarity.DOT
        easy, hard, semihard = self.EASY, self.HARD, self.SEMIHARD
        if self.pos_strategy == self.ALL:
            _, negative = _search(sides, measure, Relation.DIFFERENT, self.neg_strategy == hard)
            found = negative >= 0
            anchor = torch.arange(found.shape[0], device=found.device)[found]
            return *all_positives(*sides[2:]), anchor, negative[found]
        if self.pos_strategy == semihard:
            similarity, negative = _search(sides, measure, Relation.DIFFERENT, self.neg_strategy == hard)
            # The least similar of those above the negative, as the most similar of the mirrored ones below it.
            mirrored = sides._replace(x=-sides.x)
            _, positive = _search(mirrored, measure, Relation.SAME, True, -similarity)
        else:
            similarity, positive = _search(sides, measure, Relation.SAME, self.pos_strategy == easy)
            below = similarity if self.neg_strategy == semihard else None
            _, negative = _search(sides, measure, Relation.DIFFERENT, self.neg_strategy != easy, below)
        found = (positive >= 0) & (negative >= 0)
        anchor = torch.arange(found.shape[0], device=found.device)[found]
        return anchor, positive[found], anchor, negative[found]

    def _has_a_kernel(self) -> bool:
        """Whether the kernels make this search; there is none with ranges of distances."""
        if self.allowed_pos_range is not None or self.allowed_neg_range is not None or self.neg_strategy == self.ALL:
            return False
        if self.collect_stats or not _OF_SEARCHES.are_theirs(self):
            return False
        if calls.is_dot_product(self.distance):
            return True
        return calls.is_euclidean(self.distance) and self.pos_strategy != self.SEMIHARD


class BatchHardMiner(_theirs.BatchHardMiner, BatchEasyHardMiner):
    """Theirs, without a matrix of distances. Ties go to the first sample.

    Source: Hermans et al., In defense of the triplet loss for person re-identification, 2017, "batch hard".
    """


def _search(
    sides: Sides, measure: Similarity, relation: Relation, largest: bool, below: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """For each row its most or least similar sample: how similar (B,), and its index (B,), -1 for none."""
    x, y, labels, reference_labels, self_index = sides
    similarity, index = nearest(
        x, y, labels, reference_labels, self_index, below, similarity=measure, relation=relation, largest=largest
    )
    return similarity[:, 0], index[:, 0]
