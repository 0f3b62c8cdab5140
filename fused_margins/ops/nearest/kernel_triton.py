"""`nearest` in Triton: each row's best columns stay in registers while tiles of similarities pass by.

The columns are split among programs (`search`), each keeps its K best in order; `merge` picks the best of all shares,
of equals the lowest column, and computes the chosen pairs once more, exactly. One nearest column by Euclidean distance
is found on the matrix units: `rank` orders columns by <x, y> - |y|^2 / 2, and where a row's best two are nearer to
each other than the roundings of products of that length can move them, `compare` compares the distances themselves:
of all rows where one column is very long or not a number.
"""

from typing import Any

import torch
from torch import Tensor

from .. import crossovers, gpu, labels
from ..gpu import cdiv
from ..native import int64
from ..similarity import RELATIONS, SIMILARITIES, accumulation_dtype
from ..triton_tiles import (
    BN,
    DESCRIBED,
    DESCRIBED_TILES,
    MASKED,
    TILES,
    WHOLE,
    sides,
    store_factors,
    tile_options,
    vector_block,
)
from . import triton_kernels as kernels

SHALLOW_DEPTH = 128  # up to which `rank` keeps rows in shared memory while all columns pass by
COMPARE_ROWS = 64  # that a program of `compare` looks through


def forward(
    x: Tensor,
    y: Tensor,
    row_labels: Tensor,
    column_labels: Tensor,
    self_index: Tensor | None,
    below: Tensor | None,
    similarity: str,
    relation: str,
    k: int,
) -> tuple[Tensor, Tensor]:
    """similarity (B, k) in the accumulation dtype, index (B, k) int64."""
    if k > crossovers.NEIGHBOURS:
        raise ValueError(f"k: expected at most {crossovers.NEIGHBOURS} with this backend, got {k}")
    (rows, width), columns = x.shape, y.shape[0]
    euclidean = similarity == "negative_squared_euclidean"
    if self_index is not None and labels.raises_everywhere():
        self_index = labels.check_index(self_index, columns, labels.IGNORED, "self_index")
    dtype, device = accumulation_dtype(x.dtype), x.device
    best, index = (
        torch.empty(rows, k, dtype=dtype, device=device),
        torch.empty(rows, k, dtype=torch.int64, device=device),
    )
    if not rows:
        return best, index
    if not columns:
        best.fill_(-torch.inf)
        if self_index is not None:
            best = torch.where((self_index != -1)[:, None], torch.nan, best)
        return best, index.fill_(-1)
    row_ids, column_ids, own = (int64(t) for t in (row_labels, column_labels, self_index))
    below = None if below is None else below.contiguous()
    ranked = euclidean and k == 1 and below is None and x.dtype != torch.float64 and width > 0
    options = tile_options(TILES, x, y, "dot" if ranked else similarity, DESCRIBED_TILES if k == 1 else None)
    options["SIMILARITY"] = SIMILARITIES.index(similarity)
    slots = 1 << (k - 1).bit_length()
    if slots > 1:  # the bests take registers, too
        options["BM"] = max(16, min(options["BM"], 1024 // slots))
    if ranked:
        options = _rank_options(x, options, masked=relation != "any" or own is not None)
    row_blocks, column_tiles = cdiv(rows, options["BM"]), cdiv(columns, options["BN"])
    each = cdiv(column_tiles * row_blocks, gpu.programs(device))
    shares = cdiv(column_tiles, each)
    values = torch.empty(shares, rows, slots, dtype=dtype, device=device)
    indices = torch.empty(shares, rows, slots, dtype=torch.int32, device=device)
    of_x, of_y = (torch.empty(t.shape[0] if similarity == "cosine" else 0, dtype=dtype, device=device) for t in (x, y))
    seconds = largest = uncertain = None
    depth = vector_block(width)
    block = max(4, 2048 // max(depth, slots))
    with gpu.on(x):
        if similarity == "cosine":
            store_factors(x, of_x)
            store_factors(y, of_y)
        search = (rows, columns, width, *x.stride(), *y.stride())
        if ranked:
            half_squares, seconds = torch.empty(columns, dtype=dtype, device=device), torch.empty_like(values)
            uncertain = torch.empty(rows, dtype=torch.int32, device=device)
            gpu.launch(
                kernels.store_half_squares, (cdiv(columns, block),), y, half_squares, *y.shape, *y.stride(),
                BLOCK=block, BK=depth, DTYPE=options["DTYPE"], num_warps=4,
            )  # fmt: skip
            largest = half_squares.amax()
            gpu.launch(
                kernels.rank, (row_blocks, shares),
                *sides(x, y, options), half_squares, row_ids, column_ids, own, values, indices, seconds,
                *search, each, RELATION=RELATIONS.index(relation), **options,
            )  # fmt: skip
        else:
            gpu.launch(
                kernels.search, (row_blocks, shares),
                *sides(x, y, options), of_x, of_y, row_ids, column_ids, own, below, values, indices,
                *search, each, RELATION=RELATIONS.index(relation), K=slots, **options,
            )  # fmt: skip
        gpu.launch(
            kernels.merge, (cdiv(rows, block),),
            x, y, of_x, of_y, own, values, indices, seconds, largest, best, index, uncertain, *search,
            shares, k, (width + 8) * torch.finfo(dtype).eps, BLOCK=block, BK=depth, K=slots,
            SIMILARITY=options["SIMILARITY"], NORMALIZE=options["NORMALIZE"], DTYPE=options["DTYPE"], num_warps=4,
        )  # fmt: skip
        if ranked:
            gpu.launch(
                kernels.compare, (cdiv(rows, COMPARE_ROWS),), x, y, row_ids, column_ids, own, uncertain, best, index,
                *search, BLOCK=COMPARE_ROWS, BN=64, BK=vector_block(width, 128), RELATION=RELATIONS.index(relation),
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
        if options["LOADS"] != DESCRIBED.value:
            options["LOADS"] = (WHOLE if depth == x.shape[1] else MASKED).value
    return options
