"""Schema and fake kernel of `draw`; the arithmetic is in the kernels. The choice of a column has no gradient."""

from typing import Any

import torch
from torch import Tensor

from .. import checks, native, registry
from . import reference

_library = torch.library.Library("fused_margins", "FRAGMENT")
_library.define(
    "draw(Tensor x, Tensor y, Tensor row_labels, Tensor column_labels, Tensor seed, Tensor? self_index, str relation, "
    "str backend) -> Tensor"
)


def _forward(*args: Any) -> Tensor:
    *inputs, backend = args
    return registry.kernel("draw", backend).forward(*inputs)


_library.impl("draw", _forward, "CompositeExplicitAutograd")


@torch.library.register_fake("fused_margins::draw", lib=_library)
def _(x, y, row_labels, column_labels, seed, self_index, relation, backend):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], dtype=torch.int64)


def draw(
    x: Tensor,
    y: Tensor,
    row_labels: Tensor,
    column_labels: Tensor,
    seed: Tensor,
    *,
    relation: str = "different",
    self_index: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """One column of each row drawn at random, so that distances are spread evenly over their range.

    Args, returns, rules and sources: see `fused_margins.ops.draw`.
    """
    checks.relation(relation)
    x, y = checks.matrices(x, y)
    rows, columns = x.shape[0], y.shape[0]
    checks.labels("row_labels", row_labels, rows, x)
    checks.labels("column_labels", column_labels, columns, x)
    checks.labels("self_index", self_index, rows, x, optional=True)
    checks.seed("seed", seed, x)
    itself = y is x
    x = x.detach()
    y = x if itself else y.detach()
    problem = registry.Problem("draw", x.device.type, x.dtype, rows, columns, x.shape[1], relation)
    backend = registry.resolve(backend, problem)
    args = (x, y, row_labels, column_labels, seed.to(torch.int64), self_index, relation)
    if backend == "reference":
        with torch.autocast(x.device.type, enabled=False), torch.no_grad():
            return reference.draw(*args)
    if backend in native.DIRECT and native.direct(*args[:6]):
        return registry.kernel("draw", backend).forward(*args)
    return torch.ops.fused_margins.draw(*args, backend)
