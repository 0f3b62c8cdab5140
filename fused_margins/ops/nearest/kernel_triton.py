"""`nearest` in Triton: each row's best columns stay in registers while tiles of similarities pass by.

The columns are split among programs (`_search`), each keeps its K best in order; `_merge` picks the best of all shares,
of equals the lowest column, and computes the chosen pairs once more, exactly.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import crossovers, gpu, labels
from ..native import int64
from ..similarity import RELATIONS, accumulation_dtype
from ..triton_tiles import (
    ANY,
    BN,
    DIFFERENT,
    IGNORED,
    INVALID,
    TILES,
    factors,
    index_status,
    pair_similarities,
    places,
    similarities,
    store_factors,
    tile_options,
    vector_block,
)


@triton.jit
def _search(
    x, y, x_factor, y_factor, row_labels, column_labels, self_index, below, values, indices,
    rows, columns, width, x_row, x_column, y_row, y_column, tiles_each,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, SIMILARITY: tl.constexpr,
    RELATION: tl.constexpr, K: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The K best columns of each row among this program's tiles, -inf where there are fewer: (share, rows, K)."""
    block, share = tl.program_id(0), tl.program_id(1)
    at_rows, i = places(block, BM, rows)
    of_x = factors(x_factor, i, BM, SIMILARITY, DTYPE)
    label = tl.load(row_labels + i)
    slots = tl.arange(0, K)
    best = tl.full((BM, K), float("-inf"), DTYPE)
    best_index = tl.full((BM, K), -1, tl.int32)
    worst = tl.full((BM,), float("-inf"), DTYPE)
    first = share * tiles_each
    for tile in range(first, tl.minimum(first + tiles_each, tl.cdiv(columns, BN))):
        at_columns, j = places(tile, BN, columns)
        of_y = factors(y_factor, j, BN, SIMILARITY, DTYPE)
        u = similarities(
            x, y, i, j, of_x, of_y, width, x_row, x_column, y_row, y_column,
            BM, BN, BK, EVEN, SIMILARITY, NORMALIZE, PRECISION, DTYPE,
        )  # fmt: skip
        mask = (at_columns < columns)[None, :] & (u == u)
        if RELATION != ANY:
            same = label[:, None] == tl.load(column_labels + j)[None, :]
            mask = mask & (same != (RELATION == DIFFERENT))
        if self_index is not None:
            mask = mask & (tl.load(self_index + i)[:, None] != at_columns[None, :])
        if below is not None:
            mask = mask & (u < tl.load(below + i)[:, None])
        u = tl.where(mask, u, float("-inf"))
        if K == 1:
            value, place = tl.max(u, 1, return_indices=True, return_indices_tie_break_left=True)
            better = value > worst  # a later column must be better, not equal
            worst = tl.where(better, value, worst)
            best_index = tl.where(better[:, None], (tile * BN + place)[:, None], best_index)
        else:
            # One at a time, as long as any row's tile still holds a better one than the worst that it has.
            value, place = tl.max(u, 1, return_indices=True, return_indices_tie_break_left=True)
            while tl.max((value > worst).to(tl.int32), 0) > 0:
                better = value > worst
                # Into its place: after all that are at least as good, the others move down and the last drops out.
                rank = tl.sum((best >= value[:, None]).to(tl.int32), 1)
                source = tl.where(slots[None, :] > rank[:, None], slots[None, :] - 1, slots[None, :])
                moved, moved_index = tl.gather(best, source, 1), tl.gather(best_index, source, 1)
                here = slots[None, :] == rank[:, None]
                moved = tl.where(here, value[:, None], moved)
                moved_index = tl.where(here, (tile * BN + place)[:, None], moved_index)
                best = tl.where(better[:, None], moved, best)
                best_index = tl.where(better[:, None], moved_index, best_index)
                worst = tl.min(best, 1)
                u = tl.where(better[:, None] & (tl.arange(0, BN)[None, :] == place[:, None]), float("-inf"), u)
                value, place = tl.max(u, 1, return_indices=True, return_indices_tie_break_left=True)
    if K == 1:
        best = worst[:, None]
    to = (share * rows + i[:, None]) * K + slots[None, :]
    inside = (at_rows < rows)[:, None]
    tl.store(values + to, best, mask=inside)
    tl.store(indices + to, best_index, mask=inside)


@triton.jit
def _merge(
    x, y, x_factor, y_factor, self_index, values, indices, similarity, index,
    rows, columns, width, x_row, x_column, y_row, y_column, shares, k,
    BLOCK: tl.constexpr, BK: tl.constexpr, K: tl.constexpr, SIMILARITY: tl.constexpr, NORMALIZE: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """The best of all shares, and their exact similarities."""
    at, i = places(tl.program_id(0), BLOCK, rows)
    of_x = factors(x_factor, i, BLOCK, SIMILARITY, DTYPE)
    invalid = at < 0
    if self_index is not None:
        invalid = index_status(tl.load(self_index + i), columns, IGNORED) == INVALID
    last_value = tl.full((BLOCK,), float("inf"), DTYPE)
    last_index = tl.full((BLOCK,), -1, tl.int32)
    for slot in range(k):
        chosen = tl.full((BLOCK,), float("-inf"), DTYPE)
        chosen_index = tl.full((BLOCK,), -1, tl.int32)
        for share in range(shares):
            place = (share * rows + i[:, None]) * K + tl.arange(0, K)[None, :]
            value, column = tl.load(values + place), tl.load(indices + place)
            # What comes after the last choice: less similar, or as similar in a later column.
            after = (value < last_value[:, None]) | ((value == last_value[:, None]) & (column > last_index[:, None]))
            value = tl.where(after & (column >= 0), value, float("-inf"))
            most, at_most = tl.max(value, 1, return_indices=True, return_indices_tie_break_left=True)
            better = most > chosen
            column = tl.sum(tl.where(tl.arange(0, K)[None, :] == at_most[:, None], column, 0), 1)
            chosen_index = tl.where(better, column, chosen_index)
            chosen = tl.where(better, most, chosen)
        last_value, last_index = chosen, chosen_index
        found = chosen_index >= 0
        j = tl.maximum(chosen_index, 0).to(tl.int64)
        of_y = factors(y_factor, j, BLOCK, SIMILARITY, DTYPE)
        u = pair_similarities(
            x, y, i, j, width, x_row, x_column, y_row, y_column, of_x, of_y, BLOCK, BK, DTYPE, SIMILARITY, NORMALIZE
        )
        u = tl.where(invalid, float("nan"), tl.where(found, u, float("-inf")))
        tl.store(similarity + i * k + slot, u, mask=at < rows)
        tl.store(index + i * k + slot, tl.where(found, chosen_index, -1).to(tl.int64), mask=at < rows)


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
    options = tile_options(TILES, x, similarity)
    slots = triton.next_power_of_2(k)
    if slots > 1:  # the bests take registers, too
        options["BM"] = max(16, min(options["BM"], 1024 // slots))
    row_blocks, column_tiles = triton.cdiv(rows, options["BM"]), triton.cdiv(columns, BN)
    each = triton.cdiv(column_tiles * row_blocks, gpu.programs(device))
    shares = triton.cdiv(column_tiles, each)
    values = torch.empty(shares, rows, slots, dtype=dtype, device=device)
    indices = torch.empty(shares, rows, slots, dtype=torch.int32, device=device)
    of_both = [torch.empty(t.shape[0] if similarity == "cosine" else 0, dtype=dtype, device=device) for t in (x, y)]
    with gpu.on(x):
        if similarity == "cosine":
            store_factors(x, of_both[0])
            store_factors(y, of_both[1])
        gpu.launch(
            _search, (row_blocks, shares),
            x, y, *of_both, row_ids, column_ids, own, below, values, indices, rows, columns, width,
            *x.stride(), *y.stride(), each, RELATION=RELATIONS.index(relation), K=slots, **options,
        )  # fmt: skip
        gpu.launch(
            _merge, (triton.cdiv(rows, 4),),
            x, y, *of_both, own, values, indices, best, index, rows, columns, width, *x.stride(), *y.stride(),
            shares, k, BLOCK=4, BK=vector_block(width), K=slots, SIMILARITY=options["SIMILARITY"],
            NORMALIZE=options["NORMALIZE"], DTYPE=options["DTYPE"], num_warps=4,
        )  # fmt: skip
    return best, index
