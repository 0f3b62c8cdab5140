"""The losses of sentence-transformers; those below run on the kernels.

Each overrides the one method that makes a loss of embeddings, so that a subclass that overrides it runs its own;
what the kernels cannot read goes to theirs, errors included.
"""

import math
from numbers import Real
from typing import Any

import torch
from sentence_transformers.sentence_transformer import losses as _theirs
from sentence_transformers.sentence_transformer.losses import *  # noqa: F403
from sentence_transformers.util import all_gather_with_grad, cos_sim, get_rank
from torch import Tensor

from ...core.reductions import softplus
from ...ops.contrast.epilogues import Epilogue
from ...ops.contrast.op import Contrast, contrast
from .. import calls
from . import triplets

__all__ = list(_theirs.__all__)

_Distances = _theirs.BatchHardTripletLossDistanceFunction


class MultipleNegativesRankingLoss(_theirs.MultipleNegativesRankingLoss):
    """Theirs, without a matrix of similarities.

    With the query q_i, its document d_i, and each direction's other candidates as negatives,

        loss_i = log(k + sum over the negatives of exp(scale (u_negative - u_i))),   u_i = cos(q_i, d_i)

    k is 1, and 2 where a joint softmax has "doc_to_query", in which the pair occurs once more. A softmax for each
    direction is the mean of their losses.

    Source: van den Oord et al., Representation learning with contrastive predictive coding, 2018, eq. 4; the four
    directions of Li et al., Towards general text embeddings with multi-stage contrastive learning, 2023, section 3.3.
    """

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Any) -> Tensor:
        if not self._has_a_kernel(embeddings):
            return super().compute_loss_from_embeddings(embeddings, labels)
        queries, *documents = embeddings
        rows, begin = queries.shape[0], 0
        if self.gather_across_devices:
            begin = get_rank() * rows
            queries, *documents = [all_gather_with_grad(t) for t in embeddings]
        own = torch.arange(begin, begin + rows, device=queries.device)
        here = slice(begin, begin + rows)
        # Which query a column belongs to.
        of_queries = torch.arange(queries.shape[0], device=queries.device)
        of_documents = of_queries.repeat(len(documents))
        from_query = Contrast(queries[here], torch.cat(documents), own, scale=float(self.scale))
        from_document = Contrast(documents[0][here], queries, own, scale=float(self.scale))
        if self.partition_mode == "per_direction" or self.directions == ("query_to_doc",):
            calls = [from_query, from_document] if "doc_to_query" in self.directions else [from_query]
            total = sum(contrast.run(a._replace(epilogue=Epilogue.INFO_NCE), "auto", valid=False) for a in calls)
            return total / len(calls)

        if "query_to_query" in self.directions:
            from_query = from_query._replace(y=torch.cat([*documents, queries]), self_index=own + len(of_documents))
        positive, negative_lse = contrast.run(from_query, "auto", valid=False)
        sides = [(queries, of_queries)] if "doc_to_query" in self.directions else []
        sides += [(t, of_queries) for t in documents] if "doc_to_doc" in self.directions else []
        if sides:
            y, column_labels = (torch.cat(t) for t in zip(*sides))
            from_document = from_document._replace(y=y, row_labels=own, column_labels=column_labels)
            negative_lse = torch.logaddexp(negative_lse, contrast.run(from_document, "auto", valid=False)[1])
        log_k = math.log(2) if "doc_to_query" in self.directions else 0.0
        return (log_k + softplus(negative_lse - positive * self.scale - log_k)).mean()

    def _has_a_kernel(self, embeddings: Any) -> bool:
        if self.similarity_fct is not cos_sim or (self.hardness_mode is not None and self.hardness_strength > 0):
            return False
        if not isinstance(self.scale, Real) or not 0 < float(self.scale) < math.inf:
            return False
        if not isinstance(embeddings, list | tuple) or len(embeddings) < 2 or calls.why_not_matrices(*embeddings):
            return False
        return len({t.shape for t in embeddings}) == 1 and embeddings[0].shape[0] > 1  # a lone pair has no negatives


class BatchHardTripletLoss(_theirs.BatchHardTripletLoss):
    """Theirs, without a matrix of distances: each anchor's farthest positive and nearest negative.

        loss_i = max(0, d(i, farthest positive) - d(i, nearest negative) + margin)

    An anchor without a positive has 0 for its distance, and one without a negative that of its positive.

    Source: Hermans et al., In defense of the triplet loss for person re-identification, 2017, eq. 5.
    """

    def batch_hard_triplet_loss(self, labels: Any, embeddings: Any) -> Tensor:
        batch = _batch(self, labels, embeddings)
        if batch is None:
            return super().batch_hard_triplet_loss(labels, embeddings)
        positive, negative = triplets.hardest(batch)
        return (positive - negative + self.triplet_margin).relu().mean() + batch.zero()


class BatchHardSoftMarginTripletLoss(_theirs.BatchHardSoftMarginTripletLoss, BatchHardTripletLoss):
    """Theirs, as `BatchHardTripletLoss` with log(1 + exp(d - d')) for the hinge."""

    def batch_hard_triplet_soft_margin_loss(self, labels: Any, embeddings: Any) -> Tensor:
        batch = _batch(self, labels, embeddings)
        if batch is None:
            return super().batch_hard_triplet_soft_margin_loss(labels, embeddings)
        positive, negative = triplets.hardest(batch)
        return softplus(positive - negative).mean() + batch.zero()


class BatchSemiHardTripletLoss(_theirs.BatchSemiHardTripletLoss):
    """Theirs, with one matrix of distances, or beyond the memory budget with the rows of the pairs if these are less.

        loss_ap = max(0, d_ap - d_an + margin)

    n is the nearest negative that is farther than the positive, without one the farthest negative.

    Source: Schroff et al., FaceNet: A unified embedding for face recognition and clustering, 2015, section 3.2.
    """

    def batch_semi_hard_triplet_loss(self, labels: Any, embeddings: Any) -> Tensor:
        batch = _batch(self, labels, embeddings)
        if batch is None:
            return super().batch_semi_hard_triplet_loss(labels, embeddings)
        total, count = triplets.semi_hard(batch, float(self.margin))
        return total / max(count, 1) + batch.zero()


class BatchAllTripletLoss(_theirs.BatchAllTripletLoss):
    """Theirs, with one matrix of distances instead of one row of it for every pair of a class.

        loss = sum over the triplets of max(0, d_ap - d_an + margin), over the number of those above 0

    Source: Hermans et al., In defense of the triplet loss for person re-identification, 2017, eq. 6, over the triplets
    above 0.
    """

    def batch_all_triplet_loss(self, labels: Any, embeddings: Any) -> Tensor:
        batch = _batch(self, labels, embeddings)
        if batch is None:
            return super().batch_all_triplet_loss(labels, embeddings)
        total, count = triplets.all_triplets(batch, float(self.triplet_margin))
        return total / (count + 1e-16) + batch.zero()


def _batch(loss: Any, labels: Any, embeddings: Any) -> triplets.Batch | None:
    """What the triplets are made of, where the kernels can read it."""
    cosine = loss.distance_metric is _Distances.cosine_distance
    if not cosine and loss.distance_metric is not _Distances.euclidean_distance:
        return None
    margin = getattr(loss, "margin", getattr(loss, "triplet_margin", 0.0))
    if not isinstance(margin, Real) or not math.isfinite(margin) or calls.why_not_matrices(embeddings):
        return None
    if calls.why_not_labels(labels, embeddings) or labels.numel() != embeddings.shape[0]:
        return None
    if calls.why_not_admitted(labels):
        return None
    if embeddings.device.type == "mps":  # which has no float64 for sums of hinges
        return None
    return triplets.Batch(embeddings, labels.reshape(-1), cosine)
