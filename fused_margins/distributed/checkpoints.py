"""Checkpoints of any number of ranks, which any other number loads, by torch.distributed.checkpoint."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from ..core.ranks import own_rank, together
from .sampling import whole

__all__ = ["load_checkpoint", "save_checkpoint"]

Optimizers = torch.optim.Optimizer | tuple[torch.optim.Optimizer, ...]


def save_checkpoint(
    folder: str | os.PathLike[str], model: nn.Module, optimizers: Optimizers = (), **more: Tensor | float | int
) -> None:
    """Writes modules and the state of their optimizers, each rank its own part, and gives the folder its name at last.

    A rank that dies in between leaves a folder `<name>.part` behind, and an earlier checkpoint of that name as it was.

    Args:
        folder: to be made, the same on all ranks and on a file system that all of them see; one that is there is
            replaced.
        model: a module whose parameters are plain tensors, the same on all ranks, or DTensors: a backbone and a loss
            together as `torch.nn.ModuleDict({"model": model, "loss": loss})`.
        optimizers: one or several, all of whose parameters the model has.
        more: numbers and tensors that are the same on all ranks, such as the step.

    Raises:
        RuntimeError: on every rank, if one of them cannot write, with the rank and what it has to say.
        ValueError: another folder, or other numbers in `more`, on some ranks.

    >>> import tempfile, torch
    >>> from torch import distributed as dist
    >>> from fused_margins.distributed import ShardedMarginSoftmaxLoss, load_checkpoint, save_checkpoint
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> loss = ShardedMarginSoftmaxLoss(num_classes=10, embedding_size=4)
    >>> optimizer = torch.optim.SGD(loss.parameters(), lr=0.1, momentum=0.9)
    >>> folder = tempfile.TemporaryDirectory()
    >>> save_checkpoint(f"{folder.name}/last", loss, optimizer, step=7)
    >>> load_checkpoint(f"{folder.name}/last", loss, optimizer, step=0)
    {'step': 7}
    >>> folder.cleanup()
    >>> dist.destroy_process_group()
    """
    folder = Path(folder)
    part, replaced = folder.with_name(folder.name + ".part"), folder.with_name(folder.name + ".old")
    with together("save_checkpoint") as own:
        own.same = {"folder": str(folder), **more}
        if own_rank() == 0:
            shutil.rmtree(part, ignore_errors=True)
    with whole(model), _one_cause("folder: expected to write", folder):
        dcp.save(_state(model, optimizers, more), checkpoint_id=part, no_dist=not dist.is_initialized())
    with together("save_checkpoint"):
        if own_rank() == 0:
            if folder.exists():  # else the one before has the other name, until this one is there
                shutil.rmtree(replaced, ignore_errors=True)
                folder.rename(replaced)
            part.rename(folder)
            shutil.rmtree(replaced, ignore_errors=True)


def load_checkpoint(
    folder: str | os.PathLike[str], model: nn.Module, optimizers: Optimizers = (), **more: Tensor | float | int
) -> dict[str, Any]:
    """Reads what `save_checkpoint` wrote, on any number of ranks, into modules and optimizers that are made already.

    Args:
        folder: of the checkpoint. Where a rank died while it was replaced, the one before is read.
        model, optimizers: made as those that were saved. more: names of what else was saved, with values of its kind.

    Returns:
        What was saved under the names of `more`.

    Raises:
        FileNotFoundError: no checkpoint of that name that is whole.
        RuntimeError: names or shapes that are not those that were saved, with the first of them, which begins with the
            argument that has it: "model.", "optimizers." or "more.".
    """
    folder = Path(folder)
    with together("load_checkpoint") as own:
        own.same = {"folder": str(folder), "more": sorted(more)}
        found = [p for p in (folder, folder.with_name(folder.name + ".old")) if (p / ".metadata").exists()]
        if not found:
            raise FileNotFoundError(f"folder: expected a checkpoint, got {folder}, in which there is no whole one")
    with whole(model), _one_cause("folder: expected what the model, the optimizers and more have", found[0]):
        state = _state(model, optimizers, more)
        dcp.load(state, checkpoint_id=found[0], no_dist=not dist.is_initialized())
        of_model, of_optimizers = state["model"], state["optimizers"]
        set_state_dict(model, optimizers, model_state_dict=of_model, optim_state_dict=of_optimizers)
    return state["more"]


@contextmanager
def _one_cause(expected: str, folder: Path) -> Iterator[None]:
    """Of what torch.distributed.checkpoint raises with the stacks of all ranks, the first error."""
    try:
        yield
    except CheckpointException as failed:
        rank, (cause, _) = min(failed.failures.items(), key=lambda failure: failure[0])
        raise RuntimeError(f"{expected}, got {folder}: rank {rank}: {cause}") from failed


def _state(model: nn.Module, optimizers: Optimizers, more: dict[str, Any]) -> dict[str, Any]:
    of_model, of_optimizers = get_state_dict(model, optimizers)
    return {"model": of_model, "optimizers": of_optimizers, "more": dict(more)}
