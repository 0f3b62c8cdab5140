"""`contrast` in C++ on a CPU (csrc/contrast/cpu.cpp): the tensors' memory, handed over."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ...backends import budget
from ...backends.cpu import call, int64, matrix, module, pointer, vector, workspace
from ...core.checks import constant
from ...core.enums import BeyondPi, Reduction
from ...core.margins import pieces
from ...core.similarity import accumulation_dtype
from .epilogues import Epilogue

if TYPE_CHECKING:
    from ...backends.registry import Problem
    from .op import Contrast

_EPILOGUES = (Epilogue.NONE, Epilogue.MARGIN_SOFTMAX, Epilogue.INFO_NCE)
force_running_maximum = False  # a test may ask for the path that no logit overflows


class Plan(NamedTuple):
    """What a forward saves: whether the columns' average under each row's weights, and how many blocks of weights."""

    with_mean: bool
    saved_blocks: int


def can_run(problem: Problem) -> str | None:
    """It knows the epilogues that are written in C++."""
    epilogue = problem.arguments.epilogue
    return None if epilogue in _EPILOGUES else f"has no epilogue {epilogue.name.lower()!r}"


def plan(a: Contrast, needs: Sequence[bool]) -> Plan:
    """The gradients of x and scale need the mean, that of columns the weights, of as many as the budget allows."""
    of_x, of_y, of_scale, of_bias, _ = needs
    blocks = _blocks(a.x.shape[0], a.y.shape[0], a.x.dtype) if of_y or of_bias else 0
    return Plan(of_x or of_scale, blocks)


def _blocks(rows: int, columns: int, dtype: torch.dtype) -> int:
    assert module is not None
    return module.contrast_saved_blocks(rows, columns, accumulation_dtype(dtype).itemsize, budget.memory_budget())


def saved_size(a: Contrast, plan: Plan) -> int:
    """Values that a forward hands to its backward; see ``csrc/contrast/cpu.h``."""
    assert module is not None
    return module.contrast_saved_size(a.x.shape[0], a.y.shape[0], a.x.shape[1], *plan)


def recover_plan(a: Contrast, needs: Sequence[bool], size: int) -> Plan:
    """The plan by which a forward saved so many values; one that saved another number where there is none."""
    found = Plan(needs[0] or needs[2], 0)
    while saved_size(a, found) < size:
        larger = found._replace(saved_blocks=found.saved_blocks + 1)
        if saved_size(a, larger) <= saved_size(a, found):
            break
        found = larger
    return found


@functools.lru_cache(maxsize=256)
def _psi(angle_rad: float, beyond_pi: BeyondPi, straight_through: bool) -> Any:
    assert module is not None
    return module.Psi(*pieces(angle_rad, beyond_pi), straight_through)


def _inputs(a: Contrast, dtype: torch.dtype) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The arguments that both directions have in common, and the tensors whose memory they are."""
    device = a.x.device
    scale = vector(a.scale) if isinstance(a.scale, Tensor) else constant(a.scale, dtype, device)
    margin = vector(a.margin) if isinstance(a.margin, Tensor) else constant(a.margin, dtype, device)
    tensors = (*map(int64, a[2:6]), scale, vector(a.bias), margin)
    target, row_labels, column_labels, self_index, scale, bias, margin = tensors
    arguments = (
        matrix(a.x),
        matrix(a.y),
        target.data_ptr(),
        pointer(row_labels),
        pointer(column_labels),
        pointer(self_index),
        scale.data_ptr(),
        scale.dim() > 0,
        pointer(bias),
        margin.data_ptr(),
        margin.dim() > 0,
        a.similarity,
        a.relation,
        a.ignore_index,
        a.epilogue,
        _psi(a.angle_rad, a.beyond_pi, a.straight_through),
        a.reduction,
        force_running_maximum,
    )
    return arguments, tensors


def forward(a: Contrast, plan: Plan) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """positive and negative_lse (B,), or the loss; and what the backward needs; the accumulation dtype throughout."""
    assert module is not None
    rows, dtype = a.x.shape[0], accumulation_dtype(a.x.dtype)
    positive = negative_lse = loss = None
    if a.epilogue == Epilogue.NONE:
        positive, negative_lse = torch.empty(rows, dtype=dtype), torch.empty(rows, dtype=dtype)
    else:
        loss = torch.empty((rows,) if a.reduction == Reduction.NONE else (), dtype=dtype)
    saved = workspace(saved_size(a, plan), dtype)
    arguments, alive = _inputs(a, dtype)
    outputs = (pointer(positive), pointer(negative_lse), pointer(loss), saved.data_ptr())
    call(module.contrast_forward, *arguments, *plan, *outputs)
    del alive
    return positive, negative_lse, loss, saved


def backward(
    grads: Sequence[Tensor | None], a: Contrast, saved: Tensor, plan: Plan, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of x, y, scale, bias and margin, of those that are needed."""
    assert module is not None
    variables = (a.x, a.y, a.scale, a.bias, a.margin)
    gradients = [
        torch.empty(t.shape, dtype=t.dtype) if need and isinstance(t, Tensor) else None
        for t, need in zip(variables, needs)
    ]
    arguments, alive = _inputs(a, saved.dtype)
    outputs = [pointer(t) for t in gradients]
    call(module.contrast_backward, *map(pointer, grads), *arguments, *plan, saved.data_ptr(), *outputs)
    del alive
    return gradients


def describe(problem: Problem) -> str:
    """What the memory budget makes of the problem."""
    assert module is not None
    if not problem.columns:
        return "saves nothing"
    sizes = problem.rows, problem.columns
    blocks, everything = _blocks(*sizes, problem.dtype), module.contrast_saved_blocks(*sizes, 1, 2**62)
    values = module.contrast_saved_size(*sizes, problem.width, True, blocks)
    return budget.describe(values * accumulation_dtype(problem.dtype).itemsize, blocks / everything)
