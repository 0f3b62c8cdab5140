"""Which calls the kernels can take. All others are left to pytorch-metric-learning's own code, errors included."""

import functools
import math
from collections.abc import Iterator
from numbers import Real
from typing import Any

import torch
from pytorch_metric_learning import distances
from pytorch_metric_learning.utils.loss_and_miner_utils import convert_to_weights as convert_to_weights
from pytorch_metric_learning.utils.loss_and_miner_utils import get_all_pairs_indices
from torch import Tensor, nn

from ...core import checks
from ...core.indices import UNADMITTED
from ...mining.sides import Sides


class Hooks:
    """Methods that a user's subclass may replace, as they are in pytorch-metric-learning."""

    def __init__(self, owner: type, *names: str) -> None:
        self.methods = {name: getattr(owner, name) for name in names}

    def are_theirs(self, module: nn.Module) -> bool:
        """Whether nobody has replaced one of them: in a subclass, in the class itself or in this module."""
        own = module.__dict__
        return all(getattr(type(module), name) is f and name not in own for name, f in self.methods.items())


_OF_A_DISTANCE = ("forward", "compute_mat", "maybe_normalize", "normalize")
_OF_DOT_PRODUCTS = Hooks(distances.DotProductSimilarity, *_OF_A_DISTANCE)
_OF_EUCLIDEAN_DISTANCES = Hooks(distances.LpDistance, *_OF_A_DISTANCE)


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody looks at the calls of a module, or changes them."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks)


def is_dot_product(distance: Any) -> bool:
    """Whether a distance is the product of rows as its `maybe_normalize` gives them, and nothing else."""
    kinds = distances.CosineSimilarity, distances.DotProductSimilarity
    known = type(distance) in kinds and _OF_DOT_PRODUCTS.are_theirs(distance) and not is_hooked(distance)
    return known and distance.power == 1 and distance.is_inverted and not distance.collect_stats


def is_cosine(distance: Any) -> bool:
    """Whether a distance is the cosine."""
    return is_dot_product(distance) and bool(distance.normalize_embeddings) and distance.p == 2


def is_euclidean(distance: Any) -> bool:
    """Whether a distance is the Euclidean one, or its square, of rows as its `maybe_normalize` gives them."""
    known = type(distance) is distances.LpDistance and _OF_EUCLIDEAN_DISTANCES.are_theirs(distance)
    known = known and not is_hooked(distance) and not distance.collect_stats
    return known and distance.p == 2 and distance.power in (1, 2) and not distance.is_inverted


def is_number(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    """Whether a parameter of a loss is a number that is above low, below high, and no tensor that learns."""
    return isinstance(value, Real) and not isinstance(value, bool) and low < float(value) < high


def are_matrices(x: Any, y: Any) -> bool:
    """Whether the kernels can read both sides: dense matrices with rows, of one width and floating dtype."""
    for t in (x, y):
        if type(t) not in (Tensor, nn.Parameter) or t.dim() != 2 or t.dtype not in checks.FLOATING or not t.shape[0]:
            return False
        if t.layout != torch.strided or t.is_nested or t.device.type == "meta":
            return False
    if x.device != y.device or x.dtype != y.dtype or x.shape[1] != y.shape[1] or not x.shape[1]:
        return False
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is None


def are_labels(labels: Any, x: Tensor, dtypes: tuple[torch.dtype, ...] = checks.INTEGER) -> bool:
    """Whether labels are integers where the rows are; that there is one for every row is checked by theirs."""
    known = type(labels) is Tensor and labels.dtype in dtypes and labels.layout == torch.strided
    return known and labels.device == x.device


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


def sides_of(distance: Any, embeddings: Any, labels: Any, pairs: Any, ref_emb: Any, ref_labels: Any) -> Sides | None:
    """Rows as the distance compares them, and their labels; None for what is no call by labels of all pairs."""
    if pairs is not None and not isinstance(pairs, AllPairs):
        return None
    if not are_matrices(embeddings, ref_emb) or not are_labels(labels, embeddings):
        return None
    if not are_labels(ref_labels, ref_emb) or int(ref_labels.min()) == UNADMITTED:
        return None
    if pairs is not None:
        self_index = pairs.self_index
    elif ref_labels is labels:  # that is how they know a batch against itself
        self_index = torch.arange(labels.shape[0], device=labels.device)
    else:
        self_index = None
    x = distance.maybe_normalize(embeddings)
    y = x if ref_emb is embeddings else distance.maybe_normalize(ref_emb)
    return Sides(x, y, labels, ref_labels, self_index)


def in_their_dtype(losses: Tensor, embeddings: Tensor) -> Tensor:
    """Theirs have the dtype of the embeddings, and float32 under autocast, as the kernels return them."""
    return losses if torch.is_autocast_enabled(embeddings.device.type) else losses.to(embeddings.dtype)
