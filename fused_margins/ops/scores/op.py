"""What a call of `scores` is: the only list of its arguments."""

from typing import Annotated, NamedTuple

from torch import Tensor

from ...core.enums import Similarity
from ..fields import Choice, Embeddings, Integer, Labels, Output, RowFactor, Vector
from ..op import Op
from .reference import reference


class Scores(NamedTuple):
    """The similarity matrix itself, with margin and scale applied.

    Args, returns, rules and source: see `fused_margins.ops.scores`.
    """

    x: Annotated[Tensor, Embeddings(("rows", "width"), differentiable=True)]
    y: Annotated[Tensor, Embeddings(("columns", "width"), differentiable=True)]
    target: Annotated[Tensor | None, Labels(("rows",))] = None
    scale: Annotated[float | Tensor, RowFactor(("rows",), positive=True, differentiable=True)] = 1.0
    bias: Annotated[Tensor | None, Vector(("columns",), differentiable=True)] = None
    margin: Annotated[float | Tensor, RowFactor(("rows",), differentiable=True)] = 0.0
    similarity: Annotated[Similarity, Choice(options=Similarity)] = Similarity.COSINE
    ignore_index: Annotated[int, Integer()] = -1
    sign: Annotated[int, Integer(low=-1, high=1)] = 1


class Outputs(NamedTuple):
    """The matrix."""

    scores: Annotated[Tensor, Output(("rows", "columns"), dtype=lambda x: x.dtype)]


def _check(a: Scores) -> None:
    if a.sign == 0:
        raise ValueError("sign: expected 1 or -1, got 0")


scores = Op("scores", Scores, Outputs, reference, check=_check)
