"""Integer arguments that index something, checked where the data is read.

A Python ``if`` on tensor values would break ``torch.compile(fullgraph=True)`` and make a GPU wait, so the checks are
opaque ops: on a CPU they raise, on other devices they mark the bad rows, which then become NaN. `checked()` makes every
device raise.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from .dispatcher import can_bypass_dispatcher

INTEGER = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
IGNORED, INVALID = -1, -2
# Reserved, as no user has it by mistake: the target of a row whose class lives elsewhere, so that it has negatives and
# no positive here; and the label of a column that no relation admits, such as unfilled memory or padding.
ABSENT = UNADMITTED = -(2**63)

_library = torch.library.Library("fused_margins", "FRAGMENT")
_library.define("check_index(Tensor index, SymInt size, int ignore_index, str argument, bool absent=False) -> Tensor")
_library.define("check_members(Tensor clusters, SymInt num_clusters) -> Tensor")

_raise_everywhere = False


@contextlib.contextmanager
def checked(enabled: bool = True) -> Iterator[None]:
    """Within this context bad labels raise on every device (on a GPU at the price of a synchronisation a call)."""
    global _raise_everywhere
    before, _raise_everywhere = _raise_everywhere, enabled
    try:
        yield
    finally:
        _raise_everywhere = before


def raises_everywhere() -> bool:
    """Whether `checked` is on."""
    return _raise_everywhere


def check_index(index: Tensor, size: int, ignore_index: int, argument: str, absent: bool = False) -> Tensor:
    """int64 copy of `index`, IGNORED where it equals `ignore_index`; out of [0, size): IndexError, on a GPU INVALID.

    absent: whether ABSENT may be there; it stays what it is. If not, an `ignore_index` of UNADMITTED ignores nothing.
    """
    check = _check_index if can_bypass_dispatcher((index,)) else torch.ops.fused_margins.check_index
    return check(index, size, ignore_index, argument, absent)


def check_members(clusters: Tensor, num_clusters: int) -> Tensor:
    """Samples a cluster (M,), int64; a cluster without members is a ValueError on a CPU."""
    return torch.ops.fused_margins.check_members(clusters, num_clusters)


def _check_index(index: Tensor, size: int, ignore_index: int, argument: str, absent: bool = False) -> Tensor:
    _expect_integers(argument, index)
    index = index.to(torch.int64)  # first: in 8 bits, `size` and `ignore_index` would wrap around
    checked_index = torch.where(index == ignore_index, IGNORED, index)
    ignores = absent or ignore_index != UNADMITTED
    bad = (index < 0) | (index >= size)
    if ignores:
        bad = bad & (index != ignore_index)
    if absent:
        bad = bad & (index != ABSENT)
    if index.device.type == "cpu" or _raise_everywhere:
        if bad.any():
            row = int(bad.nonzero()[0, 0])
            ignored = "" if ignore_index == UNADMITTED else f" or {ignore_index} (ignored)"
            raise IndexError(f"{argument}: expected values in [0, {size}){ignored}, got {int(index[row])} in row {row}")
        return checked_index
    return torch.where(bad, INVALID, checked_index)


def _expect_integers(argument: str, index: Tensor) -> None:
    """What anybody may hand over who calls the registered ops."""
    if not isinstance(index, Tensor):
        raise TypeError(f"{argument}: expected an integer vector, got {type(index).__name__}")
    if index.layout != torch.strided or index.is_nested or index.dtype not in INTEGER:
        raise TypeError(f"{argument}: expected a dense integer vector, got {index.dtype} of layout {index.layout}")
    if index.dim() != 1:
        raise ValueError(f"{argument}: expected a vector, got shape {tuple(index.shape)}")


def _check_members(clusters: Tensor, num_clusters: int) -> Tensor:
    _expect_integers("clusters", clusters)
    if num_clusters < 0:
        raise ValueError(f"num_clusters: expected at least 0, got {num_clusters}")
    valid = check_index(clusters, num_clusters, IGNORED, "clusters")
    # One column more than clusters: it takes the rows that are marked, whatever their mark.
    columns = torch.arange(num_clusters, device=clusters.device)
    counts = (valid[:, None] == columns).sum(0)
    if (clusters.device.type == "cpu" or _raise_everywhere) and bool((counts == 0).any()):
        empty = int((counts == 0).nonzero()[0, 0])
        raise ValueError(f"clusters: every one of the {num_clusters} clusters needs a member, cluster {empty} has none")
    return counts


_library.impl("check_index", _check_index, "CompositeExplicitAutograd")
_library.impl("check_members", _check_members, "CompositeExplicitAutograd")


@torch.library.register_fake("fused_margins::check_index", lib=_library)
def _(index: Tensor, size: int, ignore_index: int, argument: str, absent: bool = False) -> Tensor:
    return torch.empty_like(index, dtype=torch.int64)


@torch.library.register_fake("fused_margins::check_members", lib=_library)
def _(clusters: Tensor, num_clusters: int) -> Tensor:
    return clusters.new_empty(num_clusters, dtype=torch.int64)
