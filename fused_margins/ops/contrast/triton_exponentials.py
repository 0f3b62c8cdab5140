"""Both gradients of bfloat16 cosines from exponentials that the forward of `contrast` kept, in Triton and cuBLAS.

Cosines are bounded, so that no exponential needs a shift: E_ij = exp(s u_ij) where the row admits the column, 0
elsewhere and in rows without a gradient, rounded to bfloat16 once its row's sum S_i was taken in float32. With unit
vectors a_i = x_i / |x_i|, b_j = y_j / |y_j| and g_i the gradient of the row's log-sum-exp

    c_i = g_i s / S_i        dL/da_i = c_i (E b)_i        dL/db_j = (E^T (c a))_j

two plain products, which with the forward's make three. The positive's entry holds what makes its derivative one more
of these: an epilogue has g_i = p_i dL/dloss_i, and its forward adds -S_i psi'(u_i) there. Without one, h_i b_target
and, summed by target in a fixed order, h_i a_i are added. Then the part along each vector is taken out, in float32:

    dL/dx_i = (dL/da_i - a_i <a_i, dL/da_i>) / |x_i|      and likewise for y_j

What is left of a gradient that is nearly all along its vector, as that of rows in a narrow cone, is the rounding of
that part. Where only some columns are kept, grad_x is rounded twice: as the sum over the others, and in the end.

c_i spans e^(2 s), 2^202 at s = 70, the largest scale that is taken. c a is an operand of 16 bits with float32's
exponents: a power of two brings the largest c_i to 2^110, so that the smallest keep all their digits (and rows that
are certain down to p = 2^-30 theirs), and no product beyond 2^122; it is taken back from the finished gradients.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...backends.cpu import row_factor
from ...backends.triton import launch
from ...backends.triton.constants import IGNORED, INVALID
from ...backends.triton.launch import cdiv
from ...backends.triton.tiles import block_offsets, numbers, store_units, vector_block, vectors
from .op import Contrast
from .triton_epilogue import of_losses
from .triton_kernels import LOG2E
from .triton_saved import Saved, Vectors, columns_at_once

FAR = tl.constexpr(110)  # two to this power is the most that c, and s g, are lifted to


@triton.jit
def _of_lse(grad_loss, counted, grad_negative_lse, i, REDUCTION: tl.constexpr):
    """The gradient of each row's log-sum-exp, that of its loss where there is one: (BLOCK,) or one for all."""
    if grad_loss is None:
        return tl.load(grad_negative_lse + i)
    else:
        return of_losses(grad_loss, counted, i, REDUCTION)


@triton.jit
def _scale_rows(
    x, x_factor, negative_lse, scale, row_target, counted, grad_loss, grad_negative_lse, factors, lift, scaled,
    rows, width, x_row, x_column, BLOCK: tl.constexpr, BK: tl.constexpr, SCAN: tl.constexpr, REDUCTION: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """c_i / lift, and the rows c_i a_i / lift; and the power of two by which they were lifted."""
    s = tl.log2(tl.load(scale))
    most = tl.full((SCAN,), float("-inf"), DTYPE)
    for block in range(tl.cdiv(rows, SCAN)):
        _, i = block_offsets(block, SCAN, rows)
        # Of s |g|, and of s |g| / S: rows without a gradient, and what is not finite, lift nothing.
        of_loss = s + tl.log2(tl.abs(_of_lse(grad_loss, counted, grad_negative_lse, i, REDUCTION)))
        exponent = tl.maximum(of_loss, of_loss - tl.load(negative_lse + i) * LOG2E)
        most = tl.maximum(most, tl.where(tl.abs(exponent) < float("inf"), exponent, float("-inf")))
    down = tl.max(most, 0)
    down = tl.maximum(tl.ceil(down) - FAR, -100.0)  # whose power of two float32 still holds
    at, i = block_offsets(tl.program_id(0), BLOCK, rows)
    lse, own = tl.load(negative_lse + i), tl.load(row_target + i)
    g = _of_lse(grad_loss, counted, grad_negative_lse, i, REDUCTION)
    if grad_loss is not None:
        g *= tl.load(grad_negative_lse + i)  # of each loss
    nothing = (lse == float("-inf")) | (own == IGNORED) | (own == INVALID)
    c = tl.where(nothing, 0.0, g * tl.exp2(s - lse * LOG2E - down))
    tl.store(factors + at, c, mask=at < rows)
    tl.store(lift, tl.exp2(down))
    store_units(x, tl.load(x_factor + i), c, scaled, at, i, rows, width, x_row, x_column, BLOCK, BK, DTYPE)


@triton.jit
def _add_positives(
    of_units, x, x_factor, grad_positive, row_target, order, lift, rows, width, x_row, x_column, first, count,
    BK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Sums of h_i a_i over the rows of each target, in their order, to dL/db of columns first ... first + count - 1.

    order (B,): the rows sorted by their targets. The program of a target's first row adds up all of them.
    """
    n = tl.program_id(0)
    own = tl.load(row_target + tl.load(order + n))
    begins = (own >= first) & (own < first + count)
    if n > 0:
        begins = begins & (tl.load(row_target + tl.load(order + tl.maximum(n - 1, 0))) != own)
    if begins:
        k = tl.program_id(1) * BK + tl.arange(0, BK)
        total = tl.zeros((BK,), DTYPE)
        same = True
        while same:
            i = tl.load(order + n)
            v = tl.load(x + i * x_row + k.to(tl.int64) * x_column, mask=k < width, other=0.0).to(DTYPE)
            total += v * (tl.load(x_factor + i) * tl.load(grad_positive + i))
            n += 1
            same = n < rows
            if same:
                same = tl.load(row_target + tl.load(order + n)) == own
        to = of_units + (own - first).to(tl.int64) * width + k
        tl.store(to, tl.load(to, mask=k < width, other=0.0) + total / tl.load(lift), mask=k < width)


@triton.jit
def _of_unit(of_units, at, by, again, units, positive, own, start, width, BK: tl.constexpr, DTYPE: tl.constexpr):
    """dL/da of rows `at` of a product, entries start ... start + BK: times `by` (BLOCK,), and then `again`; and where
    there is one, that of the positive."""
    d = start + tl.arange(0, BK)[None, :]
    v = tl.load(of_units + at[:, None] * width + d, mask=d < width, other=0.0) * by[:, None] * again
    if positive is not None:
        unit = tl.load(units + own[:, None] * width + d, mask=(own >= 0)[:, None] & (d < width), other=0.0).to(DTYPE)
        v += positive[:, None] * unit
    return v


@triton.jit
def _store_gradients(
    of_units, at, by, again, units, positive, own, a, i, factor, to, inside, width, row, column,
    BLOCK: tl.constexpr, BK: tl.constexpr, ADD: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Those of the vectors i of a: what `_of_unit` gives without the part along each, by its length."""
    along = tl.zeros((BLOCK, BK), DTYPE)
    for start in range(0, width, BK):
        v = _of_unit(of_units, at, by, again, units, positive, own, start, width, BK, DTYPE)
        along += v * vectors(a, i, start, width, row, column, BK, DTYPE) * factor[:, None]
    multiple = tl.sum(along, 1)
    for start in range(0, width, BK):
        v = _of_unit(of_units, at, by, again, units, positive, own, start, width, BK, DTYPE)
        unit = vectors(a, i, start, width, row, column, BK, DTYPE) * factor[:, None]
        gradient = (v - unit * multiple[:, None]) * factor[:, None]
        d = start + tl.arange(0, BK)[None, :]
        mask = inside[:, None] & (d < width)
        if ADD:
            gradient += tl.load(to + i[:, None] * width + d, mask=mask, other=0.0).to(DTYPE)
        tl.store(to + i[:, None] * width + d, gradient.to(to.dtype.element_ty), mask=mask)


@triton.jit
def _finish(
    of_rows, factors, units, grad_positive, row_target, x, x_factor, grad_x, of_columns, y, y_factor, grad_y, lift,
    row_blocks, rows, width, kept, first, count, x_row, x_column, y_row, y_column,
    BLOCK: tl.constexpr, BK: tl.constexpr, ADD: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Gradients of the rows by the first programs, of columns first ... first + count - 1 by the others."""
    block, again = tl.program_id(0), tl.load(lift)
    if block < row_blocks:
        if of_rows is not None:
            at, i = block_offsets(block, BLOCK, rows)
            own = tl.load(row_target + i)
            own = tl.where(own < kept, own, -1).to(tl.int64)
            h = None
            if grad_positive is not None:
                h = tl.where(own >= 0, tl.load(grad_positive + i), 0.0)
            _store_gradients(
                of_rows, i, tl.load(factors + i), again, units, h, own, x, i, tl.load(x_factor + i), grad_x, at < rows,
                width, x_row, x_column, BLOCK, BK, ADD, DTYPE,
            )  # fmt: skip
    else:
        if of_columns is not None:
            at, here = block_offsets(block - row_blocks, BLOCK, count)
            j = first + here
            by = tl.full((BLOCK,), 1.0, DTYPE)
            _store_gradients(
                of_columns, here, by, again, None, None, here, y, j, tl.load(y_factor + j), grad_y, at < count,
                width, y_row, y_column, BLOCK, BK, False, DTYPE,
            )  # fmt: skip


_one_at_a_time = threading.Lock()  # the settings are those of the process, and each device has a thread of its own


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b of bfloat16 matrices, added up and returned in float32, whatever torch's own may round on the way."""
    if a.device.type == "cpu":
        return a.float() @ b.float()
    with _one_at_a_time:
        return _product(a, b)


def _product(a: Tensor, b: Tensor) -> Tensor:
    settings = torch.backends.cuda.matmul
    # A flag alone would set the one beside it, too, which torch has from 2.9 on.
    splits = getattr(settings, "allow_bf16_reduced_precision_reduction_split_k", None)
    before = settings.allow_bf16_reduced_precision_reduction
    settings.allow_bf16_reduced_precision_reduction = False if splits is None else (False, splits)  # type: ignore[assignment]
    try:
        return torch.mm(a, b, out_dtype=torch.float32)
    finally:
        settings.allow_bf16_reduced_precision_reduction = before if splits is None else (before, splits)  # type: ignore[assignment]


def add_gradients(
    others: Sequence[Tensor | None], vectors: Vectors, a: Contrast, parts: Saved, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of x and y, those that are needed, from the columns that were kept.

    others: those from the other columns, to which x's are added, and of which the kept columns of y's are filled; None
    where all columns were kept.
    """
    x, y, (rows, width) = a.x, a.y, a.x.shape
    assert parts.exponentials is not None
    assert parts.units is not None
    exponentials, units = parts.exponentials.tensor().view(rows, -1), parts.units.tensor().view(-1, width)
    kept = min(exponentials.shape[1], y.shape[0])
    exponentials, units = exponentials[:, :kept], units[:kept]
    of_x, of_y = needs
    grad_x, grad_y = (
        t if t is not None else torch.empty_like(v, memory_format=torch.contiguous_format) if need else None
        for t, v, need in zip(others, (x, y), needs)
    )
    grad_negative_lse, grad_positive, grad_loss = vectors
    if grad_loss is not None:
        grad_positive = None  # type: ignore[assignment] # is among the exponentials
    factors = x.new_empty(rows + 1, dtype=torch.float32)
    lift, scaled = factors[rows:], x.new_empty(rows, width)
    scale = row_factor(a.scale, factors.dtype, x.device)
    depth, dtype = vector_block(width), numbers(x.dtype)
    with launch.on(x):
        launch.launch(
            _scale_rows, (cdiv(rows, 4),),
            x, parts.x_factor, parts.negative_lse, scale, parts.target, parts.counted, grad_loss, grad_negative_lse,
            factors, lift, scaled, rows, width, *x.stride(), BLOCK=4, BK=depth, SCAN=1024,
            REDUCTION=int(a.reduction), DTYPE=dtype, num_warps=4,
        )  # fmt: skip
        of_rows = product(exponentials, units) if of_x else None
        order = torch.argsort(parts.target.tensor()[:rows], stable=True) if of_y and grad_positive is not None else None
        most = columns_at_once(width, kept) if of_y else kept
        for first in range(0, kept, most):
            count = min(most, kept - first)
            of_columns = product(exponentials[:, first : first + count].T, scaled) if of_y else None
            if order is not None:
                launch.launch(
                    _add_positives, (rows, cdiv(width, depth)),
                    of_columns, x, parts.x_factor, grad_positive, parts.target, order, lift, rows, width, *x.stride(),
                    first, count, BK=depth, DTYPE=dtype, num_warps=4,
                )  # fmt: skip
            row_blocks = cdiv(rows, 4) if of_x and first == 0 else 0
            launch.launch(
                _finish, (row_blocks + (cdiv(count, 4) if of_y else 0),),
                of_rows, factors, units, grad_positive, parts.target, x, parts.x_factor, grad_x, of_columns, y,
                parts.y_factor, grad_y, lift, row_blocks, rows, width, kept, first, count, *x.stride(), *y.stride(),
                BLOCK=4, BK=depth, ADD=others[0] is not None, DTYPE=dtype, num_warps=4,
            )  # fmt: skip
    return [grad_x, grad_y]
