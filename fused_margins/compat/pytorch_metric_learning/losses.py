"""The losses of pytorch-metric-learning; those below run on the kernels, in the calls that `calls` admits.

Each returns their own dictionary of losses and indices, so that reducers, regularizers and wrappers are theirs.
"""

import math
from typing import Any

import torch
from pytorch_metric_learning import losses as _theirs
from pytorch_metric_learning.losses import *  # noqa: F403
from torch import Tensor, nn

from ...core.enums import Relation, Similarity
from ...core.indices import UNADMITTED
from ...core.reductions import softplus
from ...core.similarity import accumulation_dtype, pair_similarity, similarity_matrix, take_rows
from ...functional import margin_softmax_loss
from ...mining.positives import all_positives
from ...mining.sides import Sides
from ...ops.contrast.op import Contrast, contrast
from . import calls
from .calls import AllPairs, Hooks

__all__ = [name for name in dir(_theirs) if not name.startswith("_")]

LossDict = dict[str, dict[str, Any]]

_OF_MARGINS = (
    "cast_types",
    "get_target_mask",
    "get_cosine",
    "get_angles",
    "modify_cosine_of_target_classes",
    "scale_logits",
    "add_weight_regularization_to_loss_dict",
)
_OF_ARCFACE = Hooks(_theirs.ArcFaceLoss, *_OF_MARGINS)
_OF_COSFACE = Hooks(_theirs.CosFaceLoss, *_OF_MARGINS)
_OF_SOFTMAX = Hooks(_theirs.NormalizedSoftmaxLoss, "cast_types", "get_logits", "add_weight_regularization_to_loss_dict")
_OF_PAIRS = ("_compute_loss", "pair_based_loss", "mat_based_loss", "zero_loss", "zero_losses", "sub_loss_names")
_OF_NTXENT = Hooks(_theirs.NTXentLoss, *_OF_PAIRS)
_OF_SUPCON = Hooks(_theirs.SupConLoss, *_OF_PAIRS)


class ArcFaceLoss(_theirs.ArcFaceLoss):
    """Theirs, with the gradient finite where a cosine is 1 or -1. Left to them: margins outside [0, 180] degrees.

    Source: Deng et al., ArcFace: Additive angular margin loss for deep face recognition, 2019, eq. 3.
    """

    def compute_loss(self, *call: Any) -> LossDict:
        angle = self.margin
        if calls.is_number(angle) and 0 <= angle <= math.pi and _OF_ARCFACE.are_theirs(self):
            ours = _head(self, self.scale, *call, margin=float(angle), margin_type="angular")
            if ours is not None:
                return ours
        return super().compute_loss(*call)


class SubCenterArcFaceLoss(_theirs.SubCenterArcFaceLoss, ArcFaceLoss):
    """Theirs: no kernel takes the largest cosine of a class's centres."""


class CosFaceLoss(_theirs.CosFaceLoss):
    """Theirs.

    Source: Wang et al., CosFace: Large margin cosine loss for deep face recognition, 2018, eq. 4.
    """

    def compute_loss(self, *call: Any) -> LossDict:
        if calls.is_number(self.margin) and _OF_COSFACE.are_theirs(self):
            ours = _head(self, self.scale, *call, margin=float(self.margin))
            if ours is not None:
                return ours
        return super().compute_loss(*call)


class NormalizedSoftmaxLoss(_theirs.NormalizedSoftmaxLoss):
    """Theirs.

    Source: Wang et al., NormFace: L2 hypersphere embedding for face verification, 2017, scaled cosine softmax.
    """

    def compute_loss(self, *call: Any) -> LossDict:
        if calls.is_number(self.temperature, low=0) and _OF_SOFTMAX.are_theirs(self):
            ours = _head(self, 1 / self.temperature, *call)
            if ours is not None:
                return ours
        return super().compute_loss(*call)


def _head(
    loss: Any,
    scale: Any,
    embeddings: Tensor,
    labels: Tensor,
    indices_tuple: Any,
    ref_emb: Any,
    ref_labels: Any,
    **margin: Any,
) -> LossDict | None:
    """A margin softmax over the columns of W, each row weighted by how often it was mined."""
    if loss.collect_stats or not calls.is_cosine(loss.distance) or not _is_plain(loss.cross_entropy):
        return None
    # Their cross entropy refuses labels of other dtypes, but for those that it reads as masks.
    if not (calls.are_matrices(embeddings, ref_emb) and calls.are_labels(labels, embeddings, (torch.int64,))):
        return None
    if ref_emb is not embeddings or ref_labels is not labels or not calls.is_number(scale, low=0):
        return None
    classes = getattr(loss, "num_classes", loss.W.shape[1]) or loss.W.shape[1]  # 0 is their word for unknown
    if type(loss.W) not in (Tensor, nn.Parameter) or loss.W.shape != (embeddings.shape[1], classes):
        return None
    # Theirs casts the parameter to the dtype of any batch; a half one would ruin it.
    half = embeddings.dtype in (torch.float16, torch.bfloat16)
    loss.cast_types(loss.W.dtype if half else embeddings.dtype, embeddings.device)
    weight = loss.W.t().to(embeddings.dtype)
    # Their cross entropy ignores the label -100; where there is a margin it must be there, counted from the last class.
    margin["ignore_index"] = -100 if not margin or classes >= 100 else UNADMITTED
    losses = margin_softmax_loss(embeddings, weight, labels, scale=float(scale), **margin, reduction="none")
    losses = calls.in_their_dtype(losses, embeddings)
    if indices_tuple is not None:
        losses = losses * calls.convert_to_weights(indices_tuple, labels, dtype=embeddings.dtype)
    indices = torch.arange(embeddings.shape[0], device=embeddings.device)
    found: LossDict = {"loss": {"losses": losses, "indices": indices, "reduction_type": "element"}}
    loss.add_weight_regularization_to_loss_dict(found, loss.W.t())
    return found


def _is_plain(cross_entropy: Any) -> bool:
    """Whether the module that ends a head does what the one of its constructor does."""
    known = type(cross_entropy) is nn.CrossEntropyLoss and not calls.is_hooked(cross_entropy)
    plain = known and cross_entropy.weight is None and cross_entropy.label_smoothing == 0
    return plain and cross_entropy.reduction == "none" and cross_entropy.ignore_index == -100


class NTXentLoss(_theirs.NTXentLoss):
    """Theirs, without a matrix of positives times negatives; in float32 without its ceiling of 87.3.

        loss_ip = -log( exp(u_ip / t) / (exp(u_ip / t) + sum_{j: label_j != label_i} exp(u_ij / t)) )

    Source: Chen et al., A simple framework for contrastive learning of visual representations, 2020, eq. 1, with all
    positives of a class and none of them among the negatives.
    """

    def compute_loss(self, embeddings: Any, labels: Any, indices_tuple: Any, *reference: Any) -> LossDict:
        sides = _all_pairs(self, _OF_NTXENT, _theirs.NTXentLoss, embeddings, labels, indices_tuple, *reference)
        if sides is None:
            return super().compute_loss(embeddings, labels, indices_tuple, *reference)
        anchor, positive = all_positives(*sides[2:])
        if not _has_pairs(sides, anchor.shape[0]):
            return self.zero_losses()
        scale = 1 / float(self.temperature)
        negative_lse = _log_sum_exp(sides, scale, Relation.DIFFERENT)
        # Whichever is smaller: both rows of every pair, or the similarities of all.
        if anchor.shape[0] * sides.x.shape[1] <= sides.x.shape[0] * sides.y.shape[0]:
            u = pair_similarity(take_rows(sides.x, anchor), take_rows(sides.y, positive), Similarity.DOT)
        else:
            u = similarity_matrix(sides.x, sides.y, Similarity.DOT)[anchor, positive]
        losses = calls.in_their_dtype(softplus(take_rows(negative_lse, anchor) - u * scale), embeddings)
        return {"loss": {"losses": losses, "indices": (anchor, positive), "reduction_type": "pos_pair"}}


class SupConLoss(_theirs.SupConLoss):
    """Theirs, without a matrix: the mean over a row's positives is a product with their sum.

        loss_i = log sum_{j != i} exp(u_ij / t) - mean_{p != i: label_p = label_i} u_ip / t

    Source: Khosla et al., Supervised contrastive learning, 2020, eq. 2.
    """

    def compute_loss(self, embeddings: Any, labels: Any, indices_tuple: Any, *reference: Any) -> LossDict:
        sides = _all_pairs(self, _OF_SUPCON, _theirs.SupConLoss, embeddings, labels, indices_tuple, *reference)
        if sides is None:
            return super().compute_loss(embeddings, labels, indices_tuple, *reference)
        total, count = _sum_of_positives(sides)
        if not _has_pairs(sides, int(count.sum())):
            return self.zero_losses()
        scale = 1 / float(self.temperature)
        mean = (sides.x.to(total.dtype) * total).sum(1) / count.clamp(min=1)
        if int(count.max()) == 1:  # as with two views of each image: then without loss of small losses to rounding
            losses = softplus(_log_sum_exp(sides, scale, Relation.DIFFERENT) - scale * mean)
        else:
            losses = _log_sum_exp(sides, scale, Relation.ANY) - scale * mean
        losses = torch.where(count > 0, losses, 0.0)
        indices = torch.arange(embeddings.shape[0], device=embeddings.device)
        losses = calls.in_their_dtype(losses, embeddings)
        return {"loss": {"losses": losses, "indices": indices, "reduction_type": "element"}}


def _all_pairs(
    loss: Any, hooks: Hooks, owner: Any, embeddings: Any, labels: Any, pairs: Any, *reference: Any
) -> Sides | None:
    """Both sides of a call of a pair loss that the kernels take."""
    if loss.collect_stats or not calls.is_dot_product(loss.distance) or not hooks.are_theirs(loss):
        return None
    method = owner.mat_based_loss if owner is _theirs.SupConLoss else owner.pair_based_loss
    if getattr(loss.loss_method, "__func__", None) is not method or not calls.is_number(loss.temperature, low=0):
        return None
    return calls.sides_of(loss.distance, embeddings, labels, pairs, *reference)


def _has_pairs(sides: Sides, positives: int) -> bool:
    """Whether theirs takes the pairs for a batch at all: some of both kinds, and not one of each."""
    themselves = 0 if sides.self_index is None else sides.x.shape[0]
    negatives = sides.x.shape[0] * sides.y.shape[0] - positives - themselves
    return min(positives, negatives) > 0 and max(positives, negatives) > 1


def _log_sum_exp(sides: Sides, scale: float, relation: Relation) -> Tensor:
    """(B,) over the columns that the relation admits; any target will do."""
    x, y, labels, reference_labels, self_index = sides
    target = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    call = Contrast(x, y, target, labels, reference_labels, self_index, scale)
    call = call._replace(similarity=Similarity.DOT, relation=relation)
    return contrast.run(call, "auto", valid=False)[1]


def _sum_of_positives(sides: Sides) -> tuple[Tensor, Tensor]:
    """For each row the sum (B, D) of its positives, and their number (B,)."""
    classes, group, sizes = torch.unique(sides.reference_labels.long(), return_inverse=True, return_counts=True)
    y = sides.y.to(accumulation_dtype(sides.y.dtype))
    sums = y.new_zeros(classes.shape[0], y.shape[1]).index_add(0, group, y)
    if sides.labels is sides.reference_labels:  # each row is its own reference
        return take_rows(sums, group) - y, sizes[group] - 1
    labels = sides.labels.long().contiguous()
    own = torch.searchsorted(classes, labels).clamp(max=classes.shape[0] - 1)
    total, count = take_rows(sums, own), torch.where(classes[own] == labels, sizes[own], 0)
    if sides.self_index is not None:
        total, count = total - take_rows(y, sides.self_index), count - 1
    return total, count


class CrossBatchMemory(_theirs.CrossBatchMemory):
    """Theirs, which hands NTXentLoss and SupConLoss its pairs as a self index unless they are to be mined.

    Source: Wang et al., Cross-batch memory for embedding learning, 2020.
    """

    def create_indices_tuple(
        self, embeddings: Tensor, labels: Tensor, E_mem: Tensor, L_mem: Tensor, mined: Any, leave_out_self: bool
    ) -> Any:
        # Of one row, theirs takes the row in the memory for another one.
        ours = type(self.loss) in (NTXentLoss, SupConLoss) and not self.miner and mined is None and len(labels) > 1
        if not ours:
            return super().create_indices_tuple(embeddings, labels, E_mem, L_mem, mined, leave_out_self)
        return AllPairs(labels, L_mem, self.curr_batch_idx if leave_out_self else None)
