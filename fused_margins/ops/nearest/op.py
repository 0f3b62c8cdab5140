"""Schema and fake kernel of `nearest`; the arithmetic is in the kernels. The choice of a column has no gradient."""

from typing import Any

import torch
from torch import Tensor

from .. import checks, crossovers, native, registry
from ..similarity import accumulation_dtype
from . import reference

_library = torch.library.Library("fused_margins", "FRAGMENT")
_library.define(
    "nearest(Tensor x, Tensor y, Tensor row_labels, Tensor column_labels, Tensor? self_index, Tensor? below, "
    "str similarity, str relation, int k, str backend) -> (Tensor similarity, Tensor index)"
)


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    *inputs, backend = args
    return registry.kernel("nearest", backend).forward(*inputs)


_library.impl("nearest", _forward, "CompositeExplicitAutograd")


@torch.library.register_fake("fused_margins::nearest", lib=_library)
def _(x, y, row_labels, column_labels, self_index, below, similarity, relation, k, backend):  # type: ignore[no-untyped-def]
    shape = (x.shape[0], k)
    return x.new_empty(shape, dtype=accumulation_dtype(x.dtype)), x.new_empty(shape, dtype=torch.int64)


def nearest(
    x: Tensor,
    y: Tensor,
    row_labels: Tensor,
    column_labels: Tensor,
    *,
    similarity: str = "cosine",
    relation: str = "same",
    k: int = 1,
    self_index: Tensor | None = None,
    below: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The k most similar columns that each row's label admits.

    Args, returns, rules and source: see `fused_margins.ops.nearest`.
    """
    checks.similarity(similarity)
    checks.relation(relation)
    checks.whole("k", k)
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")
    x, y = checks.matrices(x, y)
    rows, columns = x.shape[0], y.shape[0]
    checks.labels("row_labels", row_labels, rows, x)
    checks.labels("column_labels", column_labels, columns, x)
    checks.labels("self_index", self_index, rows, x, optional=True)
    below = checks.vector("below", below, rows, x)
    return search(x, y, row_labels, column_labels, self_index, below, similarity, relation, k, backend)


def search(
    x: Tensor,
    y: Tensor,
    row_labels: Tensor,
    column_labels: Tensor,
    self_index: Tensor | None,
    below: Tensor | None,
    similarity: str,
    relation: str,
    k: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """`nearest` of arguments that have been checked."""
    itself = y is x
    x = x.detach()
    y = x if itself else y.detach()
    below = None if below is None else below.detach()
    problem = registry.Problem("nearest", x.device.type, x.dtype, x.shape[0], y.shape[0], x.shape[1], relation)
    chosen = registry.resolve(backend, problem)
    if backend == "auto" and chosen == "triton" and k > crossovers.NEIGHBOURS:
        chosen = "reference"
    backend = chosen
    args = (x, y, row_labels, column_labels, self_index, below, similarity, relation, k)
    if backend == "reference":
        with torch.autocast(x.device.type, enabled=False), torch.no_grad():
            return reference.nearest(*args)
    if backend in native.DIRECT and native.direct(*args[:6]):  # around the dispatcher, which takes as long as few rows
        return registry.kernel("nearest", backend).forward(*args)
    return torch.ops.fused_margins.nearest(*args, backend)
