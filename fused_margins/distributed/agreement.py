"""Ranks that were called differently find out before they wait for one another: all of them get the same error.

A rank whose own arguments are wrong does not raise by itself, since the others would wait until the time-out of the
process group. It takes part in the exchange, and every rank raises what it has to say, with its number.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor
from torch import distributed as dist

from .collectives import all_gather_single, num_ranks

_KINDS: dict[str, type[Exception]] = {e.__name__: e for e in (IndexError, RuntimeError, TypeError, ValueError)}


def described(value: object) -> str:
    """An option in words that are equal where it is; of a tensor its shape, its dtype and a digest of its values."""
    if not isinstance(value, Tensor):
        return repr(value)
    shape = f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    if value.is_meta:
        return shape
    values = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return f"{shape} with digest {hashlib.blake2b(values.numpy().tobytes(), digest_size=4).hexdigest()}"


def same_on_all_ranks(
    what: Mapping[str, str], error: Exception | None = None, group: dist.ProcessGroup | None = None
) -> None:
    """An error on every rank of the group if any has one, or if they differ in what they have under any name.

    Args:
        what: names, and values in words, as of `described`. error: of this rank.

    Raises:
        ValueError: names that differ, with the ranks and what each has. Else the kind of the first rank's error.
    """
    ranks = num_ranks(group)
    if ranks == 1:
        if error is not None:
            raise error
        return
    own = (None if error is None else (type(error).__name__, str(error)), dict(what))
    every: list[tuple[tuple[str, str] | None, dict[str, str]]] = [own] * ranks
    dist.all_gather_object(every, own, group=group)
    for rank, (failure, _) in enumerate(every):
        if failure is not None:
            raise _KINDS.get(failure[0], RuntimeError)(f"rank {rank}: {failure[1]}") from error
    for name in {name: None for _, facts in every for name in facts}:
        on: dict[str, list[int]] = {}
        for rank, (_, facts) in enumerate(every):
            on.setdefault(facts.get(name, "nothing"), []).append(rank)
        if len(on) > 1:
            found = "; ".join(f"{value} on rank{'s' * (len(r) > 1)} {_listed(r)}" for value, r in on.items())
            raise ValueError(f"{name}: expected the same on all ranks, got {found}")


def header(
    rows: int,
    what: Mapping[str, str],
    error: Exception | None,
    device: torch.device,
    group: dist.ProcessGroup | None = None,
) -> tuple[int, ...]:
    """Rows of each rank; before that the errors of `same_on_all_ranks`. Sends 16 bytes, and reads them on the host."""
    ranks = num_ranks(group)
    if ranks == 1:
        same_on_all_ranks(what, error, group)
        return (rows,)
    own = torch.tensor([rows, -1 if error else zlib.crc32(repr(what).encode())], dtype=torch.int64, device=device)
    every = own.new_empty(2 * ranks)
    all_gather_single(every, own, group)
    counts, codes = every.view(ranks, 2).t().tolist()
    if -1 in codes or len(set(codes)) > 1:
        same_on_all_ranks(what, error, group)
    return tuple(counts)


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))
