"""The ranks of a process group, and what they must agree on before they exchange anything else.

A rank whose own arguments are wrong does not raise by itself, since the others would wait until the time-out of the
process group. What every rank calls begins with a block `together`, at whose end all of them raise what any of them has
to say, with its number, or go on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import numbers
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

_KINDS: dict[str, type[Exception]] = {
    e.__name__: e
    for e in (AttributeError, FileNotFoundError, IndexError, KeyError, OSError, RuntimeError, TypeError, ValueError)
}


def num_ranks(group: dist.ProcessGroup | None = None) -> int:
    """Ranks in the group, None for all; 1 without a process group."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def own_rank(group: dist.ProcessGroup | None = None) -> int:
    """Number of this process within the group, from 0."""
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0


def exchange_device(group: dist.ProcessGroup | None = None) -> torch.device:
    """Where the group exchanges tensors: on the GPU of this process if NCCL does it, else on the CPU."""
    # Not `get_backend`, which says "undefined" of a group that was made without naming one.
    nccl = dist.is_initialized() and "cuda:nccl" in dist.get_backend_config(group)
    return torch.device("cuda" if nccl and torch.cuda.is_available() else "cpu")


def all_gather_single(every: Tensor, own: Tensor, group: dist.ProcessGroup | None) -> None:
    """torch's collective of this name, which releases before 2.13 call otherwise."""
    named = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    named(every, own, group=group)


@dataclasses.dataclass
class Own:
    """What a rank has to say: its number of rows, and by name what must be the same on all. counts: rows of each rank,
    once all have agreed.
    """

    rows: int = 0
    same: dict[str, Any] = dataclasses.field(default_factory=dict)
    counts: tuple[int, ...] = ()


@contextmanager
def together(call: str, group: dist.ProcessGroup | None = None, compare: bool = True) -> Iterator[Own]:
    """A block of what a rank does by itself; at its end every rank of the group raises if any has raised, or differs.

    Sends 16 bytes, and reads those of all ranks on the host; more only where there is something to raise.

    Args:
        call: what the block begins, the same on all ranks, or that is what they are told.
        compare: False for a block whose errors are the rank's own, and whose rows are as many on every rank.

    Raises:
        ValueError: names that differ, with the ranks and what each has. Else the kind of the first rank's error.
    """
    own, error, words, ranks = Own(), None, {"the call": call}, num_ranks(group)
    compare = compare and ranks > 1
    try:
        yield own
        if compare:
            words |= {name: described(value) for name, value in own.same.items()}
    except Exception as raised:
        if not compare:
            raise
        error = raised
    if not compare:
        own.counts = (own.rows,) * ranks
        return
    code = -1 if error else zlib.crc32(repr(words).encode())
    header = torch.tensor([own.rows, code], dtype=torch.int64, device=exchange_device(group))
    every = header.new_empty(2 * ranks)
    all_gather_single(every, header, group)
    counts, codes = every.view(ranks, 2).t().tolist()
    own.counts = tuple(counts)
    if -1 in codes or len(set(codes)) > 1:
        _raise_on_all(words, error, group)


def settings(function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a call, those that were left out by their defaults: 30 is 30.0 where that is the default."""
    defaults = {n: p.default for n, p in inspect.signature(function).parameters.items() if p.default is not p.empty}
    return {
        name: float(value) if isinstance(defaults.get(name), float) and _is_number(value) else value
        for name, value in (defaults | dict(given)).items()
    }


def described(value: object) -> str:
    """An option in words that are equal where it is; of a tensor its shape, its dtype and a digest of its values."""
    if not isinstance(value, Tensor):
        return repr(int(value) if isinstance(value, numbers.Integral) and _is_number(value) else value)
    shape = f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    if value.is_meta or hasattr(value, "placements"):  # of a DTensor each rank has another part
        return shape
    values = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return f"{shape} with digest {hashlib.blake2b(values.numpy().tobytes(), digest_size=4).hexdigest()}"


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _raise_on_all(words: dict[str, str], error: Exception | None, group: dist.ProcessGroup | None) -> None:
    failure = None if error is None else (type(error).__name__, _text(error))
    every: list[Any] = [None] * num_ranks(group)
    dist.all_gather_object(every, (failure, words), group=group)
    for rank, (failure, _) in enumerate(every):
        if failure is not None:
            raise _KINDS.get(failure[0], RuntimeError)(f"rank {rank}: {failure[1]}") from error
    for name in {name: None for _, found in every for name in found}:
        on: dict[str, list[int]] = {}
        for rank, (_, found) in enumerate(every):
            on.setdefault(found.get(name, "nothing"), []).append(rank)
        if len(on) > 1:
            got = "; ".join(f"{value} on rank{'s' * (len(r) > 1)} {', '.join(map(str, r))}" for value, r in on.items())
            raise ValueError(f"{name}: expected the same on all ranks, got {got}")


def _text(error: Exception) -> str:
    return str(error.args[0] if isinstance(error, KeyError) and error.args else error)
