"""`contrast` with the epilogue of margin softmax in CUDA C++ (csrc/contrast/cuda.cu): one launch, two backward."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...backends import cuda
from ...backends.cpu import int64, row_factor
from ...backends.registry import MaybeTensors, Problem
from ...core.enums import Reduction, Relation
from ...core.margins import pieces
from ...core.similarity import accumulation_dtype
from .epilogues import Epilogue
from .op import Contrast

COLUMNS = 1024  # that it is made for
# Rows x columns up to which it is taken. Measured on an H100 at 256 x 200: 0.67 ms for Triton's 1.70, both before
# either was made faster; beyond this size the limit is an estimate.
FASTER = 1 << 17


def can_run(problem: Problem) -> str | None:
    """The losses of few classes, nothing but classes."""
    a = problem.arguments
    if a.epilogue != Epilogue.MARGIN_SOFTMAX:
        return f"has no epilogue but 'margin_softmax', got {a.epilogue.name.lower()!r}"
    if a.relation != Relation.DIFFERENT:
        return f"takes the columns of other labels only, got relation {a.relation.name.lower()!r}"
    if a.group_size != 1:
        return f"takes no groups of columns, got group_size {a.group_size}"
    if a.smoothing:
        return f"smooths no labels, got smoothing {a.smoothing}"
    for name in ("row_labels", "column_labels", "self_index", "bias"):
        if getattr(a, name) is not None:
            return f"takes no {name}"
    return None if problem.columns <= COLUMNS else f"takes up to {COLUMNS} columns, got {problem.columns}"


def slower(problem: Problem) -> str | None:
    """Where Triton is faster."""
    return f"slower than Triton beyond {FASTER} similarities" if problem.rows * problem.columns > FASTER else None


def saved_size(a: Contrast, plan: Any) -> int:
    """Values that a forward hands to its backward; see ``csrc/contrast/cuda.h``."""
    return cuda.module.contrast_saved_size(a.x.shape[0], a.y.shape[0])


def _arguments(a: Contrast) -> tuple[Any, ...]:
    """What both directions have in common."""
    dtype, device = accumulation_dtype(a.x.dtype), a.x.device
    scale, margin = row_factor(a.scale, dtype, device), row_factor(a.margin, dtype, device)
    psi = cuda.module.Psi(*pieces(a.angle_rad, a.beyond_pi), a.straight_through)
    factors = scale, scale.dim() > 0, margin, margin.dim() > 0
    return a.x, a.y, int64(a.target), *factors, a.similarity, a.ignore_index, psi, a.reduction


def forward(a: Contrast, plan: Any) -> tuple[None, None, Tensor, Tensor]:
    """loss, a scalar or (B,), and what the backward needs; the accumulation dtype."""
    rows, dtype = a.x.shape[0], accumulation_dtype(a.x.dtype)
    loss = a.x.new_empty((rows,) if a.reduction == Reduction.NONE else (), dtype=dtype)
    saved = a.x.new_empty(saved_size(a, plan), dtype=dtype)
    if not rows:
        return None, None, loss.zero_(), saved
    counters = cuda.tickets(a.x.device, cuda.module.contrast_tickets(rows))
    cuda.launch(cuda.module.contrast_forward, a.x.device, *_arguments(a), loss, saved, counters)
    return None, None, loss, saved


def backward(grads: MaybeTensors, a: Contrast, saved: Tensor, plan: Any, needs: Sequence[bool]) -> list[Tensor | None]:
    """Gradients of x, y, scale, bias and margin, of those that are needed; they are contiguous."""
    gradients = [
        t.new_empty(t.shape) if need and isinstance(t, Tensor) else None
        for t, need in zip((a.x, a.y, a.scale, a.bias, a.margin), needs)
    ]
    if not a.x.shape[0]:
        return [None if t is None else t.zero_() for t in gradients]
    grad_x, grad_y, grad_scale, _, grad_margin = gradients
    scratch = saved.new_empty(cuda.module.contrast_scratch_size(a.x.shape[0], a.y.shape[0]))
    counters = cuda.tickets(a.x.device, 1) if grad_scale is not None and grad_scale.dim() == 0 else None
    outputs = saved, grad_x, grad_y, grad_scale, grad_margin, scratch, counters
    cuda.launch(cuda.module.contrast_backward, a.x.device, grads[2], *_arguments(a), *outputs)
    return gradients
