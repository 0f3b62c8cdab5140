"""Losses of triplets: of those that a miner lists, or of all of a batch as sums over sorted distances.

Of all triplets (i, p, n), with d the B x N matrix that the distance gives, a sum of hinges is linear in it:

    sum_{p, n} relu(d_ip - d_in + m) = sum_p k_p (d_ip + m) - sum_n c_n d_in
    k_p = #{n: d_in < d_ip + m}      c_n = #{p: d_ip + m > d_in}

and the numbers come from a sort of each row: O(B N log N) and never B x N x N.
"""

import math
from typing import Any

import torch
from pytorch_metric_learning import losses as _theirs
from pytorch_metric_learning import reducers
from torch import Tensor

from ....core.similarity import accumulation_dtype
from .. import calls
from ..calls import AllPairs, Hooks, LossDict, OnKernels
from ..terms import as_triplets, distances_at, matrix_of

_OF_TRIPLETS = ("zero_loss", "zero_losses", "sub_loss_names")


class TripletMarginLoss(OnKernels, _theirs.TripletMarginLoss):
    """Theirs, of all triplets without listing them, and with `swap` right where references are given.

    Left to them: all triplets of a batch by itself with `swap`, all triplets with `smooth_loss`, random triplets.

        loss_ipn = relu(d_ip - d_in + margin)

    Source: Schroff et al., FaceNet: A unified embedding for face recognition and clustering, 2015, eq. 3.
    """

    _hooks = Hooks(_theirs.TripletMarginLoss, *_OF_TRIPLETS)

    def _why_not(self, embeddings: Any, labels: Any, pairs: Any, ref_emb: Any, ref_labels: Any) -> str | None:
        if not calls.is_by_label(pairs):
            reason = why_not_listed(self, embeddings, pairs, ref_emb, self.swap and ref_emb is not embeddings)
            return reason or self._why_not_plain()
        reason = self._why_not_plain() or why_not_all_triplets(self, embeddings, labels, pairs, ref_emb, ref_labels)
        if self.swap and ref_emb is not embeddings:
            return reason or why_not_listable(self)
        if reason is None and self.swap:
            reason = "with swap, distances of positives from negatives count"
        if reason is None and self.smooth_loss:
            reason = "smooth_loss is no sum of hinges"
        reducer = reducer_of(self, "loss")
        if type(reducer) is reducers.DivisorReducer:
            return reason or "the loss gives DivisorReducer no divisor"
        return reason or why_not_reduced(reducer)

    def _why_not_plain(self) -> str | None:
        return self._hooks.why_not(self) or calls.why_not_number("margin", self.margin)

    def _fused(self, embeddings: Tensor, labels: Any, pairs: Any, ref_emb: Tensor, ref_labels: Any) -> LossDict | None:
        if self.swap and calls.is_by_label(pairs):
            pairs = tuple(AllPairs(labels, ref_labels, calls.self_index_of(pairs, labels, ref_labels)))
        if not calls.is_by_label(pairs):
            return self._of_listed(embeddings, as_triplets(pairs), ref_emb)
        positive, negative = masks_of(labels, pairs, ref_labels)
        triplets = int((positive.sum(1) * negative.sum(1)).sum())
        if triplets == 0:
            return self.zero_losses()
        mat = matrix_of(self.distance, embeddings, ref_emb)
        sign = -1 if self.distance.is_inverted else 1
        weight, count = _hinges(sign * mat.detach(), positive, negative, float(self.margin))
        total = _sum(weight * mat) * sign + float(self.margin) * count
        if not math.isfinite(total.item()):
            return None
        reduced = reduce_triplets(reducer_of(self, "loss"), total, count, triplets, None)
        return {"loss": _reduced(reduced, embeddings)}

    def _of_listed(self, embeddings: Tensor, triplets: tuple[Tensor, ...], ref_emb: Tensor) -> LossDict:
        anchor, positive, negative = triplets
        if not anchor.shape[0]:
            return self.zero_losses()
        d_ap, d_an = distances_at(self.distance, embeddings, ref_emb, (anchor, positive), (anchor, negative))
        if self.swap:  # theirs takes rows of anchors for those of positives, which in a batch by itself are the same
            (d_pn,) = distances_at(self.distance, ref_emb, ref_emb, (positive, negative))
            d_an = self.distance.smallest_dist(d_an, d_pn)
        violation = self.distance.margin(d_ap, d_an) + self.margin
        hinge = torch.nn.functional.softplus if self.smooth_loss else torch.relu
        losses = calls.in_their_dtype(hinge(violation), embeddings)
        return {"loss": {"losses": losses, "indices": triplets, "reduction_type": "triplet"}}


class MarginLoss(OnKernels, _theirs.MarginLoss):
    """Theirs, of all triplets without listing them: each is a hinge of its positive and one of its negative.

        loss_ipn = relu(d_ip - beta_i + margin) + relu(beta_i - d_in + margin)

    Source: Wu et al., Sampling matters in deep embedding learning, 2017, eq. 5.
    """

    _hooks = Hooks(_theirs.MarginLoss, *_OF_TRIPLETS, "compute_reg_loss")

    def _why_not(self, embeddings: Any, labels: Any, pairs: Any, ref_emb: Any, ref_labels: Any) -> str | None:
        if not calls.is_by_label(pairs):
            return why_not_listed(self, embeddings, pairs, ref_emb) or self._why_not_plain()
        reason = self._why_not_plain() or why_not_all_triplets(self, embeddings, labels, pairs, ref_emb, ref_labels)
        for name in ("margin_loss", "beta_reg_loss"):
            reason = reason or why_not_reduced(reducer_of(self, name))
        return reason

    def _why_not_plain(self) -> str | None:
        reason = self._hooks.why_not(self) or calls.why_not_number("margin", self.margin)
        return reason or calls.why_not_number("nu", self.nu)

    def _fused(self, embeddings: Tensor, labels: Any, pairs: Any, ref_emb: Tensor, ref_labels: Any) -> LossDict | None:
        if not calls.is_by_label(pairs):
            return self._of_listed(embeddings, labels, as_triplets(pairs), ref_emb)
        positive, negative = masks_of(labels, pairs, ref_labels)
        positives, negatives = positive.sum(1), negative.sum(1)
        triplets = positives * negatives  # of each row
        number = int(triplets.sum())
        if number == 0:
            return self.zero_losses()
        mat = matrix_of(self.distance, embeddings, ref_emb)
        beta = self._beta_of(labels, embeddings)
        beyond = mat - (beta if len(self.beta) == 1 else beta[:, None])
        margin = float(self.margin)
        with torch.no_grad():
            reach = -beyond if self.distance.is_inverted else beyond
            violating, intruding = positive & (reach + margin > 0), negative & (margin - reach > 0)
            each = violating.sum(1), intruding.sum(1)
            divisor = int((negatives * each[0] + positives * each[1]).sum())
            weight = violating * negatives[:, None] - intruding * positives[:, None]
        total = _sum(weight * beyond) * (-1 if self.distance.is_inverted else 1) + margin * divisor
        if not math.isfinite(total.item()):
            return None
        above_zero = number - int(((positives - each[0]) * (negatives - each[1])).sum())
        reduced = reduce_triplets(reducer_of(self, "margin_loss"), total, above_zero, number, divisor)
        found = {"margin_loss": _reduced(reduced, embeddings)}
        if not self.learn_beta or len(self.beta) == 1:
            found["beta_reg_loss"] = self.compute_reg_loss(beta, None, divisor)
        else:
            losses = beta * self.nu
            above_zero = int(triplets[losses.detach() > 0].sum())
            reducer = reducer_of(self, "beta_reg_loss")
            kept = losses.clamp(min=0) if type(reducer) is reducers.AvgNonZeroReducer else losses
            reduced = reduce_triplets(reducer, (kept * triplets).sum(), above_zero, number, divisor)
            found["beta_reg_loss"] = _reduced(reduced, embeddings)
        return found

    def _beta_of(self, labels: Any, embeddings: Tensor) -> Tensor:
        """(1,), or one for each label."""
        beta = self.beta if len(self.beta) == 1 else self.beta[labels]
        autocast = torch.is_autocast_enabled(embeddings.device.type)
        return beta.to(embeddings.device, None if autocast else embeddings.dtype)

    def _of_listed(self, embeddings: Tensor, labels: Any, triplets: tuple[Tensor, ...], ref_emb: Tensor) -> LossDict:
        anchor, positive, negative = triplets
        if not anchor.shape[0]:
            return self.zero_losses()
        beta = self._beta_of(None if len(self.beta) == 1 else labels[anchor], embeddings)
        d_ap, d_an = distances_at(self.distance, embeddings, ref_emb, (anchor, positive), (anchor, negative))
        of_positives = torch.relu(self.distance.margin(d_ap, beta) + self.margin)
        of_negatives = torch.relu(self.distance.margin(beta, d_an) + self.margin)
        divisor = (of_positives > 0).sum() + (of_negatives > 0).sum()
        losses = calls.in_their_dtype(of_positives + of_negatives, embeddings)
        part = {"losses": losses, "indices": triplets, "reduction_type": "triplet", "divisor": divisor}
        return {"margin_loss": part, "beta_reg_loss": self.compute_reg_loss(beta, anchor, divisor)}


def why_not_listed(loss: Any, embeddings: Any, indices: Any, ref_emb: Any, swap: bool = False) -> str | None:
    """Of a call of triplets that a miner listed."""
    reason = None if swap else calls.why_not_gathered(indices, embeddings, ref_emb)
    if reason is None and loss.collect_stats:
        reason = "the loss collects statistics"
    return reason or why_not_listable(loss) or calls.why_not_tuple(indices, embeddings, ref_emb)


def why_not_listable(loss: Any) -> str | None:
    """Whether single entries of a distance's matrix can be had."""
    if loss.distance.is_inverted:
        return calls.why_not_dot_product(loss.distance)
    return calls.why_not_euclidean(loss.distance)


def why_not_all_triplets(
    loss: Any, embeddings: Any, labels: Any, pairs: Any, ref_emb: Any, ref_labels: Any
) -> str | None:
    """Of a call of all triplets; any distance will do whose `margin` is a difference."""
    if loss.collect_stats:
        return "the loss collects statistics"
    if loss.triplets_per_anchor != "all" and pairs is None:
        return "triplets are drawn at random"
    reason = _OF_DISTANCES.why_not(loss.distance)
    return reason or calls.why_not_by_label(embeddings, labels, ref_emb, ref_labels)


_OF_DISTANCES = Hooks(calls.distances.BaseDistance, "margin")


def why_not_reduced(reducer: Any) -> str | None:
    """Whether a reducer makes of all triplets what their sum and number say."""
    kinds = reducers.AvgNonZeroReducer, reducers.MeanReducer, reducers.SumReducer, reducers.DivisorReducer
    if type(reducer) in kinds and not reducer.collect_stats and not calls.is_hooked(reducer):
        return None
    return f"{type(reducer).__name__} takes triplets one by one"


def reducer_of(loss: Any, name: str) -> Any:
    """What reduces the part of a loss that has this name."""
    reducer = loss.reducer
    if type(reducer) is reducers.MultipleReducers:
        named = reducer.reducers
        reducer = named[name] if name in named else reducer.default_reducer  # noqa: SIM401  # no dict, and without get
    return reducer


def reduce_triplets(reducer: Any, total: Tensor, above_zero: int, number: int, divisor: int | None) -> Any:
    """What a reducer makes of losses with this total; 0 for what it takes for no loss."""
    kind = type(reducer)
    if kind is reducers.SumReducer:
        return total
    by = {reducers.MeanReducer: number, reducers.AvgNonZeroReducer: above_zero, reducers.DivisorReducer: divisor}[kind]
    return total / by if by else 0


def _reduced(value: Any, embeddings: Tensor) -> dict[str, Any]:
    if isinstance(value, Tensor):
        value = calls.in_their_dtype(value.to(accumulation_dtype(embeddings.dtype)), embeddings)
    return {"losses": value, "indices": None, "reduction_type": "already_reduced"}


def masks_of(labels: Tensor, pairs: Any, ref_labels: Tensor) -> tuple[Tensor, Tensor]:
    """(B, N) bool each: the positives of each row and its negatives."""
    same = labels[:, None] == ref_labels
    negative = ~same
    itself = calls.self_index_of(pairs, labels, ref_labels)
    if itself is not None:
        same.scatter_(1, itself[:, None], False)
    return same, negative


def _sum(terms: Tensor) -> Tensor:
    """Of many terms of either sign, in float64 where there is one."""
    dtype = torch.float64 if terms.device.type != "mps" else accumulation_dtype(terms.dtype)
    return terms.sum(dtype=dtype)


def _hinges(d: Tensor, positive: Tensor, negative: Tensor, margin: float) -> tuple[Tensor, int]:
    """k at positives and -c at negatives (B, N), and the number of triplets above zero."""
    d = d.to(accumulation_dtype(d.dtype))
    reach = torch.where(positive, _reach(d, margin), -torch.inf)
    near = torch.where(negative, d, torch.inf)
    k = torch.searchsorted(near.sort(1).values, reach)
    c = d.shape[1] - torch.searchsorted(reach.sort(1).values, near, right=True)
    return (k - c).to(d.dtype), int(k.sum())


def _reach(d: Tensor, margin: float) -> Tensor:
    """The least number not below d + margin. What it exceeds, the exact sum exceeds, as do most of their hinges."""
    if d.dtype != torch.float32 or d.device.type == "mps":
        return d + margin
    exact = d.double() + torch.tensor(margin, dtype=d.dtype).item()
    rounded = exact.to(d.dtype)
    return torch.where(rounded < exact, torch.nextafter(rounded, rounded.new_tensor(torch.inf)), rounded)
