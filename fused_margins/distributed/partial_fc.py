"""Checkpoints of insightface's PartialFC_V2, a file a rank, into a loss on any number of ranks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..core.ranks import together
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

    Raises, on all ranks, before anything is written:
        ValueError: no files, a number that is missing, or centres of another number or width. KeyError: a file without
        "state_dict_softmax_fc" or its "weight". FileNotFoundError: a file that is not there. TypeError: another loss.

    Source: https://github.com/deepinsight/insightface, recognition/arcface_torch, `train_v2.py`.
    """
    with together("load_partial_fc", getattr(getattr(loss, "_shards", None), "group", None)):
        if not isinstance(loss, ShardedMarginSoftmaxLoss):
            raise TypeError(f"loss: expected a ShardedMarginSoftmaxLoss, got {type(loss).__name__}")
        shards, local = loss._shards, loss._own_classes()
        found = [(file, _weight(file)) for file in _files(files)]
        for file, part in found:
            if local.dim() != 2 or part.dim() != 2 or part.shape[1] != local.shape[1]:
                expected, got = (tuple(t.shape[1:]) for t in (local, part))
                raise ValueError(f"files: expected centres of shape {expected} as the loss has, got {got} in {file}")
        if (classes := sum(len(part) for _, part in found)) != shards.num_classes:
            raise ValueError(f"files: expected {shards.num_classes} classes together, got {classes}")
    first = 0
    for _, part in found:
        low, high = max(first, shards.first), min(first + len(part), shards.stop)
        if low < high:
            local[low - shards.first : high - shards.first] = part[low - first : high - first].to(local)
        first += len(part)


def _files(files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[Path]:
    """In the order of the ranks: a folder's by their numbers, which are all there."""
    if not isinstance(files, str | os.PathLike):
        return [Path(file) for file in files]
    folder = Path(files)
    there = {path.name for path in folder.glob("checkpoint_gpu_*.pt")}
    if not there:
        raise ValueError(f"files: expected a folder of checkpoint_gpu_*.pt, got {folder}, which has none")
    names = [f"checkpoint_gpu_{rank}.pt" for rank in range(len(there))]
    if missing := [name for name in names if name not in there]:
        raise ValueError(f"files: expected {names[0]} to {names[-1]}, got {folder} without {', '.join(missing)}")
    return [folder / name for name in names]


def _weight(file: Path) -> Tensor:
    if not file.exists():
        raise FileNotFoundError(f"files: expected a checkpoint_gpu_*.pt, got {file}, which is not there")
    saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    for name in (_OF_HEAD, "weight"):
        if name not in saved:
            raise KeyError(f"files: expected an entry {name!r}, got {sorted(map(str, saved))} in {file}")
        saved = saved[name]
    return saved
