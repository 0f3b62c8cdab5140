"""State dicts of heads between this library, pytorch-metric-learning and insightface; neither needs to be installed.

A state dict holds tensors alone. Units that are settings (degrees, temperatures) are converted by
`settings_from_pytorch_metric_learning`, from a module of theirs.

>>> import torch
>>> from fused_margins import ArcFaceLoss
>>> from fused_margins.compat import convert
>>> loss = ArcFaceLoss(num_classes=10, embedding_size=4)
>>> theirs = convert.to_pytorch_metric_learning(loss.state_dict())
>>> ours = convert.from_pytorch_metric_learning(theirs)
>>> theirs["W"].shape, ours["weight"].shape  # (D, C) and (C, D)
(torch.Size([4, 10]), torch.Size([10, 4]))
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core import checks

__all__ = [
    "from_insightface",
    "from_pytorch_metric_learning",
    "settings_from_pytorch_metric_learning",
    "to_insightface",
    "to_pytorch_metric_learning",
]

StateDict = dict[str, Any]
_TRANSPOSED, _AS_IT_IS, _OF_SOFT_TRIPLE = "W", "proxies", "fc"


def from_pytorch_metric_learning(state_dict: Mapping[str, Any], *, centers_per_class: int | None = None) -> StateDict:
    """The state dict of one of this library's heads, from that of pytorch-metric-learning's, or of a model with some.

        weight (C, D) = W^T  or  proxies;   with K centers a class  weight (C, K, D) = W^T or fc^T, cut in classes

    Args:
        state_dict: with entries `W` (D, C) or `proxies` (C, D), under any prefixes; other entries stay what they are.
        centers_per_class: K, for SubCenterArcFaceLoss with its `W` (D, C K) and SoftTripleLoss with its `fc` (D, C K).

    Returns:
        Copies of those entries as `weight`, contiguous; the other values themselves.

    Raises:
        ValueError: a state dict with none of them; such an entry that is no matrix, or not of a multiple of K columns;
            a module with two, or with a `weight` already.
    """
    known = (_TRANSPOSED, _AS_IT_IS) if centers_per_class is None else (_TRANSPOSED, _OF_SOFT_TRIPLE)
    converted: StateDict = {}
    for name, value in _entries(state_dict).items():
        prefix, _, last = name.rpartition(".")
        if last in known:
            _matrix(name, value)
            value = value if last == _AS_IT_IS else value.t()
            if centers_per_class is not None:
                checks.integer("centers_per_class", centers_per_class, 1)
                if len(value) % centers_per_class:
                    raise ValueError(f"{name}: expected a multiple of {centers_per_class} columns, got {len(value)}")
                value = value.unflatten(0, (-1, centers_per_class))
            value = value.clone(memory_format=torch.contiguous_format)
            name = f"{prefix}.weight" if prefix else "weight"
        if name in converted:
            raise ValueError(f"state_dict: expected one weight a module, got {name!r} twice")
        converted[name] = value
    if converted.keys() == state_dict.keys():
        raise ValueError(f"state_dict: expected an entry {' or '.join(map(repr, known))}, got {sorted(state_dict)}")
    return converted


def to_pytorch_metric_learning(state_dict: Mapping[str, Any], *, name: str = "W") -> StateDict:
    """The state dict of one of pytorch-metric-learning's heads, from that of this library's.

        W (D, C) = weight^T  or  proxies = weight;   of K centers a class  W or fc (D, C K)

    Args:
        state_dict: of a head, with an entry `weight` (C, D) or (C, K, D); learnable scales and margins have no place in
            theirs.
        name: "W"; "proxies" for ProxyNCALoss and ProxyAnchorLoss, "fc" for SoftTripleLoss.

    Returns:
        A state dict with that entry alone, a copy.

    Raises:
        ValueError: a state dict without `weight` or with other entries, an unknown name, a weight of other axes.
    """
    checks.one_of("name", name, (_TRANSPOSED, _AS_IT_IS, _OF_SOFT_TRIPLE))
    weight = _weight(state_dict, of_centers=name != _AS_IT_IS)
    weight = weight.flatten(0, -2)
    return {name: (weight if name == _AS_IT_IS else weight.t()).clone(memory_format=torch.contiguous_format)}


def settings_from_pytorch_metric_learning(loss: nn.Module) -> StateDict:
    """What the constructor of this library's class of the same name takes to do what a module of theirs does.

        margin in radians = degrees pi / 180 (ArcFaceLoss),   scale = 1 / temperature (NormalizedSoftmaxLoss)

    Args:
        loss: their ArcFaceLoss, SubCenterArcFaceLoss, CosFaceLoss, NormalizedSoftmaxLoss, SoftTripleLoss,
            SphereFaceLoss, ProxyNCALoss, ProxyAnchorLoss, NTXentLoss, SupConLoss or MultiSimilarityLoss.

    Returns:
        Keyword arguments.

    Raises:
        TypeError: another class. ValueError: a distance or a reducer other than the class has by default, or a
            regularizer, which no argument here stands for.

    >>> import fused_margins
    >>> import pytorch_metric_learning.losses
    >>> theirs = pytorch_metric_learning.losses.ArcFaceLoss(num_classes=10, embedding_size=4, margin=28.6, scale=64)
    >>> settings = settings_from_pytorch_metric_learning(theirs)
    >>> settings
    {'num_classes': 10, 'embedding_size': 4, 'scale': 64.0, 'margin': 0.499...}
    >>> loss = fused_margins.ArcFaceLoss(**settings)
    """
    kind = type(loss).__name__
    _expect_defaults(loss)
    get: Any = lambda *names: {name: float(getattr(loss, name)) for name in names}  # noqa: E731
    of_pairs = {
        "NTXentLoss": ("temperature",),
        "SupConLoss": ("temperature",),
        "MultiSimilarityLoss": ("alpha", "beta", "base"),
    }
    if kind in of_pairs:
        return get(*of_pairs[kind])
    proxies = getattr(loss, _AS_IT_IS, None)
    matrix = getattr(loss, _OF_SOFT_TRIPLE if kind == "SoftTripleLoss" else _TRANSPOSED, None)
    matrix = matrix if proxies is None else proxies.t()
    of_centers = {"SubCenterArcFaceLoss": "sub_centers", "SoftTripleLoss": "centers_per_class"}
    of_heads: dict[str, Any] = {
        "ArcFaceLoss": lambda: get("scale", "margin"),  # theirs keeps its margin in radians once it is made
        "SubCenterArcFaceLoss": lambda: {"margin": math.degrees(loss.margin), **get("scale")},  # type: ignore[arg-type]
        "SoftTripleLoss": lambda: {"gamma": 1 / float(loss.gamma), **get("la", "margin")},  # type: ignore[arg-type]
        "CosFaceLoss": lambda: get("scale", "margin"),
        "NormalizedSoftmaxLoss": lambda: {"scale": 1 / float(loss.temperature)},  # type: ignore[arg-type]
        "SphereFaceLoss": lambda: {"margin": int(loss.margin), "scale": float(loss.scale)},  # type: ignore[arg-type]
        "ProxyNCALoss": lambda: get("softmax_scale"),
        "ProxyAnchorLoss": lambda: get("margin", "alpha"),
    }
    if kind not in of_heads or not isinstance(matrix, Tensor):
        known = ", ".join([*of_heads, *of_pairs])
        raise TypeError(f"loss: expected one of pytorch-metric-learning's {known}, got {kind}")
    sizes = {"num_classes": matrix.shape[1], "embedding_size": matrix.shape[0]}
    if kind in of_centers:
        sizes[of_centers[kind]] = centers = int(getattr(loss, of_centers[kind]))
        sizes["num_classes"] //= centers
    return sizes | of_heads[kind]()


def _expect_defaults(loss: Any) -> None:
    """Refuse what would be lost: settings of theirs that are modules of their own."""
    if not hasattr(loss, "get_default_distance"):
        raise TypeError(f"loss: expected a loss of pytorch-metric-learning, got {type(loss).__name__}")
    settings = ("normalize_embeddings", "p", "power", "is_inverted")
    usual = loss.get_default_distance()
    if type(loss.distance) is not type(usual) or any(getattr(loss.distance, s) != getattr(usual, s) for s in settings):
        raise ValueError(f"loss: expected the distance that it has by default, {usual}, got {loss.distance}")
    each = {name: getattr(loss, name, None) for name in ("weight_regularizer", "embedding_regularizer")}
    for name, module in each.items():
        if module is not None:
            raise ValueError(f"loss: expected no {name}, got {type(module).__name__}")
    usual = type(loss.get_default_reducer())
    reducers = getattr(loss.reducer, "reducers", None)
    for reducer in [loss.reducer] if reducers is None else reducers.values():
        if type(reducer) is not usual:
            raise ValueError(f"loss: expected the reducer that it has by default, {usual.__name__}, got {reducer}")


def from_insightface(ranks: Sequence[Mapping[str, Any]]) -> StateDict:
    """The state dict of a head, from those of insightface's PartialFC_V2 of all ranks.

    Args:
        ranks: in the order of the ranks, state dicts with `weight` (C_local, D), or whole checkpoints, as
            ``torch.load("checkpoint_gpu_0.pt")`` gives them, whose "state_dict_softmax_fc" that is.

    Returns:
        `weight` (C, D): the classes of rank 0, then those of rank 1, and so on.

    Raises:
        ValueError: none, one without a weight or with other entries, widths or sizes that do not fit: of C classes the
            first C mod W ranks have one more than the others.

    >>> import torch
    >>> from fused_margins.compat import convert
    >>> parts = convert.to_insightface({"weight": torch.arange(10.0)[:, None]}, world_size=4)
    >>> [len(part["weight"]) for part in parts]
    [3, 3, 2, 2]
    >>> convert.from_insightface(parts)["weight"].flatten().tolist() == list(range(10))
    True
    """
    if isinstance(ranks, Mapping) or not len(ranks):
        raise ValueError(f"ranks: expected a list of one state dict a rank, got {type(ranks).__name__}")
    parts = [_weight(rank.get("state_dict_softmax_fc", rank), f"ranks[{i}]") for i, rank in enumerate(ranks)]
    for i, part in enumerate(parts):
        if part.shape[1] != parts[0].shape[1]:
            raise ValueError(f"ranks[{i}]: expected width {parts[0].shape[1]} as rank 0 has, got {part.shape[1]}")
    sizes = [len(part) for part in parts]
    expected = _sizes(sum(sizes), len(sizes))
    if sizes != expected:
        raise ValueError(f"ranks: expected {expected} classes, in the order of the ranks, got {sizes}")
    return {"weight": torch.cat([part.detach().cpu() for part in parts])}


def to_insightface(state_dict: Mapping[str, Any], world_size: int = 1) -> list[StateDict]:
    """The state dicts that insightface's PartialFC_V2 of each rank loads, from that of a head.

    Args:
        state_dict: with `weight` (C, D) alone. world_size: W, the number of ranks, at most C.

    Returns:
        W state dicts with `weight`, copies: C // W classes each, one more in the first C mod W.

    Raises:
        ValueError: a state dict without `weight` or with other entries, a world size out of range.
    """
    weight = _weight(state_dict)
    sizes = _sizes(len(weight), checks.integer("world_size", world_size, 1, len(weight)))
    return [{"weight": part.clone()} for part in weight.split(sizes)]


def _sizes(classes: int, ranks: int) -> list[int]:
    return [classes // ranks + int(rank < classes % ranks) for rank in range(ranks)]


def _entries(state_dict: Mapping[str, Any], argument: str = "state_dict") -> Mapping[str, Any]:
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"{argument}: expected a state dict, got {type(state_dict).__name__}")
    return state_dict


def _weight(state_dict: Mapping[str, Any], argument: str = "state_dict", of_centers: bool = False) -> Tensor:
    """The only entry; (C, K, D) where there may be several centers a class."""
    if "weight" not in _entries(state_dict, argument):
        raise ValueError(f"{argument}: expected an entry 'weight', got {sorted(state_dict)}")
    if len(state_dict) > 1:
        raise ValueError(f"{argument}: expected no entry but 'weight', got {sorted(state_dict)}")
    weight = state_dict["weight"]
    if of_centers and isinstance(weight, Tensor) and weight.dim() == 3:
        return weight.detach()
    return _matrix(f"{argument}['weight']", weight)


def _matrix(argument: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.dim() != 2:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{argument}: expected a matrix, got {got}")
    return value.detach()
