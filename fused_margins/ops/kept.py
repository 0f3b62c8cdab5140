"""What a forward keeps for its backward: softmax weights of as many columns as the memory budget allows.

Each backend has a layout of its own. "cpu" is that of ``csrc/contrast/cpu.h``: factors of rows and columns, shifts of
all blocks, weights of the first ones. "triton" keeps similarities, of the first blocks; "cuda" those of all columns,
its problems are small. Sizes count values of the accumulation dtype.
"""

import torch
from torch import Tensor

from . import native, registry
from .similarity import accumulation_dtype

BLOCK, SPARE_ROWS = 192, 4  # cpu: columns of a block, and rows of weights beside them
TRITON_BLOCK = 128  # triton: columns of a block, and of a tile
REUSED_BYTES = 2**20  # cpu: less than that torch's allocator finds again by itself


def _row_size(rows: int) -> int:
    """Values in a row of weights: the rows of x, rounded up to an odd number of cache lines."""
    return 16 * ((rows + 15) // 16 // 2 * 2 + 1)


def _blocks(columns: int, block: int = BLOCK) -> int:
    return (columns + block - 1) // block


def kept_size(rows: int, columns: int, kept_blocks: int, backend: str = "cpu") -> int:
    """Values in what the forward keeps of the weights of the first `kept_blocks` blocks."""
    if backend == "triton":
        return rows * TRITON_BLOCK * kept_blocks
    if backend == "cuda":
        return rows * columns + 1  # and the divisor of the sum of losses
    weights = min(columns, BLOCK * kept_blocks) + SPARE_ROWS * kept_blocks
    return (1 + _blocks(columns) + weights) * _row_size(rows) + (columns + 15) // 16 * 16


def mean_size(rows: int, width: int, columns: int = 0, backend: str = "cpu") -> int:
    """Values that the forward hands over beside them.

    cpu: the columns' sums under the weights of each row, padded, and two numbers for each row. triton: factor,
    target and own column of each row, factor of each column. cuda: a number for each row and column, and the centre.
    """
    if backend == "triton":
        return 3 * ((rows + 3) // 4 * 4) + (columns + 3) // 4 * 4
    if backend != "cpu":
        return (rows + 3) // 4 * 4 + (columns + 3) // 4 * 4 + (width + 3) // 4 * 4
    return (rows + 3) // 4 * 4 * ((width + 15) // 16 * 16) + 2 * rows


def saved_size(
    rows: int,
    columns: int,
    width: int,
    with_mean: bool,
    kept_blocks: int,
    backend: str = "cpu",
) -> int:
    """Values that the forward of a loss hands to its backward: the above, positive and negative_lse."""
    mean = mean_size(rows, width, columns, backend) if with_mean or backend != "cpu" else 0
    of_rows = 2 * ((rows + 3) // 4 * 4) + 4 if backend == "triton" else 2 * rows  # aligned; how many rows count
    return kept_size(rows, columns, kept_blocks, backend) + mean + of_rows


def empty(count: int, dtype: torch.dtype) -> Tensor:
    """Memory on the CPU for what a forward keeps; when the last tensor in it is gone, the next forward gets it."""
    assert native.module is not None
    num_bytes = count * dtype.itemsize
    if num_bytes < REUSED_BYTES:
        return torch.empty(count, dtype=dtype, device="cpu")
    workspace = native.module.Workspace(num_bytes, registry.reused_bytes())
    return torch.frombuffer(workspace, dtype=dtype, count=count)


def kept_blocks(problem: registry.Problem, backend: str = "cpu", of_columns: bool = True) -> int:
    """Blocks of columns whose weights the memory budget lets the forward keep.

    `of_columns`: whether a gradient of columns is wanted, which alone needs weights on the CPU.
    """
    if backend == "cpu" and not of_columns:
        return 0
    itemsize = accumulation_dtype(problem.dtype).itemsize
    if backend == "triton":
        if problem.dtype.itemsize == 2:
            return 0  # by their bytes, to write and read them takes about as long as the matrix unit to make them again
        block_bytes = max(1, problem.rows * TRITON_BLOCK * itemsize)
        return min(_blocks(problem.columns, TRITON_BLOCK), registry.memory_budget() // block_bytes)
    if backend == "cuda":
        return 0
    block = min(BLOCK, problem.columns) + SPARE_ROWS
    block_bytes = block * _row_size(problem.rows) * itemsize
    return min(_blocks(problem.columns), registry.memory_budget() // block_bytes)


def describe(problem: registry.Problem, backend: str = "cpu") -> str:
    """What the memory budget makes of the problem."""
    blocks = kept_blocks(problem, backend)
    share = (
        min(1.0, blocks * (BLOCK if backend == "cpu" else TRITON_BLOCK) / problem.columns) if problem.columns else 1.0
    )
    size = saved_size(problem.rows, problem.columns, problem.width, True, blocks, backend)
    mebibytes = size * accumulation_dtype(problem.dtype).itemsize / 2**20
    text = f"with gradients it keeps {mebibytes:.1f} MiB for the backward"
    if share < 1:
        text += f" and computes {1 - share:.0%} of the softmax weights again"
    return f"{text}: {4 - share:.2f} products"
