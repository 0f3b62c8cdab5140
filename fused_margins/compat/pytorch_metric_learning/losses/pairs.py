"""Losses of positive and negative pairs: of all pairs of a batch by its labels, or of those that a miner lists."""

from typing import Any

import torch
from pytorch_metric_learning import losses as _theirs
from torch import Tensor

from ....core.enums import Relation
from ....core.reductions import softplus
from ....core.similarity import take_rows
from .. import calls
from ..calls import Hooks, LossDict, OnKernels
from ..terms import ByDistance, terms_of

_OF_PAIRS = ("_compute_loss", "pair_based_loss", "mat_based_loss", "zero_loss", "zero_losses", "sub_loss_names")


class NTXentLoss(OnKernels, _theirs.NTXentLoss):
    """Theirs, without a matrix of positives times negatives; in float32 without its ceiling of 87.3.

        loss_ip = -log( exp(u_ip / t) / (exp(u_ip / t) + sum_{j: label_j != label_i} exp(u_ij / t)) )

    Source: Chen et al., A simple framework for contrastive learning of visual representations, 2020, eq. 1, with all
    positives of a class and none of them among the negatives.
    """

    _hooks, _method = Hooks(_theirs.NTXentLoss, *_OF_PAIRS), _theirs.NTXentLoss.pair_based_loss

    def _why_not(self, *call: Any) -> str | None:
        return _why_not_pairs(self, *call) or calls.why_not_number("temperature", self.temperature, low=0)

    def _fused(self, embeddings: Tensor, *call: Any) -> LossDict:
        terms = terms_of(self.distance, embeddings, *call)
        anchor, positive = terms.positives
        positives, negatives = terms.numbers(anchor.shape[0])
        if min(positives, negatives) == 0 or max(positives, negatives) == 1:  # one of each is none to them
            return self.zero_losses()
        scale = 1 / float(self.temperature)
        negative_lse = terms.log_sum_exp(Relation.DIFFERENT, scale)
        losses = softplus(take_rows(negative_lse, anchor) - terms.of_positives() * scale)
        losses = calls.in_their_dtype(losses, embeddings)
        return {"loss": {"losses": losses, "indices": (anchor, positive), "reduction_type": "pos_pair"}}


class SupConLoss(OnKernels, _theirs.SupConLoss):
    """Theirs, without a matrix: the mean over a row's positives is a product with their sum.

        loss_i = log sum_{j != i} exp(u_ij / t) - mean_{p != i: label_p = label_i} u_ip / t

    Source: Khosla et al., Supervised contrastive learning, 2020, eq. 2.
    """

    _hooks, _method = Hooks(_theirs.SupConLoss, *_OF_PAIRS), _theirs.SupConLoss.mat_based_loss

    def _why_not(self, *call: Any) -> str | None:
        return _why_not_pairs(self, *call) or calls.why_not_number("temperature", self.temperature, low=0)

    def _fused(self, embeddings: Tensor, *call: Any) -> LossDict | None:
        found = terms_of(self.distance, embeddings, *call)
        positives, negatives = found.numbers()
        if min(positives, negatives) == 0 or max(positives, negatives) == 1:
            return self.zero_losses()
        if (terms := found.once()) is None:
            return None
        scale = 1 / float(self.temperature)
        mean, (fewest, most) = terms.mean_of_positives(scale), map(int, torch.aminmax(terms.count))
        if most == 1:  # as with two views of each image: then without loss of small losses to rounding
            losses = softplus(terms.log_sum_exp(Relation.DIFFERENT, scale) - mean)
        else:
            losses = terms.log_sum_exp(Relation.ANY, scale) - mean
        return calls.of_elements(losses if fewest else torch.where(terms.count > 0, losses, 0.0), embeddings)


class MultiSimilarityLoss(OnKernels, _theirs.MultiSimilarityLoss):
    """Theirs.

        loss_i = log(1 + sum_p exp(-alpha (u_ip - base))) / alpha + log(1 + sum_n exp(beta (u_in - base))) / beta

    Source: Wang et al., Multi-similarity loss with general pair weighting for deep metric learning, 2019, eq. 15.
    """

    _hooks, _method = Hooks(_theirs.MultiSimilarityLoss, *_OF_PAIRS), _theirs.MultiSimilarityLoss.mat_based_loss

    def _why_not(self, *call: Any) -> str | None:
        reason = _why_not_pairs(self, *call) or calls.why_not_number("alpha", self.alpha, low=0)
        reason = reason or calls.why_not_number("beta", self.beta, low=0)
        return reason or calls.why_not_number("base", self.base)

    def _fused(self, embeddings: Tensor, *call: Any) -> LossDict | None:
        found = terms_of(self.distance, embeddings, *call)
        if found.is_one_of_each():
            return self.zero_losses()
        if (terms := found.once()) is None:
            return None
        alpha, beta, base = float(self.alpha), float(self.beta), float(self.base)
        of_positives = softplus(terms.log_sum_exp(Relation.SAME, -alpha) + alpha * base) / alpha
        of_negatives = softplus(terms.log_sum_exp(Relation.DIFFERENT, beta) - beta * base) / beta
        return calls.of_elements((of_positives + of_negatives)[:, None], embeddings)  # (B, 1), as theirs


class GeneralizedLiftedStructureLoss(OnKernels, _theirs.GeneralizedLiftedStructureLoss):
    """Theirs. By Euclidean distance a part of the matrix at a time; listed pairs of it are left to them.

        loss_i = relu( log sum_p exp(d_ip - pos_margin) + log sum_n exp(neg_margin - d_in) ),   d = -u of products

    Source: Hermans et al., In defense of the triplet loss for person re-identification, 2017, eq. 9.
    """

    _hooks = Hooks(_theirs.GeneralizedLiftedStructureLoss, *_OF_PAIRS)
    _method = _theirs.GeneralizedLiftedStructureLoss.mat_based_loss

    def _why_not(self, embeddings: Any, labels: Any, pairs: Any, ref_emb: Any, ref_labels: Any) -> str | None:
        reason = calls.why_not_number("pos_margin", self.pos_margin)
        reason = reason or calls.why_not_number("neg_margin", self.neg_margin)
        of_distances = type(self.distance) is calls.distances.LpDistance and calls.is_by_label(pairs)
        distance = calls.why_not_euclidean(self.distance, (1,)) if of_distances else None
        call = embeddings, labels, pairs, ref_emb, ref_labels
        return reason or distance or _why_not_pairs(self, *call, product=not of_distances)

    def _fused(self, embeddings: Tensor, labels: Any, pairs: Any, ref_emb: Tensor, ref_labels: Any) -> LossDict | None:
        call = embeddings, labels, pairs, ref_emb, ref_labels
        if self.distance.is_inverted:
            found, sign = terms_of(self.distance, *call), -1
        else:
            found, sign = ByDistance(self.distance, calls.sides_of(self.distance, *call)), 1
        if found.is_one_of_each():
            return self.zero_losses()
        if (terms := found.once()) is None:
            return None
        of_kinds = [
            terms.log_sum_exp(Relation.SAME, -1.0) - sign * float(self.pos_margin),
            terms.log_sum_exp(Relation.DIFFERENT, 1.0) + sign * float(self.neg_margin),
        ]
        of_positives, of_negatives = (torch.where(lse == -torch.inf, 0.0, lse) for lse in of_kinds)
        return calls.of_elements(torch.relu(of_positives + of_negatives)[:, None], embeddings)  # (B, 1), as theirs


def _why_not_pairs(
    loss: Any, embeddings: Any, labels: Any, pairs: Any, ref_emb: Any, ref_labels: Any, product: bool = True
) -> str | None:
    """Of a call of a pair loss, of products unless its distance is asked about elsewhere."""
    # NTXentLoss of theirs takes each positive by each negative, which is more than any matrix of pairs.
    listed = not calls.is_by_label(pairs)
    if listed and not isinstance(loss, NTXentLoss) and (reason := calls.why_not_gathered(pairs, embeddings, ref_emb)):
        return reason
    if loss.collect_stats:
        return "the loss collects statistics"
    if reason := (calls.why_not_dot_product(loss.distance) if product else None) or loss._hooks.why_not(loss):
        return reason
    if getattr(loss.loss_method, "__func__", None) is not loss._method.__func__:
        return "its loss_method is another one"
    if listed:
        return calls.why_not_tuple(pairs, embeddings, ref_emb)
    return calls.why_not_by_label(embeddings, labels, ref_emb, ref_labels)
