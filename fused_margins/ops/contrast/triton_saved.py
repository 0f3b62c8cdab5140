"""What a forward of `contrast` in Triton saves for its backward: parts of one buffer, and how many blocks of columns.

Of float32 and float64 the similarities, within the memory budget, and of losses whose columns fit one tile, which every
program of the backward would make again. Of other bfloat16 cosines, where that is asked for, their exponentials, within
the budget for those (see ``triton_exponentials.py``); to write similarities of 16 bits and to read them again takes
about as long as the matrix unit takes to make them.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...backends import budget
from ...backends.triton.constants import BN
from ...backends.triton.gradients import CHUNK_BYTES
from ...backends.triton.launch import Part, cdiv
from ...core.enums import Reduction, Relation, Similarity
from ...core.similarity import accumulation_dtype
from .epilogues import Epilogue
from .op import Contrast

# exp(logit) stays below e^80 = 2^115.5 in a row's sum, and a positive's below 2^127: psi' is at most 2^11.5 in float32.
_LARGEST_LOG_SUM = 80.0
_LARGEST_SCALE = 70.0  # sums of exponentials from e^-s to e^s have room in one product: see triton_exponentials.py
most_columns = BN  # of ``triton_few.py``; a test may ask for the path of more columns
# There, whose programs for the gradient of y have all rows each. Chosen without a GPU.
_MOST_ROWS = 8192


class Saved(NamedTuple):
    """Parts of the buffer, each of which begins at 16 bytes; one of rows or columns has room for a multiple of four."""

    similarities: Part  # of the first blocks of columns, block by block; or
    exponentials: Part | None  # (B, kept columns) bfloat16, of those columns, and of these
    units: Part | None  # the unit vectors, (kept columns, D) bfloat16
    x_factor: Part
    target: Part  # int32: a column, IGNORED, INVALID or ABSENT
    self_index: Part | None  # int32
    y_factor: Part
    negative_lse: Part
    positive: Part  # of an epilogue, as are the next; not where all columns fit one tile
    losses: Part  # where they are summed or averaged
    derivatives: Part  # (4, B): see `triton_epilogue.store_losses`
    counted: Part  # the number of rows that count in a mean


class Plan(NamedTuple):
    """What a forward saves, found out once for calls of the same sizes and options."""

    blocks: int  # of columns, of which there are similarities or exponentials
    size: int  # of the buffer, in numbers of the accumulation dtype
    # Of each part where it begins and its size in such numbers, its dtype, and where it begins in bytes.
    places: tuple[tuple[int, int, torch.dtype, int] | None, ...]
    few: dict[str, Any] | None  # the options of ``triton_few.py``, where the call goes by it


class Vectors(NamedTuple):
    """Gradients (B,) of both vectors, or where there is a loss those of each row's loss, and its own gradient."""

    of_negative_lse: Tensor | Part
    of_positive: Tensor | Part
    of_loss: Tensor | None


def is_plain(a: Contrast) -> bool:
    """Whether a row admits every column but its target, and the kernels hold little beside the similarities."""
    others = (a.bias, a.row_labels, a.column_labels, a.self_index)
    return a.relation == Relation.DIFFERENT and all(t is None for t in others)


def fits_one_tile(a: Contrast) -> bool:
    """Whether a call goes by ``triton_few.py``: a loss of targets alone. float16 would ask how large W is before it is
    made."""
    of_loss = a.epilogue != Epilogue.NONE and is_plain(a) and a.group_size == 1 and a.x.dtype != torch.float16
    most = most_columns // 2 if a.x.dtype == torch.float64 else most_columns  # whose tiles would leave the registers
    return of_loss and 0 < a.y.shape[0] <= most and 0 < a.x.shape[0] <= _MOST_ROWS and a.x.shape[1] > 0


def saves_similarities(a: Contrast) -> bool:
    """Whether what is saved is similarities, if anything is; else exponentials."""
    return a.x.dtype.itemsize > 2 or fits_one_tile(a)


def keeps_exponentials(a: Contrast, needs: Sequence[bool]) -> bool:
    """Whether exponentials of a call can be kept, none of which overflows whatever the rows are.

    Without an epilogue the two parts of a positive's derivative would be rounded apart where it is admitted, too.
    """
    if a.epilogue == Epilogue.NONE and not is_plain(a):
        return False
    simple = a.similarity == Similarity.COSINE and a.bias is None and a.group_size == 1
    if a.x.dtype != torch.bfloat16 or not simple or isinstance(a.scale, Tensor) or not any(needs[:2]):
        return False
    if a.smoothing:  # whose part is no multiple of an exponential
        return False
    if min(a.x.shape) == 0 or a.y.shape[0] == 0 or a.scale > _LARGEST_SCALE:
        return False
    return a.scale + math.log(a.y.shape[0]) < _LARGEST_LOG_SUM


def most_blocks(a: Contrast, needs: Sequence[bool]) -> int:
    """As many blocks of columns as the budget allows."""
    if not any(needs[:4]):  # the gradient of a margin needs none
        return 0
    (rows, width), itemsize = a.x.shape, a.x.dtype.itemsize
    if saves_similarities(a):
        most, block_bytes = budget.memory_budget(), rows * BN * accumulation_dtype(a.x.dtype).itemsize
    else:
        most, block_bytes = budget.exponential_budget(a.x.device), (rows + width) * BN * itemsize
        if not most or not keeps_exponentials(a, needs):
            return 0
    return min(cdiv(a.y.shape[0], BN), most // max(1, block_bytes))


def plan(a: Contrast, blocks: int, few: dict[str, Any] | None) -> Plan:
    """Of so many blocks of columns, and with these options of ``triton_few.py``."""
    first, places, dtype = 0, list[tuple[int, int, torch.dtype, int] | None](), accumulation_dtype(a.x.dtype)
    for name, size in zip(Saved._fields, _sizes(a, blocks)):
        there = size > 0 or name not in ("exponentials", "units", "self_index")
        places.append((first, size, _DTYPES.get(name, dtype), first * dtype.itemsize) if there else None)
        first += size
    return Plan(blocks, first, tuple(places), few)


def _sizes(a: Contrast, blocks: int) -> tuple[int, ...]:
    rows, width = a.x.shape
    of_rows, of_columns = (cdiv(t.shape[0], 4) * 4 for t in (a.x, a.y))
    of_blocks = (0, rows * BN * blocks // 2, width * BN * blocks // 2)
    if saves_similarities(a):
        of_blocks = rows * BN * blocks, 0, 0
    of_epilogue = 0, 0, 0, 0
    if a.epilogue != Epilogue.NONE:
        positive = 0 if fits_one_tile(a) else of_rows
        of_epilogue = positive, 0 if a.reduction == Reduction.NONE else of_rows, 4 * of_rows, 4
    of_self = 0 if a.self_index is None else of_rows
    return *of_blocks, of_rows, of_rows, of_self, of_columns, of_rows, *of_epilogue


def blocks_of(a: Contrast, size_of_buffer: int) -> int:
    """The blocks by which a buffer has its size; another number where there are none."""
    of_none = sum(_sizes(a, 0))
    return min(cdiv(a.y.shape[0], BN), max(0, size_of_buffer - of_none) // max(1, sum(_sizes(a, 1)) - of_none))


_DTYPES = {"exponentials": torch.bfloat16, "units": torch.bfloat16, "target": torch.int32, "self_index": torch.int32}


def parts(saved: Tensor, plan: Plan) -> Saved:
    address = saved.data_ptr()
    return Saved(*[place and Part(saved, *place[:3], address + place[3]) for place in plan.places])  # type: ignore[arg-type]


def describe(a: Contrast, plan: Plan) -> str:
    """What the budgets make of a call."""
    blocks, (columns, width) = plan.blocks, a.y.shape
    num_bytes = plan.size * accumulation_dtype(a.x.dtype).itemsize
    share = min(1.0, blocks * BN / columns) if columns else 1.0
    if not blocks or saves_similarities(a):
        return budget.describe(num_bytes, share)
    rows = a.x.shape[0]
    for_a_while = columns_at_once(width, blocks * BN) * width * 4 + rows * width * 6  # float32 of both, c a
    return (
        f"it keeps exponentials of {share:.0%} of the columns, {num_bytes / 2**20:.1f} MiB, which with gradients take "
        f"another {for_a_while / 2**20:.1f} MiB while the backward runs: {4 - share:.2f} products"
    )


def columns_at_once(width: int, columns: int) -> int:
    """Of which the gradients are in memory in float32, between their product and what finishes them."""
    return min(columns, max(1, CHUNK_BYTES // (4 * width * BN)) * BN)
