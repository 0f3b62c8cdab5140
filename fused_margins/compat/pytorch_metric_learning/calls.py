"""Which calls the kernels can take. All others are left to pytorch-metric-learning's own code, errors included.

What is asked here answers with None, or with the reason why not, as `explain` gives it to a user.
"""

import functools
import math
from collections.abc import Iterator
from numbers import Real
from typing import Any

import torch
from pytorch_metric_learning import distances
from pytorch_metric_learning.losses import BaseMetricLossFunction
from pytorch_metric_learning.utils.loss_and_miner_utils import convert_to_weights as convert_to_weights
from pytorch_metric_learning.utils.loss_and_miner_utils import get_all_pairs_indices
from torch import Tensor, nn

from ...mining.sides import Sides
from ..calls import is_hooked as is_hooked
from ..calls import why_not_admitted, why_not_labels, why_not_matrices
from .rows import both_rows

LossDict = dict[str, dict[str, Any]]


class OnKernels(BaseMetricLossFunction):
    """A loss that is ours where there is no reason against it, and theirs elsewhere. It stands before their class.

    `_why_not` is asked for the reason; `_fused` gives their dictionary of losses and indices, or None where only the
    data show that a call is theirs.
    """

    def compute_loss(self, *call: Any) -> LossDict:
        return self._ours_or(super().compute_loss, *call)

    def _ours_or(
        self, theirs: Any, embeddings: Any, labels: Any, indices_tuple: Any, ref_emb: Any, ref_labels: Any
    ) -> LossDict:
        if self._why_not(embeddings, labels, indices_tuple, ref_emb, ref_labels) is None:
            found = self._fused(embeddings, labels, indices_tuple, ref_emb, ref_labels)
            if found is not None:
                return found
        if isinstance(indices_tuple, AllPairs):
            indices_tuple = tuple(indices_tuple)
        return theirs(embeddings, labels, indices_tuple, ref_emb, ref_labels)

    def _why_not(self, *call: Any) -> str | None:
        raise NotImplementedError

    def _fused(self, *call: Any) -> LossDict | None:
        raise NotImplementedError


class Hooks:
    """Methods that a user's subclass may replace, as they are in pytorch-metric-learning."""

    def __init__(self, owner: type, *names: str) -> None:
        self.methods = {name: getattr(owner, name) for name in names}

    def why_not(self, module: nn.Module) -> str | None:
        """Whether somebody has replaced one of them: in a subclass, in the class itself or in this module."""
        own = module.__dict__
        for name, method in self.methods.items():
            if getattr(type(module), name) is not method or name in own:
                return f"its {name} is another than that of pytorch-metric-learning"
        return None


_OF_A_DISTANCE = ("forward", "compute_mat", "maybe_normalize", "normalize", "margin", "get_norm")
_OF_DOT_PRODUCTS = Hooks(distances.DotProductSimilarity, *_OF_A_DISTANCE)
_OF_EUCLIDEAN_DISTANCES = Hooks(distances.LpDistance, *_OF_A_DISTANCE)


def _why_not_plain(distance: Any, hooks: Hooks) -> str | None:
    if reason := hooks.why_not(distance):
        return f"of the distance, {reason}"
    if is_hooked(distance):
        return "the distance has hooks"
    return "the distance collects statistics" if distance.collect_stats else None


def why_not_known(distance: Any) -> str | None:
    """Whether a distance does what its class in pytorch-metric-learning does to two batches, and nothing beside."""
    if type(distance) is distances.LpDistance:
        return _why_not_plain(distance, _OF_EUCLIDEAN_DISTANCES)
    if type(distance) in (distances.CosineSimilarity, distances.DotProductSimilarity):
        return _why_not_plain(distance, _OF_DOT_PRODUCTS)
    return f"the distance is {type(distance).__name__}"


def why_not_dot_product(distance: Any) -> str | None:
    """Whether a distance is the product of rows as its `maybe_normalize` gives them, and nothing else."""
    if type(distance) is distances.LpDistance:
        return "the distance is LpDistance"
    if reason := why_not_known(distance):
        return reason
    if distance.power != 1 or not distance.is_inverted:
        return f"the distance has power {distance.power}"
    return None


def why_not_cosine(distance: Any) -> str | None:
    """Whether a distance is the cosine."""
    if reason := why_not_dot_product(distance):
        return reason
    return None if distance.normalize_embeddings and distance.p == 2 else "the distance is no cosine"


def why_not_euclidean(distance: Any, powers: tuple[int, ...] = (1, 2)) -> str | None:
    """Whether a distance is the Euclidean one, or its square, of rows as its `maybe_normalize` gives them."""
    if type(distance) is not distances.LpDistance:
        return f"the distance is {type(distance).__name__}"
    if distance.p != 2 or distance.power not in powers or distance.is_inverted:
        return f"the distance has p {distance.p} and power {distance.power}"
    return why_not_known(distance)


def why_not_squared_or_product(distance: Any) -> str | None:
    """Whether an entry of the distance's matrix is a similarity of the kernels, or one's negative."""
    if type(distance) is distances.LpDistance:
        return why_not_euclidean(distance, (2,))
    return why_not_dot_product(distance)


def why_not_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> str | None:
    """Whether a parameter of a loss is a number that is above low, below high, and no tensor that learns."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return f"{name} is no number"
    return None if low < float(value) < high else f"{name} is {value}"


def why_not_own_batch(
    embeddings: Any, labels: Any, ref_emb: Any, ref_labels: Any, dtypes: tuple[torch.dtype, ...] = (torch.int64,)
) -> str | None:
    """Whether a batch is by itself, as a loss with parameters has it, with labels that index them."""
    if ref_emb is not embeddings or ref_labels is not labels:
        return "ref_emb is not supported"
    return why_not_matrices(embeddings, embeddings) or why_not_labels(labels, embeddings, dtypes)


def why_not_classes(labels: Tensor, classes: int) -> str | None:
    """Whether labels name classes."""
    least, most = torch.aminmax(labels)
    return None if int(least) >= 0 and int(most) < classes else f"a label is not within [0, {classes})"


def why_not_by_label(embeddings: Any, labels: Any, ref_emb: Any, ref_labels: Any) -> str | None:
    """Whether the kernels can tell positives from negatives by two vectors of labels."""
    reason = why_not_matrices(embeddings, ref_emb) or why_not_labels(labels, embeddings)
    reason = reason or why_not_labels(ref_labels, ref_emb)
    return reason or why_not_admitted(ref_labels)


def why_not_gathered(indices: Any, embeddings: Any, ref_emb: Any) -> str | None:
    """Whether the rows of the pairs that a miner listed are fewer numbers than their matrix of all pairs."""
    known = isinstance(indices, tuple) and len(indices) in (3, 4) and all(type(t) is Tensor for t in indices)
    if known and type(embeddings) is Tensor and type(ref_emb) is Tensor and embeddings.dim() == ref_emb.dim() == 2:
        pairs = indices[0].numel() + indices[2].numel()
        if pairs * embeddings.shape[1] >= embeddings.shape[0] * ref_emb.shape[0]:
            return "the matrix of all pairs is smaller than the rows of those listed"
    return None


def why_not_tuple(indices: Any, embeddings: Any, ref_emb: Any) -> str | None:
    """Whether what a miner found are vectors of indices, three or four, within the rows of both sides."""
    if reason := why_not_matrices(embeddings, ref_emb):
        return reason
    if not isinstance(indices, tuple | list) or len(indices) not in (3, 4):
        return "the indices_tuple is no tuple of three or four"
    if not all(type(t) is Tensor and t.dtype == torch.int64 and t.dim() == 1 for t in indices):
        return "the indices_tuple has other than vectors of int64"
    halves = (indices[:2], indices[2:]) if len(indices) == 4 else (indices,)
    if any(t.shape != half[0].shape or t.device != embeddings.device for half in halves for t in half):
        return "the vectors of the indices_tuple differ in length or device"
    anchors = torch.cat(indices[::2]) if len(indices) == 4 else indices[0]
    others = torch.cat(indices[1::2] if len(indices) == 4 else indices[1:])
    for t, x in ((anchors, embeddings), (others, ref_emb)):
        if t.shape[0]:
            least, most = torch.aminmax(t)
            if int(least) < 0 or int(most) >= x.shape[0]:
                return "an index of the indices_tuple is out of range"
    return None


class AllPairs:
    """The pairs (a1, p, a2, n) of all positives and negatives, made when they are looked at.

    self_index: (B,) the reference that is the row itself, which is none of its positives; None for none.
    """

    def __init__(self, labels: Tensor, reference_labels: Tensor, self_index: Tensor | None) -> None:
        self.labels, self.reference_labels, self.self_index = labels, reference_labels, self_index

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._pairs)

    @functools.cached_property
    def _pairs(self) -> tuple[Tensor, ...]:
        a1, p, a2, n = get_all_pairs_indices(self.labels, self.reference_labels)
        if self.self_index is not None:
            other = self.self_index[a1] != p
            a1, p = a1[other], p[other]
        return a1, p, a2, n


def is_by_label(pairs: Any) -> bool:
    """Whether a call is of all pairs, so that labels alone say what is a positive."""
    return pairs is None or isinstance(pairs, AllPairs)


def self_index_of(pairs: Any, labels: Tensor, ref_labels: Tensor) -> Tensor | None:
    """The reference that each row is itself. One tensor for both sides is how they know a batch against itself."""
    if pairs is not None:
        return pairs.self_index
    return torch.arange(labels.shape[0], device=labels.device) if ref_labels is labels else None


def sides_of(distance: Any, embeddings: Tensor, labels: Tensor, pairs: Any, ref_emb: Tensor, ref_labels: Any) -> Sides:
    """Rows as the distance compares them, and their labels."""
    x, y = both_rows(distance, embeddings, ref_emb)
    return Sides(x, y, labels, ref_labels, self_index_of(pairs, labels, ref_labels))


def in_their_dtype(losses: Tensor, embeddings: Tensor) -> Tensor:
    """In the dtype of the embeddings, as theirs; under autocast float32, as the kernels return them."""
    return losses if torch.is_autocast_enabled(embeddings.device.type) else losses.to(embeddings.dtype)


def of_elements(losses: Tensor, embeddings: Tensor, indices: Tensor | None = None) -> LossDict:
    """Their dictionary of one loss for each row."""
    if indices is None:
        indices = torch.arange(losses.shape[0], device=embeddings.device)
    return {"loss": {"losses": in_their_dtype(losses, embeddings), "indices": indices, "reduction_type": "element"}}
