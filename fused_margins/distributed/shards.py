"""Which classes live on which rank, and tensors of one row a class that are spread accordingly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from ..core.indices import ABSENT
from ..core.ranks import exchange_device

_BLOCK = 1024  # classes that are drawn from one seed


class Shards:
    """The classes of a loss over the ranks of a mesh, contiguous by rank, as DTensor's Shard(0) has them.

    Of C classes on W ranks each has ceil(C / W) in turn until there are no more: the last may have fewer, or none.

    Attributes:
        num_classes: C. mesh: of one dimension. group: its process group. ranks: W. rank: of this process.
        first, stop: the classes of this rank.
    """

    def __init__(self, num_classes: int, mesh: DeviceMesh | None) -> None:
        self.num_classes, self.mesh = num_classes, _mesh(mesh)
        self.group, self.ranks, self.rank = self.mesh.get_group(), self.mesh.size(), self.mesh.get_local_rank()
        of_each = -(-num_classes // self.ranks)
        self.first, self.stop = (min(r * of_each, num_classes) for r in (self.rank, self.rank + 1))

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a loss whose classes are on many ranks is not pickled; save its state dict")

    def __deepcopy__(self, memo: Any) -> Shards:
        return self  # the ranks of a copy are the same

    def spread(self, local: Tensor) -> DTensor:
        """The rows (stop - first, ...) of this rank as a part of (C, ...)."""
        shape = torch.Size((self.num_classes, *local.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local, self.mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)

    def empty(self, *shape: int) -> DTensor:
        """Memory for (C, ...), of this rank's part alone."""
        return self.spread(torch.empty(self.stop - self.first, *shape[1:], device=self.mesh.device_type))

    def part(self, values: Tensor) -> DTensor:
        """Of values (C, ...) that every rank has, a copy of this rank's part."""
        return self.spread(values.detach()[self.first : self.stop].to(self.mesh.device_type, copy=True))

    def here(self, labels: Tensor) -> Tensor:
        """Labels (B,) as indices of this rank's classes: ABSENT for those elsewhere, below 0 what they are."""
        elsewhere = torch.where(labels < 0, labels, ABSENT)
        return torch.where((labels >= self.first) & (labels < self.stop), labels - self.first, elsewhere)

    @torch.no_grad()
    def draw_normal_(self, weight: Tensor, std: float) -> None:
        """Normal values for (C, ...), which torch's generator decides: where it is in the same state on all ranks, the
        values are those of any other number of ranks.
        """
        local = weight.to_local() if isinstance(weight, DTensor) else weight
        seed = int(torch.randint(2**62, (), dtype=torch.int64, device="cpu"))
        generator = torch.Generator(local.device)
        for block in range(self.first // _BLOCK, -(-self.stop // _BLOCK)):
            first, stop = max(block * _BLOCK, self.first), min((block + 1) * _BLOCK, self.stop)
            generator.manual_seed(seed + block)
            drawn = torch.empty(_BLOCK, *local.shape[1:], dtype=local.dtype, device=local.device)
            drawn.normal_(std=std, generator=generator)
            local[first - self.first : stop - self.first] = drawn[first - block * _BLOCK : stop - block * _BLOCK]


def one_dimension(mesh: DeviceMesh | None) -> dist.ProcessGroup | None:
    """The group of the ranks of a mesh, all ranks where it is none that a loss can have."""
    return mesh.get_group() if isinstance(mesh, DeviceMesh) and mesh.ndim == 1 else None


def _mesh(mesh: DeviceMesh | None) -> DeviceMesh:
    """One dimension of ranks; by default all of the process group."""
    if mesh is None:
        if not dist.is_initialized():
            raise RuntimeError(
                "mesh: expected a process group, got none; start the script with torchrun, also on one process, and "
                "call torch.distributed.init_process_group()"
            )
        return DeviceMesh.from_group(dist.group.WORLD, exchange_device().type)  # type: ignore[arg-type]
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh: expected a DeviceMesh or None, got {type(mesh).__name__}")
    if mesh.ndim != 1:
        raise ValueError(f"mesh: expected one dimension of ranks, as mesh['name'] is, got {mesh.ndim}")
    return mesh
