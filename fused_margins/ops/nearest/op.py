"""What a call of `nearest` is: the only list of its arguments. The choice of a column has no gradient."""

from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from ...core.enums import Relation, Similarity
from ..fields import Choice, Embeddings, Flag, Integer, Labels, Output, Vector
from ..op import Op
from .reference import reference


class Nearest(NamedTuple):
    """The k most similar columns that each row's label admits, or the least similar ones.

    Args, returns, rules and source: see `fused_margins.ops.nearest`.
    """

    x: Annotated[Tensor, Embeddings(("rows", "width"))]
    y: Annotated[Tensor, Embeddings(("columns", "width"))]
    row_labels: Annotated[Tensor, Labels(("rows",))]
    column_labels: Annotated[Tensor, Labels(("columns",))]
    self_index: Annotated[Tensor | None, Labels(("rows",))] = None
    below: Annotated[Tensor | None, Vector(("rows",))] = None
    similarity: Annotated[Similarity, Choice(options=Similarity)] = Similarity.COSINE
    relation: Annotated[Relation, Choice(options=Relation)] = Relation.SAME
    k: Annotated[int, Integer(low=1, high=2**31 - 1)] = 1
    largest: Annotated[bool, Flag()] = True


class Outputs(NamedTuple):
    """The columns and how similar they are, most similar first."""

    similarity: Annotated[Tensor, Output(("rows", "k"))]
    index: Annotated[Tensor, Output(("rows", "k"), dtype=lambda x: torch.int64)]  # type: ignore[assignment]


nearest = Op("nearest", Nearest, Outputs, reference)
