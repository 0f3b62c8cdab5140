"""What a call of `sample` is: the only list of its arguments. The choice of a column has no gradient."""

from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from ...core.enums import Relation
from ..fields import Choice, Embeddings, Labels, Output, Seed
from ..op import Op
from .reference import reference


class Sample(NamedTuple):
    """One column of each row at random, so that distances are spread evenly over their range.

    Args, returns, rules and sources: see `fused_margins.ops.sample`.
    """

    x: Annotated[Tensor, Embeddings(("rows", "width"))]
    y: Annotated[Tensor, Embeddings(("columns", "width"))]
    row_labels: Annotated[Tensor, Labels(("rows",))]
    column_labels: Annotated[Tensor, Labels(("columns",))]
    seed: Annotated[Tensor, Seed()]
    self_index: Annotated[Tensor | None, Labels(("rows",))] = None
    relation: Annotated[Relation, Choice(options=Relation)] = Relation.DIFFERENT


class Outputs(NamedTuple):
    """The drawn columns."""

    index: Annotated[Tensor, Output(("rows",), dtype=lambda x: torch.int64)]  # type: ignore[assignment]


sample = Op("sample", Sample, Outputs, reference, aliases={"draw": {}})
