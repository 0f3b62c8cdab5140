"""`sample` in Triton: each row's largest number stays in registers while tiles of cosines pass by.

The columns are split among programs (`search`); `finish` picks the largest of all shares, of equals the lowest column.
Random numbers are made where they are used.
"""

from typing import Any

import torch
from torch import Tensor

from ...backends.cpu import int64
from ...backends.triton import launch
from ...backends.triton.launch import cdiv
from ...backends.triton.tiles import TILES, store_factors, tile_options
from ...core import indices
from ...core.enums import Similarity
from ...core.similarity import accumulation_dtype
from . import triton_kernels as kernels
from .op import Sample

COLUMNS = 32  # of a tile: random numbers and logarithms of more would not fit in the registers


def forward(a: Sample, plan: Any) -> tuple[Tensor]:
    """index (B,) int64."""
    x, y, self_index = a.x, a.y, a.self_index
    (rows, width), columns = x.shape, y.shape[0]
    if self_index is not None and indices.raises_everywhere():
        self_index = indices.check_index(self_index, columns, indices.IGNORED, "self_index")
    index = x.new_empty(rows, dtype=torch.int64)
    if not (rows and columns):
        return (index.fill_(-1),)
    row_labels, column_labels, own = int64(a.row_labels), int64(a.column_labels), int64(self_index)
    options = tile_options(TILES, x, y, Similarity.COSINE) | {"BN": COLUMNS}
    row_blocks, tiles = cdiv(rows, options["BM"]), cdiv(columns, options["BN"])
    each = cdiv(tiles * row_blocks, launch.num_persistent_programs(x.device))
    shares = cdiv(tiles, each)
    dtype = accumulation_dtype(x.dtype)
    of_x, of_y = (torch.empty(t.shape[0], dtype=dtype, device=x.device) for t in (x, y))
    values = torch.empty(shares, rows, dtype=dtype, device=x.device)
    found = torch.empty(shares, rows, dtype=torch.int32, device=x.device)
    with launch.on(x):
        store_factors(x, y, of_x, of_y)
        launch.launch(
            kernels.search, (row_blocks, shares),
            x, y, of_x, of_y, row_labels, column_labels, own, a.seed, values, found,
            rows, columns, width, *x.stride(), *y.stride(), each, RELATION=int(a.relation), **options,
        )  # fmt: skip
        launch.launch(
            kernels.finish, (cdiv(rows, 128),),
            values, found, own, index, rows, columns, shares, BLOCK=128, DTYPE=options["DTYPE"], num_warps=4,
        )  # fmt: skip
    return (index,)
