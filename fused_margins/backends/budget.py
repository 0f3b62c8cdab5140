"""How many bytes of softmax weights, and of exponentials, a forward may save for its backward."""

import contextlib
import os
from collections.abc import Callable, Iterator

import torch

from ..core import checks
from . import epoch

VARIABLE = "FUSED_MARGINS_MEMORY_BUDGET"


def _from_environment() -> int:
    text = os.environ.get(VARIABLE, "").strip() or str(128 * 2**20)
    if not text.isdecimal():
        raise ValueError(f"{VARIABLE}: expected an integer of bytes, at least 0, got {text!r}")
    return int(text)


_memory_budget_bytes = _from_environment()
_on_change: list[Callable[[], None]] = []


def memory_budget() -> int:
    """Bytes of softmax weights that a forward may save for its backward; a few numbers a row and column come on top."""
    return _memory_budget_bytes


def set_memory_budget(num_bytes: int) -> None:
    """Let a forward save up to `num_bytes` of softmax weights for its backward; the others are computed again.

    The environment variable ``FUSED_MARGINS_MEMORY_BUDGET`` sets the value at import (default 128 MiB). On a CPU
    memory of 1 MiB and more that a forward saved waits for the next one, at most one and a half budgets; this function
    returns it to the system.

    >>> import fused_margins
    >>> fused_margins.set_memory_budget(64 * 2**20)
    """
    global _memory_budget_bytes
    _memory_budget_bytes = checks.integer("num_bytes", num_bytes, 0)
    epoch.begin()
    for release in _on_change:
        release()


_exponential_budget_bytes: int | None = 0  # None: an eighth of the device's memory


def exponential_budget(device: torch.device) -> int:
    """Bytes of exponentials, and of the unit columns beside them, that a forward on this device may keep."""
    if _exponential_budget_bytes is not None:
        return _exponential_budget_bytes
    return torch.cuda.get_device_properties(device).total_memory // 8 if device.type == "cuda" else 2**30


@contextlib.contextmanager
def within_exponential_budget(num_bytes: int | None) -> Iterator[None]:
    """Another budget of exponentials in this context."""
    before = _exponential_budget_bytes
    set_exponential_budget(num_bytes)
    try:
        yield
    finally:
        set_exponential_budget(before)


def set_exponential_budget(num_bytes: int | None) -> None:
    """Let a forward on a GPU keep up to `num_bytes` of the exponentials of bfloat16 cosines: three products, not four.

    Off (0) as long as nobody has measured it on a GPU; None is an eighth of the device's memory a call. A forward
    keeps exp(scale u_ij) where none can overflow: the similarity is the cosine, the scale a number of at most 70, there
    is no bias, and scale + ln(columns) < 80. They take 2 (rows + width) bytes a column. Columns beyond the budget are
    computed again. What a call does says `fused_margins.explain`.

    >>> import fused_margins
    >>> fused_margins.set_exponential_budget(2**30)
    >>> fused_margins.set_exponential_budget(0)
    """
    global _exponential_budget_bytes
    _exponential_budget_bytes = None if num_bytes is None else checks.integer("num_bytes", num_bytes, 0)
    epoch.begin()


def release_on_change(release: Callable[[], None]) -> None:
    """Call `release` whenever the budget is set: it gives memory back that waits for the next call."""
    _on_change.append(release)


@contextlib.contextmanager
def within_memory_budget(num_bytes: int) -> Iterator[None]:
    """Another budget in this context; what waits for the next call stays."""
    global _memory_budget_bytes
    before, _memory_budget_bytes = _memory_budget_bytes, num_bytes
    epoch.begin()
    try:
        yield
    finally:
        _memory_budget_bytes = before
        epoch.begin()


def reused_bytes() -> int:
    """Bytes of such memory that may wait: those of the budget, and half as many for factors and means beside them."""
    return memory_budget() * 3 // 2


def describe(saved_bytes: int, share: float) -> str:
    """What a forward saves, and how many products both directions take if `share` of the softmax weights is saved."""
    share = min(1.0, share)
    text = f"with gradients it saves {saved_bytes / 2**20:.1f} MiB for the backward"
    if share < 1:
        text += f" and computes {1 - share:.0%} of the softmax weights again"
    return f"{text}: {4 - share:.2f} products"
