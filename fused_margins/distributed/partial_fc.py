"""Checkpoints of insightface's PartialFC_V2, a file a rank, into a loss on any number of ranks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import agreement
from .margin_softmax import ShardedMarginSoftmaxLoss

__all__ = ["load_partial_fc"]

_OF_HEAD = "state_dict_softmax_fc"


@torch.no_grad()
def load_partial_fc(
    loss: ShardedMarginSoftmaxLoss, files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
) -> None:
    """Reads the class centres of `checkpoint_gpu_{rank}.pt` files; each rank keeps those of its own classes alone.

    Args:
        loss: of as many classes, with one center a class, of the width of the files.
        files: their folder, or the files in the order of the ranks that wrote them, which are other ranks than those
            here. They are read with `weights_only=True` and, where they allow, mapped instead of loaded.

    Raises:
        ValueError: no files, or centres of another number or width. KeyError: a file without "state_dict_softmax_fc".
        Errors of one rank are raised on all.

    Source: https://github.com/deepinsight/insightface, recognition/arcface_torch, `train_v2.py`.
    """
    error = None
    try:
        first = 0
        shards, local = loss._shards, loss.weight.to_local()  # type: ignore[attr-defined]
        for file in _files(files):
            part = _weight(file)
            if local.dim() != 2 or part.dim() != 2 or part.shape[1] != local.shape[1]:
                expected, got = (tuple(t.shape[1:]) for t in (local, part))
                raise ValueError(f"files: expected centres of shape {expected} as the loss has, got {got} in {file}")
            low, high = max(first, shards.first), min(first + len(part), shards.stop)
            if low < high:
                local[low - shards.first : high - shards.first] = part[low - first : high - first].to(local)
            first += len(part)
        if first != shards.num_classes:
            raise ValueError(f"files: expected {shards.num_classes} classes together, got {first}")
    except (KeyError, OSError, RuntimeError, ValueError) as raised:
        error = raised
    agreement.same_on_all_ranks({}, error, loss._shards.group)


def _files(files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[Path]:
    """In the order of the ranks: a folder's by their numbers, which are all there."""
    if not isinstance(files, str | os.PathLike):
        return [Path(file) for file in files]
    folder = Path(files)
    number = len(list(folder.glob("checkpoint_gpu_*.pt")))
    if not number:
        raise ValueError(f"files: expected a folder of checkpoint_gpu_*.pt, got {folder}, which has none")
    return [folder / f"checkpoint_gpu_{rank}.pt" for rank in range(number)]


def _weight(file: Path) -> Tensor:
    saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    if _OF_HEAD not in saved:
        raise KeyError(f"files: expected an entry {_OF_HEAD!r}, got {sorted(map(str, saved))} in {file}")
    return saved[_OF_HEAD]["weight"]
