"""What a call of `magnet` is: the only list of its arguments."""

from typing import Annotated, NamedTuple

from torch import Tensor

from ...core.enums import Reduction
from ..fields import Choice, Embeddings, Labels, Number, Output, axes_of_loss
from ..op import Op
from .reference import reference


class Magnet(NamedTuple):
    """The magnet loss of a batch.

    Args, returns, rules and source: see `fused_margins.ops.magnet`.
    """

    x: Annotated[Tensor, Embeddings(("rows", "width"), differentiable=True)]
    clusters: Annotated[Tensor, Labels(("rows",))]
    cluster_labels: Annotated[Tensor, Labels(("columns",))]
    alpha: Annotated[float, Number()] = 1.0
    variance_floor: Annotated[float, Number(valid=lambda floor: 0 < floor < 1e38, expected="a positive number")] = 1e-4
    reduction: Annotated[Reduction, Choice(options=Reduction)] = Reduction.MEAN


class Outputs(NamedTuple):
    """The losses, or what they were reduced to."""

    loss: Annotated[Tensor, Output(axes_of_loss)]


magnet = Op("magnet", Magnet, Outputs, reference)
