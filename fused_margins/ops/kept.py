"""What a forward keeps for its backward: softmax weights of as many columns as the memory budget allows.

The layout is that of ``csrc/contrast/cpu.h``: factors of rows and columns, shifts of all blocks, weights
of the first ones.
"""

from . import registry
from .similarity import accumulation_dtype

BLOCK, SPARE_ROWS = 192, 4  # columns of a block, and rows of weights beside them


def _row_size(rows: int) -> int:
    """Values in a row of weights: the rows of x, rounded up to an odd number of cache lines."""
    return 16 * ((rows + 15) // 16 // 2 * 2 + 1)


def _blocks(columns: int) -> int:
    return (columns + BLOCK - 1) // BLOCK


def kept_size(rows: int, columns: int, kept_blocks: int) -> int:
    """Values in the factors of rows and columns, all shifts, and the weights of the first `kept_blocks` blocks."""
    weights = min(columns, BLOCK * kept_blocks) + SPARE_ROWS * kept_blocks
    return (1 + _blocks(columns) + weights) * _row_size(rows) + (columns + 15) // 16 * 16


def mean_size(rows: int, width: int) -> int:
    """Values in the columns' sums under the weights of each row, padded, and two numbers for each row."""
    return (rows + 3) // 4 * 4 * ((width + 15) // 16 * 16) + 2 * rows


def saved_size(rows: int, columns: int, width: int, with_mean: bool, kept_blocks: int) -> int:
    """Values that the forward of a loss hands to its backward: the above, positive and negative_lse."""
    return kept_size(rows, columns, kept_blocks) + (mean_size(rows, width) if with_mean else 0) + 2 * rows


def kept_blocks(problem: registry.Problem) -> int:
    """Blocks of columns whose weights the memory budget lets the forward keep."""
    block = min(BLOCK, problem.columns) + SPARE_ROWS
    block_bytes = block * _row_size(problem.rows) * accumulation_dtype(problem.dtype).itemsize
    return min(_blocks(problem.columns), registry.memory_budget() // block_bytes)


def describe(problem: registry.Problem) -> str:
    """What the memory budget makes of the problem."""
    blocks = kept_blocks(problem)
    share = min(1.0, blocks * BLOCK / problem.columns) if problem.columns else 1.0
    mebibytes = kept_size(problem.rows, problem.columns, blocks) * accumulation_dtype(problem.dtype).itemsize / 2**20
    text = f"with gradients it keeps {mebibytes:.1f} MiB of softmax weights"
    if share < 1:
        text += f" and computes {1 - share:.0%} of them again"
    return f"{text}: {4 - share:.2f} products"
