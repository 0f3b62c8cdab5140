"""`draw` in Triton: each row's largest number stays in registers while tiles of cosines pass by.

The columns are split among programs (`search`); `finish` picks the largest of all shares, of equals the lowest column.
Random numbers are made where they are used.
"""

import torch
from torch import Tensor

from .. import gpu, labels
from ..gpu import cdiv
from ..native import int64
from ..similarity import RELATIONS, accumulation_dtype
from ..triton_tiles import TILES, store_factors, tile_options
from . import triton_kernels as kernels

COLUMNS = 32  # of a tile: random numbers and logarithms of more would not fit in the registers


def forward(
    x: Tensor,
    y: Tensor,
    row_labels: Tensor,
    column_labels: Tensor,
    seed: Tensor,
    self_index: Tensor | None,
    relation: str,
) -> Tensor:
    """index (B,) int64."""
    (rows, width), columns = x.shape, y.shape[0]
    if self_index is not None and labels.raises_everywhere():
        self_index = labels.check_index(self_index, columns, labels.IGNORED, "self_index")
    index = torch.empty(rows, dtype=torch.int64, device=x.device)
    if not (rows and columns):
        return index.fill_(-1)
    row_ids, column_ids, own = (int64(t) for t in (row_labels, column_labels, self_index))
    options = tile_options(TILES, x, y, "cosine") | {"BN": COLUMNS}
    row_blocks, tiles = cdiv(rows, options["BM"]), cdiv(columns, options["BN"])
    each = cdiv(tiles * row_blocks, gpu.programs(x.device))
    shares = cdiv(tiles, each)
    dtype = accumulation_dtype(x.dtype)
    of_x, of_y = (torch.empty(t.shape[0], dtype=dtype, device=x.device) for t in (x, y))
    values = torch.empty(shares, rows, dtype=dtype, device=x.device)
    indices = torch.empty(shares, rows, dtype=torch.int32, device=x.device)
    with gpu.on(x):
        store_factors(x, of_x)
        store_factors(y, of_y)
        gpu.launch(
            kernels.search, (row_blocks, shares),
            x, y, of_x, of_y, row_ids, column_ids, own, seed, values, indices,
            rows, columns, width, *x.stride(), *y.stride(), each, RELATION=RELATIONS.index(relation), **options,
        )  # fmt: skip
        gpu.launch(
            kernels.finish, (cdiv(rows, 128),),
            values, indices, own, index, rows, columns, shares, BLOCK=128, DTYPE=options["DTYPE"], num_warps=4,
        )  # fmt: skip
    return index
