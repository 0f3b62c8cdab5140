"""Losses of a softmax over neighbours or proxies: NCA and those with a vector that stands for a class."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from pytorch_metric_learning import losses as _theirs
from torch import Tensor

from ....core import checks
from ....core.enums import Relation, Similarity
from ....core.reductions import softplus
from ....core.similarity import accumulation_dtype
from ....functional import margin_softmax_loss
from ....mining.sides import Sides
from .. import calls
from ..calls import AllPairs, Hooks, LossDict, OnKernels
from ..rows import both_rows
from ..terms import ByLabel
from .heads import weight_for, why_not_parameter


class NCALoss(OnKernels, _theirs.NCALoss):
    """Theirs, with rows whose probability underflows, and without a matrix.

        loss_i = -log( sum_{p != i: label_p = label_i} exp(-scale d_ip^2) / sum_{j != i} exp(-scale d_ij^2) )

    Source: Goldberger et al., Neighbourhood components analysis, 2004, eq. 1, with a logarithm for each row.
    """

    _hooks = Hooks(_theirs.NCALoss, "nca_computation", "zero_loss", "zero_losses", "sub_loss_names")

    def _why_not(self, embeddings: Any, labels: Any, _: Any, ref_emb: Any, ref_labels: Any) -> str | None:
        reason = _why_not_neighbours(self) or calls.why_not_by_label(embeddings, labels, ref_emb, ref_labels)
        return "the batch has one row" if reason is None and len(embeddings) == 1 else reason

    def _fused(self, embeddings: Tensor, labels: Tensor, pairs: Any, ref_emb: Any, ref_labels: Any) -> LossDict:
        x, y = both_rows(self.distance, embeddings, ref_emb)
        itself = torch.arange(x.shape[0], device=x.device) if y is x else None
        terms = ByLabel(Sides(x, y, labels, ref_labels, itself), _measure(self.distance))
        scale = float(self.softmax_scale)
        with _as_precise(self.distance, x):
            positive_lse = terms.log_sum_exp(Relation.SAME, scale)
            losses = softplus(terms.log_sum_exp(Relation.DIFFERENT, scale) - positive_lse)
        # A memory hands over all pairs but the row's own one: as many for every row, which weighs all alike.
        if pairs is not None and not isinstance(pairs, AllPairs):
            options = {"dtype": embeddings.dtype, "using_ref": ref_emb is not embeddings}
            losses = losses * calls.convert_to_weights(pairs, labels, **options)
        (found,) = torch.where(positive_lse != -torch.inf)
        return calls.of_elements(losses[found], embeddings, found)


class ProxyNCALoss(_theirs.ProxyNCALoss, NCALoss):
    """Theirs, with rows whose probability underflows: a softmax over proxies.

    Source: Movshovitz-Attias et al., No fuss distance metric learning using proxies, 2017, with the own proxy in the
    denominator.
    """

    _hooks = Hooks(_theirs.ProxyNCALoss, "nca_computation", "cast_types", "add_weight_regularization_to_loss_dict")

    def compute_loss(self, *call: Any) -> LossDict:
        return self._ours_or(super().compute_loss, *call)

    def _why_not(self, embeddings: Any, labels: Any, _: Any, ref_emb: Any, ref_labels: Any) -> str | None:
        reason = _why_not_neighbours(self)
        reason = reason or calls.why_not_own_batch(embeddings, labels, ref_emb, ref_labels, checks.INTEGER)
        reason = reason or why_not_parameter(self.proxies, len(self.proxy_labels), embeddings, axis=1)
        if reason is None and not torch.equal(self.proxy_labels, torch.arange(len(self.proxy_labels))):
            return "its proxy_labels are other ones"
        return reason or calls.why_not_classes(labels, self.proxies.shape[0])

    def _fused(self, embeddings: Tensor, labels: Tensor, indices_tuple: Any, *_: Any) -> LossDict:
        x, proxies = both_rows(self.distance, embeddings, weight_for(self, "proxies", embeddings))
        similarity = _measure(self.distance).name.lower()
        scale = float(self.softmax_scale)
        with _as_precise(self.distance, x):
            losses = margin_softmax_loss(x, proxies, labels, scale=scale, similarity=similarity, reduction="none")
        if indices_tuple is not None:
            weights = calls.convert_to_weights(indices_tuple, labels, dtype=embeddings.dtype, using_ref=True)
            losses = losses * weights
        found = calls.of_elements(losses, embeddings)
        self.add_weight_regularization_to_loss_dict(found, self.proxies)
        return found


class ProxyAnchorLoss(OnKernels, _theirs.ProxyAnchorLoss):
    """Theirs: each proxy is an anchor, and the batch its references.

        pos_loss_c = log(1 + sum_{i: label_i = c} exp(alpha (margin - u_ic)))
        neg_loss_c = log(1 + sum_{i: label_i != c} exp(alpha (u_ic + margin)))

    Source: Kim et al., Proxy anchor loss for deep metric learning, 2020, eq. 4.
    """

    _hooks = Hooks(_theirs.ProxyAnchorLoss, "cast_types", "get_logits", "add_weight_regularization_to_loss_dict")

    def _why_not(self, embeddings: Any, labels: Any, _: Any, ref_emb: Any, ref_labels: Any) -> str | None:
        if self.collect_stats:
            return "the loss collects statistics"
        reason = self._hooks.why_not(self) or calls.why_not_dot_product(self.distance)
        reason = reason or calls.why_not_number("alpha", self.alpha, low=0)
        reason = reason or calls.why_not_number("margin", self.margin)
        reason = reason or calls.why_not_own_batch(embeddings, labels, ref_emb, ref_labels)
        reason = reason or why_not_parameter(self.proxies, self.num_classes, embeddings, axis=1)
        return reason or calls.why_not_classes(labels, self.proxies.shape[0])

    def _fused(self, embeddings: Tensor, labels: Tensor, indices_tuple: Any, *_: Any) -> LossDict:
        x, proxies, measure = embeddings, weight_for(self, "proxies", embeddings), Similarity.COSINE
        classes, alpha, margin = proxies.shape[0], float(self.alpha), float(self.margin)
        if calls.why_not_cosine(self.distance):
            x, proxies = both_rows(self.distance, x, proxies)
            measure = Similarity.DOT
        of_class = torch.arange(classes, device=x.device)
        bias = None
        if indices_tuple is not None:
            bias = calls.convert_to_weights(indices_tuple, labels, dtype=embeddings.dtype) - 1
            bias = bias.to(accumulation_dtype(x.dtype))
        terms = ByLabel(Sides(proxies, x, of_class, labels, None), measure, bias)
        positive_lse = terms.log_sum_exp(Relation.SAME, -alpha)
        negative_lse = terms.log_sum_exp(Relation.DIFFERENT, alpha)
        of_both = {
            "pos_loss": (positive_lse, int((torch.bincount(labels, minlength=classes) > 0).sum())),
            "neg_loss": (negative_lse, classes),
        }
        found: LossDict = {}
        for name, (lse, divisor) in of_both.items():
            losses = calls.in_their_dtype(softplus(lse + alpha * margin), embeddings)
            part = {"losses": losses, "indices": of_class, "reduction_type": "element", "divisor": divisor}
            found[name] = part
        self.add_weight_regularization_to_loss_dict(found, self.proxies)
        return found


def _why_not_neighbours(loss: Any) -> str | None:
    """Whether a softmax over neighbours is one that the kernels make."""
    if loss.collect_stats:
        return "the loss collects statistics"
    reason = loss._hooks.why_not(loss) or calls.why_not_squared_or_product(loss.distance)
    return reason or calls.why_not_number("softmax_scale", loss.softmax_scale, low=0)


def _as_precise(distance: Any, x: Tensor) -> AbstractContextManager[None]:
    """Autocast rounds the rows of products; distances it leaves in their dtype."""
    if distance.is_inverted:
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def _measure(distance: Any) -> Similarity:
    return Similarity.DOT if distance.is_inverted else Similarity.NEGATIVE_SQUARED_EUCLIDEAN
