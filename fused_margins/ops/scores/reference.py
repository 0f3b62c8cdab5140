"""The readable definition of `scores`; every backend must agree with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...core import checks
from ...core.indices import INVALID, check_index
from ...core.similarity import similarity_matrix

if TYPE_CHECKING:
    from .op import Scores


def reference(a: Scores) -> tuple[Tensor]:
    """(B, N) in the dtype of x: plain PyTorch, any device, differentiable to any order."""
    checks.positive("scale", a.scale)
    u = similarity_matrix(a.x, a.y, a.similarity)
    if a.target is not None:
        target = check_index(a.target, a.y.shape[0], a.ignore_index, "target")
        chosen = target[:, None] == torch.arange(a.y.shape[0], device=a.y.device)
        margin = a.margin.reshape(-1, 1) if isinstance(a.margin, Tensor) else a.margin
        u = torch.where(chosen, u - margin, u)
        u = torch.where((target == INVALID)[:, None], torch.nan, u)
    scale = a.scale
    if isinstance(scale, Tensor):
        scale = torch.where(scale > 0, scale, torch.nan).reshape(-1, 1)
    z = u * scale
    if a.bias is not None:
        z = z + a.bias
    if a.sign < 0:
        z = 0 - z  # and not -z, which makes zeros negative
    return (z.to(a.x.dtype),)
