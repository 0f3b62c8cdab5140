"""What a call of `contrast` is: the only list of its arguments."""

import math
from typing import Annotated, NamedTuple

from torch import Tensor

from ...core.enums import BeyondPi, Reduction, Relation, Similarity
from ..fields import Choice, Embeddings, Flag, Integer, Labels, Number, Output, RowFactor, Vector, axes_of_loss
from ..op import Op
from .epilogues import EPILOGUES, Epilogue
from .reference import reference

_RADIANS = Number(valid=lambda angle: abs(angle) <= math.pi, expected="radians within [-pi, pi]")
_SHARE = Number(valid=lambda share: 0 <= share <= 1, expected="a number in [0, 1]")


class Contrast(NamedTuple):
    """Similarity of each row with its positive column, and log-sum-exp over the columns that its label admits.

    Args, returns, rules and source: see `fused_margins.ops.contrast`.
    """

    x: Annotated[Tensor, Embeddings(("rows", "width"), differentiable=True)]
    y: Annotated[Tensor, Embeddings(("columns", "width"), differentiable=True)]
    target: Annotated[Tensor, Labels(("rows",))]
    row_labels: Annotated[Tensor | None, Labels(("rows",))] = None
    column_labels: Annotated[Tensor | None, Labels(("columns",))] = None
    self_index: Annotated[Tensor | None, Labels(("rows",))] = None
    scale: Annotated[float | Tensor, RowFactor(("rows",), positive=True, differentiable=True)] = 1.0
    bias: Annotated[Tensor | None, Vector(("columns",), differentiable=True)] = None
    margin: Annotated[float | Tensor, RowFactor(("rows",), differentiable=True)] = 0.0
    similarity: Annotated[Similarity, Choice(options=Similarity)] = Similarity.COSINE
    relation: Annotated[Relation, Choice(options=Relation)] = Relation.DIFFERENT
    ignore_index: Annotated[int, Integer()] = -1
    epilogue: Annotated[Epilogue, Choice(options=Epilogue)] = Epilogue.NONE
    angle_rad: Annotated[float, _RADIANS] = 0.0
    beyond_pi: Annotated[BeyondPi, Choice(options=BeyondPi)] = BeyondPi.STANDARD
    straight_through: Annotated[bool, Flag()] = False
    reduction: Annotated[Reduction, Choice(options=Reduction)] = Reduction.MEAN
    group_size: Annotated[int, Integer(low=1)] = 1
    smoothing: Annotated[float, _SHARE] = 0.0


_VECTOR = Output(("rows",), given=lambda a: a.epilogue == Epilogue.NONE)


class Outputs(NamedTuple):
    """The two vectors, or what an epilogue makes of them."""

    positive: Annotated[Tensor | None, _VECTOR]
    negative_lse: Annotated[Tensor | None, _VECTOR]
    loss: Annotated[Tensor | None, Output(axes_of_loss, given=lambda a: a.epilogue != Epilogue.NONE)]


def _check(a: Contrast) -> None:
    """Groups are whole, an angle is one of cosines, and margins are for the epilogues that take them."""
    if a.y.shape[0] % a.group_size:
        raise ValueError(f"group_size: expected a divisor of the {a.y.shape[0]} columns, got {a.group_size}")
    if a.angle_rad != 0 and a.similarity != Similarity.COSINE:
        raise ValueError(f"similarity: expected 'cosine' with an angle_rad, got {a.similarity.name.lower()!r}")
    if a.smoothing:
        _check_smoothing(a)
    if a.epilogue != Epilogue.NONE and EPILOGUES[a.epilogue].margins:
        return
    for name, value in (("margin", a.margin), ("angle_rad", a.angle_rad)):
        if isinstance(value, Tensor) or value != 0:
            got = a.epilogue.name.lower()
            raise ValueError(f"{name}: expected with an epilogue that takes margins, got epilogue {got!r}")


def _check_smoothing(a: Contrast) -> None:
    """Columns are classes, each row sees all of them, as cosines without a bias."""
    plain = a.similarity == Similarity.COSINE and a.relation == Relation.DIFFERENT and a.group_size == 1
    others = (a.row_labels, a.column_labels, a.self_index, a.bias)
    if a.epilogue != Epilogue.MARGIN_SOFTMAX or not plain or any(t is not None for t in others):
        raise ValueError(
            "smoothing: expected 0 but with epilogue 'margin_softmax', cosines, targets alone as labels, no groups and "
            f"no bias, got {a.smoothing}"
        )


_ALIASES = {"margin_softmax": {"epilogue": Epilogue.MARGIN_SOFTMAX}}
contrast = Op("contrast", Contrast, Outputs, reference, check=_check, aliases=_ALIASES)
