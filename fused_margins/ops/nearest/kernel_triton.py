"""`nearest` in Triton: each row's best columns stay in registers while tiles of similarities pass by.

The columns are split among programs (`search`), each keeps its K best in order; `merge` picks the best of all shares,
of equals the lowest column, and computes the chosen pairs once more, exactly. Where a batch is small a program has all
columns, and `search` does it all. One nearest column by Euclidean distance is found on the matrix units: `rank` orders
columns by <x, y> - |y|^2 / 2, and where a row's best two are nearer to each other than the roundings of products of
that length can move them, `compare` compares the distances themselves: of all rows where one column is very long or not
a number.
"""

from typing import Any

import torch
from torch import Tensor

from ...backends.cpu import int64, vector
from ...backends.registry import Problem
from ...backends.triton import launch
from ...backends.triton.constants import BN, MASKED, TMA, WHOLE
from ...backends.triton.launch import cdiv
from ...backends.triton.tiles import TILES, TMA_TILES, sides, store_factors, tile_options, vector_block
from ...core import indices
from ...core.enums import Relation, Similarity
from ...core.similarity import accumulation_dtype
from . import triton_kernels as kernels
from .op import Nearest

MOST_COLUMNS = 128  # of a row, that the registers hold
SHALLOW_DEPTH = 128  # up to which `rank` keeps rows in shared memory while all columns pass by
# Rows and columns of one launch, which takes them through fewer programs: four tiles each, and two launches less.
# Chosen without a GPU; a test may ask for another number.
most_alone = 512
COMPARE_ROWS = 64  # that a program of `compare` looks through


def can_run(problem: Problem) -> str | None:
    """It holds the k best columns of its rows in registers."""
    k = problem.arguments.k
    return None if k <= MOST_COLUMNS else f"k: expected at most {MOST_COLUMNS} with this backend, got {k}"


def forward(a: Nearest, plan: Any) -> tuple[Tensor, Tensor]:
    """similarity (B, k) in the accumulation dtype, index (B, k) int64."""
    x, y, k, similarity, self_index = a.x, a.y, a.k, a.similarity, a.self_index
    (rows, width), columns = x.shape, y.shape[0]
    euclidean = similarity == Similarity.NEGATIVE_SQUARED_EUCLIDEAN
    if self_index is not None and indices.raises_everywhere():
        self_index = indices.check_index(self_index, columns, indices.IGNORED, "self_index")
    dtype, device = accumulation_dtype(x.dtype), x.device
    best, index = x.new_empty((rows, k), dtype=dtype), x.new_empty((rows, k), dtype=torch.int64)
    if not rows:
        return best, index
    if not columns:
        best.fill_(-torch.inf)
        if self_index is not None:
            best = torch.where((self_index != -1)[:, None], torch.nan, best)
        return best, index.fill_(-1)
    row_labels, column_labels, own = (int64(t) for t in (a.row_labels, a.column_labels, self_index))
    below = vector(a.below)
    ranked = euclidean and k == 1 and a.largest and below is None and x.dtype != torch.float64 and width > 0
    alone = k == 1 and not ranked and max(rows, columns) <= most_alone
    with_tma = TMA_TILES if k == 1 and not alone else None
    options = tile_options(TILES, x, y, Similarity.DOT if ranked else similarity, with_tma)
    options["SIMILARITY"] = int(similarity)
    slots = 1 << (k - 1).bit_length()
    if slots > 1:  # the bests take registers, too
        options["BM"] = max(16, min(options["BM"], 1024 // slots))
    if ranked:
        options = _rank_options(x, options, masked=a.relation != Relation.ANY or own is not None)
    row_blocks, column_tiles = cdiv(rows, options["BM"]), cdiv(columns, options["BN"])
    search = (rows, columns, width, *x.stride(), *y.stride())
    if alone:
        with launch.on(x):
            launch.launch(
                kernels.search, (row_blocks, 1),
                x, y, None, None, row_labels, column_labels, own, below, None, None, best, index, *search, column_tiles,
                RELATION=int(a.relation), K=1, LARGEST=a.largest, **options,
            )  # fmt: skip
        return best, index
    each = cdiv(column_tiles * row_blocks, launch.num_persistent_programs(device))
    shares = cdiv(column_tiles, each)
    values = torch.empty(shares, rows, slots, dtype=dtype, device=device)
    found = torch.empty(shares, rows, slots, dtype=torch.int32, device=device)
    cosine = similarity == Similarity.COSINE
    of_x, of_y = (torch.empty(t.shape[0] if cosine else 0, dtype=dtype, device=device) for t in (x, y))
    seconds = largest_half_square = uncertain = None
    depth = vector_block(width)
    block = max(4, 2048 // max(depth, slots))
    with launch.on(x):
        if cosine:
            store_factors(x, y, of_x, of_y)
        if ranked:
            half_squares, open_half_squares = (torch.empty(columns, dtype=dtype, device=device) for _ in range(2))
            seconds = torch.empty_like(values)
            uncertain = torch.empty(rows, dtype=torch.int32, device=device)
            launch.launch(
                kernels.store_half_squares, (cdiv(columns, block),),
                y, column_labels, half_squares, open_half_squares, *y.shape, *y.stride(),
                BLOCK=block, BK=depth, DTYPE=options["DTYPE"], num_warps=4,
            )  # fmt: skip
            largest_half_square = half_squares.amax()
            launch.launch(
                kernels.rank, (row_blocks, shares),
                *sides(x, y, options), open_half_squares, row_labels, column_labels, own, values, found, seconds,
                *search, each, RELATION=int(a.relation), **options,
            )  # fmt: skip
        else:
            launch.launch(
                kernels.search, (row_blocks, shares),
                *sides(x, y, options), of_x, of_y, row_labels, column_labels, own, below, values, found, None, None,
                *search, each, RELATION=int(a.relation), K=slots, LARGEST=a.largest, **options,
            )  # fmt: skip
        launch.launch(
            kernels.merge, (cdiv(rows, block),),
            x, y, of_x, of_y, own, values, found, seconds, largest_half_square, best, index, uncertain, *search,
            shares, k, (width + 8) * torch.finfo(dtype).eps, BLOCK=block, BK=depth, K=slots,
            SIMILARITY=options["SIMILARITY"], NORMALIZE=options["NORMALIZE"], DTYPE=options["DTYPE"], num_warps=4,
        )  # fmt: skip
        if ranked:
            launch.launch(
                kernels.compare, (cdiv(rows, COMPARE_ROWS),),
                x, y, row_labels, column_labels, own, uncertain, best, index, *search,
                BLOCK=COMPARE_ROWS, BN=64, BK=vector_block(width, 128), RELATION=int(a.relation),
                DTYPE=options["DTYPE"], num_warps=8,
            )  # fmt: skip
    return best, index


def _rank_options(x: Tensor, options: dict[str, Any], masked: bool) -> dict[str, Any]:
    """For `rank`: tiles of half as many columns, as each entry of one keeps a best one; masks take registers, too."""
    depth = vector_block(x.shape[1], 1 << 30)
    shallow = x.dtype.itemsize == 2 and depth <= SHALLOW_DEPTH
    options = options | {"BN": BN // 2, "SHALLOW": shallow}
    if masked:
        options["num_warps"] = 8
    if options["PRECISION"] == "tf32":  # three products of parts: an order by one would say little
        options["PRECISION"] = "tf32x3"
    if shallow:
        options["BK"] = depth
        if options["LOADS"] != TMA.value:
            options["LOADS"] = (WHOLE if depth == x.shape[1] else MASKED).value
    return options
