"""Which backends a loss can be trained on: those that can run every op that it calls."""

from collections.abc import Iterable

import torch

from ..ops import registry
from . import config

Call = tuple[str, str]  # an op, and the columns that it looks at: "same" or "different"

SOFTMAX: Call = ("margin_softmax", "different")
POSITIVES: Call = ("nearest", "same")
NEGATIVES: Call = ("nearest", "different")
ALL_NEGATIVES: Call = ("contrast", "different")
DRAWS: Call = ("draw", "different")
MAGNET: Call = ("magnet", "different")
SIZES = (128, 256, 64)  # rows, columns and width of a usual problem


def calls_of(loss: config.Loss) -> tuple[Call, ...]:
    """What a training with this loss calls.

    >>> calls_of(config.Triplet(positives="easy", negatives="random"))
    (('nearest', 'same'),)
    """
    match loss:
        case config.Softmax() | config.MarginSoftmax():
            return (SOFTMAX,)
        case config.Magnet():  # its index: k-means within classes, nearest clusters of other classes
            return (*([SOFTMAX] if loss.warm_epochs else []), MAGNET, POSITIVES, NEGATIVES)
    calls = [POSITIVES] if loss.positives in ("easy", "hard") else []
    if loss.negatives in ("hard", "semihard"):
        calls.append(NEGATIVES)
    elif loss.negatives in ("all", "distance-weighted"):
        calls.append(ALL_NEGATIVES if loss.negatives == "all" else DRAWS)
    return tuple(calls)


def problems(
    calls: Iterable[Call], device: str, rows: int = SIZES[0], columns: int = SIZES[1], width: int = SIZES[2]
) -> list[registry.Problem]:
    kind = torch.device(device).type
    return [registry.Problem(op, kind, torch.float32, rows, columns, width, relation) for op, relation in calls]


def available(device: str, calls: Iterable[Call]) -> list[str]:
    """Backends other than the reference that can run all these calls on this device."""
    wanted = problems(calls, device)
    return [
        backend.name
        for backend in registry.BACKENDS
        if backend.name != "reference" and all(registry.refusal(backend, p) is None for p in wanted)
    ]


def of_all(device: str, losses: Iterable[config.Loss]) -> list[str]:
    """Those that can be trained on with every one of the losses."""
    return available(device, {call for loss in losses for call in calls_of(loss)})
