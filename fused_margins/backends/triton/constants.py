"""What Triton's kernels are compiled with: options and marks as their numbers, how tiles are read."""

import triton.language as tl

from ...core import indices
from ...core.enums import Relation, Similarity
from . import launch

BN = 128  # columns of a tile, and of a block of similarities that a forward saves

COSINE, DOT, EUCLIDEAN = (tl.constexpr(int(option)) for option in Similarity)
DIFFERENT, SAME, ANY = (tl.constexpr(int(option)) for option in Relation)
# What `index_status` and `target_status` make of an index that is none, in 32 bits.
IGNORED, INVALID, ABSENT = tl.constexpr(indices.IGNORED), tl.constexpr(indices.INVALID), tl.constexpr(-3)
# A target and a column label with a meaning of their own, in 64 bits.
ABSENT_TARGET, UNADMITTED = tl.constexpr(indices.ABSENT), tl.constexpr(indices.UNADMITTED)
# How tiles of vectors are read: up to the last component under a mask, whole, or by the copy engine (TMA).
MASKED, WHOLE, TMA = (tl.constexpr(i) for i in range(3))
INTERPRETED = tl.constexpr(launch.interpreted)
