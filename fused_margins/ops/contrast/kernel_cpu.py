"""`contrast` in C++ on a CPU (csrc/contrast/cpu.cpp): the tensors' memory, handed over."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...backends import budget
from ...backends.cpu import call, empty_like, int64, module, row_factor, vector, workspace
from ...backends.registry import MaybeTensors, Problem
from ...core.enums import Reduction
from ...core.margins import pieces
from ...core.similarity import accumulation_dtype
from .epilogues import Epilogue
from .op import Contrast

_MOST_COLUMNS = 192  # of a group: a block of many columns, csrc/contrast/cpu.h
_EPILOGUES = (Epilogue.NONE, Epilogue.MARGIN_SOFTMAX, Epilogue.INFO_NCE)
force_running_maximum = False  # a test may ask for the path that no logit overflows


class Plan(NamedTuple):
    """What a forward saves, and what C++ takes beside tensors."""

    with_mean: bool  # the columns' mean under each row's weights
    saved_blocks: int  # blocks of columns whose weights are saved
    saved_size: int
    dtype: torch.dtype
    of_loss: tuple[int, ...]  # the shape of it
    rest: tuple[Any, ...] | None  # all that follows the targets, where no tensor of the call is among it
    options: tuple[Any, ...]


def can_run(problem: Problem) -> str | None:
    """It knows the epilogues that are written in C++, and a group fits a block of columns."""
    a = problem.arguments
    if a.group_size > _MOST_COLUMNS:
        return f"takes groups of up to {_MOST_COLUMNS} columns, got {a.group_size}"
    return None if a.epilogue in _EPILOGUES else f"has no epilogue {a.epilogue.name.lower()!r}"


def plan(a: Contrast, needs: Sequence[bool]) -> Plan:
    """The gradients of x and scale need the mean, that of columns the weights, of as many as the budget allows."""
    of_x, of_y, of_scale, of_bias, _ = needs
    blocks = _blocks(a.x.shape[0], a.y.shape[0], a.group_size, a.x.dtype) if of_y or of_bias else 0
    return _plan(a, of_x or of_scale, blocks)


def _plan(a: Contrast, with_mean: bool, blocks: int) -> Plan:
    psi = module.Psi(*pieces(a.angle_rad, a.beyond_pi), a.straight_through)
    epilogue = (a.epilogue, psi, a.smoothing, a.reduction)
    of_columns = (a.similarity, a.relation, a.ignore_index, a.group_size)
    options = (*of_columns, *epilogue, force_running_maximum, with_mean, blocks)
    size = module.contrast_saved_size(*a.x.shape[:1], *a.y.shape, a.group_size, with_mean, blocks)
    dtype = accumulation_dtype(a.x.dtype)
    numbers = not any(isinstance(value, Tensor) for value in a[3:])
    of_loss = a.x.shape[:1] if a.reduction == Reduction.NONE else ()
    return Plan(with_mean, blocks, size, dtype, of_loss, _rest(a, dtype, options) if numbers else None, options)


def _blocks(rows: int, columns: int, group_size: int, dtype: torch.dtype) -> int:
    value_bytes = accumulation_dtype(dtype).itemsize
    return module.contrast_saved_blocks(rows, columns, group_size, value_bytes, budget.memory_budget())


def saved_size(a: Contrast, plan: Plan) -> int:
    """Values that a forward hands to its backward; see ``csrc/contrast/cpu.h``."""
    return plan.saved_size


def recover_plan(a: Contrast, needs: Sequence[bool], size: int) -> Plan:
    """The plan by which a forward saved so many values; one that saves another number where there is none."""
    found = _plan(a, needs[0] or needs[2], 0)
    while found.saved_size < size:
        larger = _plan(a, found.with_mean, found.saved_blocks + 1)
        if larger.saved_size <= found.saved_size:
            break
        found = larger
    return found


def _rest(a: Contrast, dtype: torch.dtype, options: tuple[Any, ...]) -> tuple[Any, ...]:
    """What C++ takes behind the targets: labels, factors and options."""
    scale, margin = row_factor(a.scale, dtype, a.x.device), row_factor(a.margin, dtype, a.x.device)
    labels = int64(a.row_labels), int64(a.column_labels), int64(a.self_index)
    return *labels, scale, scale.dim() > 0, vector(a.bias), margin, margin.dim() > 0, *options


def forward(a: Contrast, plan: Plan) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """positive and negative_lse (B,), or the loss; and what the backward needs; the accumulation dtype throughout."""
    rows, dtype = a.x.shape[0], plan.dtype
    saved = workspace(plan.saved_size, dtype)
    positive = negative_lse = loss = None
    if a.epilogue == Epilogue.NONE:
        positive, negative_lse = torch.empty(rows, dtype=dtype), torch.empty(rows, dtype=dtype)
    else:
        loss = torch.empty(plan.of_loss, dtype=dtype)
    inputs = a.x, a.y, int64(a.target), *(plan.rest or _rest(a, plan.dtype, plan.options))
    call(module.contrast_forward, *inputs, positive, negative_lse, loss, saved)
    return positive, negative_lse, loss, saved


def backward(grads: MaybeTensors, a: Contrast, saved: Tensor, plan: Plan, needs: Sequence[bool]) -> list[Tensor | None]:
    """Gradients of x, y, scale, bias and margin, of those that are needed."""
    of_x, of_y, of_scale, of_bias, of_margin = needs
    gradients = [
        empty_like(a.x) if of_x else None,
        empty_like(a.y) if of_y else None,
        empty_like(a.scale) if of_scale else None,
        empty_like(a.bias) if of_bias else None,
        empty_like(a.margin) if of_margin else None,
    ]
    inputs = a.x, a.y, int64(a.target), *(plan.rest or _rest(a, plan.dtype, plan.options))
    call(module.contrast_backward, *grads, *inputs, saved, *gradients)
    return gradients


def describe(problem: Problem) -> str:
    """What the memory budget makes of the problem."""
    if not problem.columns:
        return "saves nothing"
    sizes, group_size = (problem.rows, problem.columns), problem.arguments.group_size
    blocks = _blocks(*sizes, group_size, problem.dtype)
    everything = module.contrast_saved_blocks(*sizes, group_size, 1, 2**62)
    values = module.contrast_saved_size(*sizes, problem.width, group_size, True, blocks)
    return budget.describe(values * accumulation_dtype(problem.dtype).itemsize, blocks / everything)
