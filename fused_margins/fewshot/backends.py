"""Which backends a loss can be trained on: those that can run every op that it calls."""

from collections.abc import Iterable
from typing import Any

from ..backends import registry
from . import config

Call = tuple[str, tuple[tuple[str, str], ...]]  # an op, by a name that `fused_margins.explain` knows, and its options

SOFTMAX: Call = ("margin_softmax", ())
POSITIVES: Call = ("nearest", (("relation", "same"),))
NEGATIVES: Call = ("nearest", (("relation", "different"),))
ALL_NEGATIVES: Call = ("contrast", (("epilogue", "info_nce"),))
SAMPLE: Call = ("sample", ())
MAGNET: Call = ("magnet", ())
SIZES = (128, 256, 64)  # rows, columns and width of a usual problem


def calls_of(loss: config.Loss) -> tuple[Call, ...]:
    """What a training with this loss calls.

    >>> calls_of(config.Triplet(positives="easy", negatives="random"))
    (('nearest', (('relation', 'same'),)),)
    """
    match loss:
        case config.Softmax() | config.MarginSoftmax() | config.CosFace() | config.ArcFace():
            return (SOFTMAX,)
        case config.Magnet():  # its index: k-means within classes, nearest clusters of other classes
            return (*([SOFTMAX] if loss.warm_epochs else []), MAGNET, POSITIVES, NEGATIVES)
    calls = [POSITIVES] if loss.positives in ("easy", "hard") else []
    if loss.negatives in ("hard", "semihard"):
        calls.append(NEGATIVES)
    elif loss.negatives in ("all", "distance-weighted"):
        calls.append(ALL_NEGATIVES if loss.negatives == "all" else SAMPLE)
    return tuple(calls)


def problems(
    calls: Iterable[Call], device: str, rows: int = SIZES[0], columns: int = SIZES[1], width: int = SIZES[2]
) -> list[registry.Problem]:
    def problem(op: str, options: dict[str, Any]) -> registry.Problem:
        return registry.problem(op, rows=rows, columns=columns, width=width, device=device, **options)

    return [problem(op, dict(options)) for op, options in calls]


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
