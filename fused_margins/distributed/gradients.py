"""One norm over the gradients of tensors of both kinds, whole ones and DTensors, which torch's own function refuses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor, Partial, Shard

from ..core import checks

__all__ = ["clip_grad_norm_"]


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """Scales gradients so that their norm, all parameters together, is at most `max_norm`; DTensors may be among them.

        grad <- grad min(1, max_norm / (|grads| + 1e-6))

    As `torch.nn.utils.clip_grad_norm_`, which takes plain tensors or DTensors of one mesh, not both.

    Args:
        parameters: plain tensors, which are the same on all ranks and count once, as under DDP; and DTensors of any
            meshes, Shard or Replicate, as `fully_shard` and `ShardedMarginSoftmaxLoss` have them. On every rank the
            same ones in the same order; a parameter without a gradient counts for nothing.
        max_norm: a positive number or 0. norm_type: p, infinity too.
        error_if_nonfinite: raise where the norm is not finite, before anything is scaled.

    Returns:
        The norm before, 0-d, the same on all ranks; one all-reduce of a number for each mesh with shards.

    Raises:
        TypeError: a gradient that ranks have yet to sum (Partial). ValueError: a number out of range.
        RuntimeError: a norm that is not finite, if asked for.

    >>> import torch
    >>> from fused_margins.distributed import clip_grad_norm_
    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> clip_grad_norm_([weight], max_norm=1.0), weight.grad
    (tensor(5.), tensor([0.6000, 0.8000]))
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    parameters = [getattr(p, "sampled_rows", p) for p in parameters]  # whose gradient is where an optimizer has it
    if not (max_norm := checks.number("max_norm", max_norm)) >= 0:
        raise ValueError(f"max_norm: expected a number of at least 0, got {max_norm}")
    if not (p := checks.number("norm_type", norm_type)) > 0:
        raise ValueError(f"norm_type: expected a positive number, got {norm_type}")
    # By the parameters, not by their gradients: ranks must agree on the all-reduces.
    spread: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = {}
    for parameter in parameters:
        grads = spread.setdefault(_groups(parameter), [])
        if parameter.grad is not None:
            grads.append(_local(parameter.grad))
    powers = []
    for groups, grads in spread.items():
        device = grads[0].device if grads else torch.device("cpu")
        norm = _norm([g.flatten() for g in grads if g.numel()], p, device)
        power = norm if math.isinf(p) else norm**p
        for group in groups:
            dist.all_reduce(power, dist.ReduceOp.MAX if math.isinf(p) else dist.ReduceOp.SUM, group=group)
        powers.append(power if math.isinf(p) else power ** (1 / p))
    if not powers:
        return torch.zeros(())
    total = torch.linalg.vector_norm(torch.stack([t.to(powers[0].device) for t in powers]), p).to(_dtype(spread))
    if error_if_nonfinite and not bool(total.isfinite()):
        raise RuntimeError(f"parameters: expected gradients of finite norm, got {float(total)}")
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for grads in spread.values():
        for grad in grads:
            grad.mul_(factor.to(grad.device, grad.dtype))
    return total


def _dtype(spread: Mapping[Any, list[Tensor]]) -> torch.dtype:
    """float64 where all gradients are, else float32."""
    dtypes = {grad.dtype for grads in spread.values() for grad in grads}
    return torch.float64 if dtypes == {torch.float64} else torch.float32


def _norm(grads: list[Tensor], p: float, device: torch.device) -> Tensor:
    """In float64: float32 cannot hold the power of every norm that it can."""
    if not grads:
        return torch.zeros((), dtype=torch.float64, device=device)
    norms = [torch.linalg.vector_norm(g, p, dtype=torch.promote_types(g.dtype, torch.float32)) for g in grads]
    return torch.linalg.vector_norm(torch.stack([n.to(device, torch.float64) for n in norms]), p)


def _local(grad: Tensor) -> Tensor:
    if not isinstance(grad, DTensor):
        return grad
    if any(isinstance(placement, Partial) for placement in grad.placements):
        raise TypeError(f"parameters: expected gradients that are Shard or Replicate, got {grad.placements}")
    return grad.to_local()


def _groups(parameter: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """Over whose ranks a parameter is spread."""
    if not isinstance(parameter, DTensor):
        return ()
    mesh = parameter.device_mesh
    sharded = [i for i, placement in enumerate(parameter.placements) if isinstance(placement, Shard)]
    return tuple(mesh.get_group(i) for i in sharded if mesh.size(i) > 1)
