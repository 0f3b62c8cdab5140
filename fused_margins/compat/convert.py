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
_TRANSPOSED, _AS_IT_IS = "W", "proxies"


def from_pytorch_metric_learning(state_dict: Mapping[str, Any]) -> StateDict:
    """The state dict of one of this library's heads, from that of pytorch-metric-learning's, or of a model with some.

        weight (C, D) = W^T  or  proxies

    Args:
        state_dict: with entries `W` (D, C) or `proxies` (C, D), under any prefixes; other entries stay what they are.

    Returns:
        Copies of those entries as `weight`, contiguous; the other values themselves.

    Raises:
        ValueError: a state dict with neither; such an entry that is no matrix; a module with both, or with a `weight`
            already.
    """
    converted: StateDict = {}
    for name, value in _entries(state_dict).items():
        prefix, _, last = name.rpartition(".")
        if last in (_TRANSPOSED, _AS_IT_IS):
            _matrix(name, value)
            value = (value.t() if last == _TRANSPOSED else value).clone(memory_format=torch.contiguous_format)
            name = f"{prefix}.weight" if prefix else "weight"
        if name in converted:
            raise ValueError(f"state_dict: expected one weight a module, got {name!r} twice")
        converted[name] = value
    if converted.keys() == state_dict.keys():
        raise ValueError(f"state_dict: expected an entry 'W' or 'proxies', got {sorted(state_dict)}")
    return converted


def to_pytorch_metric_learning(state_dict: Mapping[str, Any], *, name: str = "W") -> StateDict:
    """The state dict of one of pytorch-metric-learning's heads, from that of this library's.

        W (D, C) = weight^T  or  proxies = weight

    Args:
        state_dict: of a head, with an entry `weight` (C, D); learnable scales and margins have no place in theirs.
        name: "W", or "proxies" for ProxyNCALoss and ProxyAnchorLoss.

    Returns:
        A state dict with that entry alone, a copy.

    Raises:
        ValueError: a state dict without `weight` or with other entries, an unknown name, a weight that is no matrix.
    """
    checks.one_of("name", name, (_TRANSPOSED, _AS_IT_IS))
    weight = _weight(state_dict)
    return {name: (weight.t() if name == _TRANSPOSED else weight).clone(memory_format=torch.contiguous_format)}


def settings_from_pytorch_metric_learning(loss: nn.Module) -> StateDict:
    """What the constructor of this library's class of the same name takes to do what a module of theirs does.

        margin in radians = degrees pi / 180 (ArcFaceLoss),   scale = 1 / temperature (NormalizedSoftmaxLoss)

    Args:
        loss: their ArcFaceLoss, CosFaceLoss, NormalizedSoftmaxLoss, SphereFaceLoss, ProxyNCALoss, ProxyAnchorLoss,
            NTXentLoss, SupConLoss or MultiSimilarityLoss, with the distance and the reducer that it has by default.

    Returns:
        Keyword arguments.

    Raises:
        TypeError: another class.

    >>> import fused_margins
    >>> import pytorch_metric_learning.losses
    >>> theirs = pytorch_metric_learning.losses.ArcFaceLoss(num_classes=10, embedding_size=4, margin=28.6, scale=64)
    >>> settings = settings_from_pytorch_metric_learning(theirs)
    >>> settings
    {'num_classes': 10, 'embedding_size': 4, 'scale': 64.0, 'margin': 0.499...}
    >>> loss = fused_margins.ArcFaceLoss(**settings)
    """
    kind = type(loss).__name__
    get: Any = lambda *names: {name: float(getattr(loss, name)) for name in names}  # noqa: E731
    of_pairs = {
        "NTXentLoss": ("temperature",),
        "SupConLoss": ("temperature",),
        "MultiSimilarityLoss": ("alpha", "beta", "base"),
    }
    if kind in of_pairs:
        return get(*of_pairs[kind])
    proxies = getattr(loss, _AS_IT_IS, None)
    matrix = getattr(loss, _TRANSPOSED, None) if proxies is None else proxies.t()
    of_heads: dict[str, Any] = {
        "ArcFaceLoss": lambda: get("scale", "margin"),  # theirs keeps its margin in radians once it is made
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
    return sizes | of_heads[kind]()


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


def _weight(state_dict: Mapping[str, Any], argument: str = "state_dict") -> Tensor:
    """The only entry."""
    if "weight" not in _entries(state_dict, argument):
        raise ValueError(f"{argument}: expected an entry 'weight', got {sorted(state_dict)}")
    if len(state_dict) > 1:
        raise ValueError(f"{argument}: expected no entry but 'weight', got {sorted(state_dict)}")
    return _matrix(f"{argument}['weight']", state_dict["weight"])


def _matrix(argument: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.dim() != 2:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{argument}: expected a matrix, got {got}")
    return value.detach()
