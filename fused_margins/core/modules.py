"""Modules whose tensors are moved, emptied and loaded: what is lost is known, and never read."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class WithUserValues(nn.Module):
    """A module of which some buffers have values that only the user had: nobody can initialise them anew.

    `reset_parameters` restores what the constructor was given and keeps those buffers. Where `to_empty` has put
    uninitialised memory in their place, a call is refused until a state dict has brought them back.
    """

    _of_user: tuple[str, ...] = ()  # buffers
    _lost: frozenset[str] = frozenset()  # those of them that hold uninitialised memory

    def require_values(self) -> None:
        """A RuntimeError that names the buffers whose values are lost."""
        if self._lost:
            raise RuntimeError(
                f"{', '.join(sorted(self._lost))}: expected values, got uninitialised memory, since to_empty took them "
                "away; load a state dict that has them"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "WithUserValues":
        given = {name for name in self._of_user if self._buffers.get(name) is not None}
        if given and not keeps_values(fn):
            self._lost = self._lost | given
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._lost = frozenset(name for name in self._lost if prefix + name not in state_dict)


def keeps_values(fn: Callable[[Tensor], Tensor]) -> bool:
    """Whether what moves a module's tensors brings their values along: a random number of 62 bits shows it."""
    generator = torch.Generator()
    generator.seed()
    with torch.device("cpu"):
        number = torch.randint(2**62, (1,), generator=generator)
    moved = fn(number)
    return not moved.is_meta and bool(torch.equal(moved.cpu(), number))
