"""Losses over the columns of a weight W (D, C): a softmax of classes, with a margin on the own one."""

import math
from typing import Any

import torch
from pytorch_metric_learning import losses as _theirs
from pytorch_metric_learning.utils import common_functions
from torch import Tensor, nn
from torch.nn import functional as F

from ....backends.budget import memory_budget
from ....core.enums import Similarity
from ....core.indices import UNADMITTED
from ....core.reductions import log_odds, softplus
from ....core.similarity import accumulation_dtype, pair_similarity, take_rows
from ....functional import margin_softmax_loss
from ....ops.contrast.op import Contrast, contrast
from .. import calls
from ..calls import Hooks, LossDict, OnKernels

HALF = (torch.float16, torch.bfloat16)
_OF_MARGINS = (
    "cast_types",
    "get_target_mask",
    "get_cosine",
    "get_angles",
    "modify_cosine_of_target_classes",
    "scale_logits",
    "add_weight_regularization_to_loss_dict",
)


class LargeMarginSoftmaxLoss(OnKernels, _theirs.LargeMarginSoftmaxLoss):
    """Theirs: logits |x_i| |w_j| cos(theta_ij), products of rows, with cos(m theta) and its continuation for the own.

    Source: Liu et al., Large-margin softmax loss for convolutional neural networks, 2016, eq. 4 to 6.
    """

    _hooks = Hooks(_theirs.LargeMarginSoftmaxLoss, *_OF_MARGINS, "get_cos_with_margin")

    def _why_not(self, *call: Any) -> str | None:
        return self._hooks.why_not(self) or self._why_not_margin() or _why_not_head(self, "scale", self.scale, *call)

    def _why_not_margin(self) -> str | None:
        return None if type(self.margin) is int and self.margin > 0 else f"the margin is {self.margin}"

    def _fused(self, embeddings: Tensor, labels: Tensor, indices_tuple: Any, *_: Any) -> LossDict:
        columns, lengths = self._columns(weight_for(self, "W", embeddings).t())
        ignored = _ignored(columns.shape[0])
        call = Contrast(embeddings, columns, labels, scale=float(self.scale), ignore_index=ignored)
        product, negative_lse = contrast.run(call._replace(similarity=Similarity.DOT), "auto", valid=False)
        size = embeddings.to(product.dtype).norm(dim=1)
        if lengths is not None:
            size = size * take_rows(lengths, labels)
        cosine = product / size.clamp(min=1e-12)
        with torch.autocast(embeddings.device.type, enabled=False):
            z = self.scale * size * _multiplied(cosine, self.margin)
        losses = softplus(log_odds(negative_lse, z))
        if ignored != UNADMITTED:
            losses = torch.where(labels == ignored, 0.0, losses)
        return _of_head(self, losses, self.W, embeddings, labels, indices_tuple)

    def _columns(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """The rows (C, D) of which a logit is a product, and their lengths (C,), None for 1."""
        return weight, weight.to(accumulation_dtype(weight.dtype)).norm(dim=1)


class SphereFaceLoss(_theirs.SphereFaceLoss, LargeMarginSoftmaxLoss):
    """Theirs: as LargeMarginSoftmaxLoss, of columns of length 1.

    Source: Liu et al., SphereFace: Deep hypersphere embedding for face recognition, 2017, eq. 7.
    """

    _hooks = Hooks(_theirs.SphereFaceLoss, *_OF_MARGINS, "get_cos_with_margin")

    def _columns(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        return F.normalize(weight.to(accumulation_dtype(weight.dtype)), dim=1).to(weight.dtype), None


class ArcFaceLoss(_theirs.ArcFaceLoss, LargeMarginSoftmaxLoss):
    """Theirs, with the gradient finite where a cosine is 1 or -1. Left to them: margins outside [0, 180] degrees.

    Source: Deng et al., ArcFace: Additive angular margin loss for deep face recognition, 2019, eq. 3.
    """

    _hooks = Hooks(_theirs.ArcFaceLoss, *_OF_MARGINS)

    def _why_not_margin(self) -> str | None:
        reason = calls.why_not_number("margin", self.margin)
        if reason is None and not 0 <= self.margin <= math.pi:
            reason = f"the margin is {math.degrees(self.margin):g} degrees"
        return reason

    def _fused(self, embeddings: Tensor, labels: Tensor, indices_tuple: Any, *_: Any) -> LossDict:
        margin = {"margin": float(self.margin), "margin_type": "angular"}
        return _margin_softmax(self, self.scale, embeddings, labels, indices_tuple, **margin)


class SubCenterArcFaceLoss(_theirs.SubCenterArcFaceLoss, ArcFaceLoss):
    """Theirs: ArcFace with the largest cosine of a class's centers.

    Source: Deng et al., Sub-center ArcFace: Boosting face recognition by large-scale noisy web faces, 2020, eq. 3.
    """

    _hooks = Hooks(_theirs.SubCenterArcFaceLoss, *_OF_MARGINS)

    def _why_not(self, *call: Any) -> str | None:
        if type(self.sub_centers) is not int or self.sub_centers < 1:
            return "sub_centers is no number of centers"
        return super()._why_not(*call)

    def get_outliers(
        self, embeddings: Tensor, labels: Tensor, threshold: float = 75, return_dominant_centers: bool = True
    ) -> Any:
        """Samples farther than `threshold` degrees from their class's dominant center, the one most are nearest to.

        Their indices (n,), by class; or with `return_dominant_centers` these and the centers (D, C), 0 for a class
        without samples. Where it is off, theirs returns both all the same.
        """
        call = embeddings, labels, None, embeddings, labels
        common_functions.check_shapes(embeddings, labels)
        if self._why_not(*call) or calls.why_not_classes(labels, self.num_classes):
            found = super().get_outliers(embeddings, labels, threshold)
            return found if return_dominant_centers else found[0]
        with torch.no_grad():
            centers = weight_for(self, "W", embeddings).t()  # (C K, D)
            in_classes = centers.unflatten(0, (self.num_classes, self.sub_centers))
            own = [take_rows(in_classes[:, k], labels) for k in range(self.sub_centers)]
            cosines = torch.stack([pair_similarity(embeddings, w, Similarity.COSINE) for w in own], dim=1)  # (B, K)
            votes = torch.zeros_like(in_classes[..., 0], dtype=torch.int64)
            votes.index_put_((labels, cosines.argmax(1)), torch.ones_like(labels), accumulate=True)
            dominant = votes.argmax(1)  # (C,)
            far = cosines.gather(1, dominant[labels][:, None])[:, 0] < math.cos(math.radians(threshold))
            (outliers,) = torch.where(far)
            outliers = outliers[torch.argsort(labels[outliers], stable=True)]
            if not return_dominant_centers:
                return outliers
            chosen = take_rows(
                centers, torch.arange(self.num_classes, device=labels.device) * self.sub_centers + dominant
            )
            return outliers, torch.where(votes.any(1)[:, None], chosen, 0.0).t()


class CosFaceLoss(_theirs.CosFaceLoss, LargeMarginSoftmaxLoss):
    """Theirs.

    Source: Wang et al., CosFace: Large margin cosine loss for deep face recognition, 2018, eq. 4.
    """

    _hooks = Hooks(_theirs.CosFaceLoss, *_OF_MARGINS)

    def _why_not_margin(self) -> str | None:
        return calls.why_not_number("margin", self.margin)

    def _fused(self, embeddings: Tensor, labels: Tensor, indices_tuple: Any, *_: Any) -> LossDict:
        return _margin_softmax(self, self.scale, embeddings, labels, indices_tuple, margin=float(self.margin))


class NormalizedSoftmaxLoss(OnKernels, _theirs.NormalizedSoftmaxLoss):
    """Theirs.

    Source: Wang et al., NormFace: L2 hypersphere embedding for face verification, 2017, scaled cosine softmax.
    """

    _hooks = Hooks(_theirs.NormalizedSoftmaxLoss, "cast_types", "get_logits", "add_weight_regularization_to_loss_dict")

    def _why_not(self, *call: Any) -> str | None:
        return self._hooks.why_not(self) or _why_not_head(self, "temperature", self.temperature, *call)

    def _fused(self, embeddings: Tensor, labels: Tensor, indices_tuple: Any, *_: Any) -> LossDict:
        return _margin_softmax(self, 1 / self.temperature, embeddings, labels, indices_tuple)


class SoftTripleLoss(OnKernels, _theirs.SoftTripleLoss):
    """Theirs: of a class with several centers their mean counts, weighted by how near they are.

    A part of the classes at a time; left to them where the matrix of all fits the memory budget, unless a batch of half
    precision would ruin the parameter.

    Source: Qian et al., SoftTriple loss: Deep metric learning without triplet sampling, 2019, eq. 7 and 8.
    """

    _hooks = Hooks(_theirs.SoftTripleLoss, "cast_types", "get_logits", "add_weight_regularization_to_loss_dict")

    def _why_not(self, *call: Any) -> str | None:
        if reason := self._fits(*call):
            return reason
        reason = self._hooks.why_not(self) or calls.why_not_number("gamma", self.gamma, low=0)
        reason = reason or calls.why_not_number("margin", self.margin)
        if reason is None and (type(self.centers_per_class) is not int or self.centers_per_class < 1):
            reason = "centers_per_class is no number of centers"
        return reason or _why_not_softmax(self, "la", self.la, self.fc, self.centers_per_class, *call)

    def _fits(self, embeddings: Any, *_: Any) -> str | None:
        if type(embeddings) is not Tensor or embeddings.dim() != 2 or embeddings.dtype in HALF:
            return None
        matrix_bytes = embeddings.shape[0] * self.fc.shape[-1] * embeddings.element_size()
        return None if matrix_bytes > memory_budget() else "the matrix of similarities fits the memory budget"

    def _fused(self, embeddings: Tensor, labels: Tensor, indices_tuple: Any, *_: Any) -> LossDict:
        centers = weight_for(self, "fc", embeddings).t().unflatten(0, (-1, self.centers_per_class))  # (C, K, D)
        scale, margin, ignored = float(self.la), float(self.margin), _ignored(centers.shape[0])
        temperature = 1 / float(self.gamma)  # gamma is what its constructor takes, inverted
        if self.centers_per_class == 1:
            centers, temperature = centers[:, 0], 0.0
        losses = margin_softmax_loss(
            embeddings, centers, labels, scale=scale, margin=margin, center_temperature=temperature,
            ignore_index=ignored, reduction="none",
        )  # fmt: skip
        return _of_head(self, losses, self.fc, embeddings, labels, indices_tuple)


def _multiplied(u: Tensor, multiplier: int) -> Tensor:
    """(-1)^k cos(m theta) - 2 k of cosines (n,), with m theta within [k pi, (k + 1) pi]: it falls all the way to pi."""
    with torch.no_grad():
        k = (u.clamp(-1, 1).acos() * (multiplier / math.pi)).floor()
        sign = 1 - 2 * (k % 2)
    return sign * _chebyshev(u, multiplier) - 2 * k


def _chebyshev(u: Tensor, m: int) -> Tensor:
    """T_m(u) = cos(m arccos u) by T_{i + j} = 2 T_i T_j - T_{i - j}: a polynomial, whose derivative is finite at 1."""
    if m == 1:
        return u
    less = u if m % 2 else torch.ones_like(u)
    return torch.addcmul(-less, _chebyshev(u, m // 2), _chebyshev(u, m - m // 2), value=2)


def _why_not_head(
    loss: Any, name: str, scale: Any, embeddings: Any, labels: Any, _: Any, ref_emb: Any, ref_labels: Any
) -> str | None:
    """Of a call of a head whose logits `scale` multiplies or divides."""
    reason = _why_not_plain(loss.cross_entropy)
    centers = getattr(loss, "sub_centers", 1)
    return reason or _why_not_softmax(loss, name, scale, loss.W, centers, embeddings, labels, _, ref_emb, ref_labels)


def _why_not_softmax(
    loss: Any, name: str, scale: Any, weight: Any, centers: int,
    embeddings: Any, labels: Any, _: Any, ref_emb: Any, ref_labels: Any,
) -> str | None:  # fmt: skip
    """Of a softmax over classes of so many centers each, the columns of a weight, whose logits `scale` multiplies."""
    if loss.collect_stats:
        return "the loss collects statistics"
    reason = calls.why_not_cosine(loss.distance)
    # Their cross entropy refuses labels of other dtypes than int64, but for those that it reads as masks.
    reason = reason or calls.why_not_own_batch(embeddings, labels, ref_emb, ref_labels)
    reason = reason or calls.why_not_number(name, scale, low=0)
    classes = (getattr(loss, "num_classes", None) or 0) * centers
    return reason or why_not_parameter(weight, classes, embeddings, axis=0)


def why_not_parameter(parameter: Any, classes: int | None, embeddings: Tensor, axis: int) -> str | None:
    """Whether a parameter has the width of the embeddings on this axis and the classes, if known, on the other."""
    known = type(parameter) in (Tensor, nn.Parameter) and parameter.dim() == 2
    if known and parameter.shape[axis] == embeddings.shape[1]:
        columns = parameter.shape[1 - axis]
        if (classes or columns) == columns:  # 0 is their word for unknown
            return None
    return "the parameter is no matrix of classes and the embeddings' width"


def _why_not_plain(cross_entropy: Any) -> str | None:
    """Whether the module that ends a head does what the one of its constructor does."""
    known = type(cross_entropy) is nn.CrossEntropyLoss and not calls.is_hooked(cross_entropy)
    plain = known and cross_entropy.weight is None and cross_entropy.label_smoothing == 0
    plain = plain and cross_entropy.reduction == "none" and cross_entropy.ignore_index == -100
    return None if plain else "its cross_entropy is another one"


def weight_for(loss: Any, name: str, embeddings: Tensor) -> Tensor:
    """A parameter in the dtype of the embeddings, to which theirs casts it for good; a half batch would ruin it."""
    half = embeddings.dtype in HALF
    loss.cast_types(getattr(loss, name).dtype if half else embeddings.dtype, embeddings.device)
    return getattr(loss, name).to(embeddings.dtype)


def _ignored(classes: int) -> int:
    """Their cross entropy ignores the label -100; where there is a margin it must be there, from the last class."""
    return -100 if classes >= 100 else UNADMITTED


def _margin_softmax(
    loss: Any, scale: Any, embeddings: Tensor, labels: Tensor, indices_tuple: Any, **margin: Any
) -> LossDict:
    weight = weight_for(loss, "W", embeddings).t()
    if hasattr(loss, "sub_centers"):
        weight = weight.unflatten(0, (-1, loss.sub_centers))  # (C, K, D)
    margin["ignore_index"] = _ignored(weight.shape[0]) if margin else -100
    losses = margin_softmax_loss(embeddings, weight, labels, scale=float(scale), **margin, reduction="none")
    return _of_head(loss, losses, loss.W, embeddings, labels, indices_tuple)


def _of_head(
    loss: Any, losses: Tensor, weight: Tensor, embeddings: Tensor, labels: Tensor, indices_tuple: Any
) -> LossDict:
    """Their dictionary, each row weighted by how often it was mined, with the regularizer's part."""
    found = calls.of_elements(losses, embeddings)
    if indices_tuple is not None:
        weights = calls.convert_to_weights(indices_tuple, labels, dtype=embeddings.dtype)
        found["loss"]["losses"] = found["loss"]["losses"] * weights
    loss.add_weight_regularization_to_loss_dict(found, weight.t())
    return found
