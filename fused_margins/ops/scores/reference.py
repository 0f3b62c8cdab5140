"""The readable definition of `scores`; every backend must agree with it."""

import torch
from torch import Tensor

from .. import checks
from ..labels import INVALID, check_index
from ..similarity import similarity_matrix


def scores(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    margin: Tensor,
    target: Tensor | None,
    similarity: str,
    ignore_index: int,
) -> Tensor:
    """(B, N) in the dtype of x: plain PyTorch, any device, differentiable to any order."""
    checks.positive("scale", scale)
    u = similarity_matrix(x, y, similarity)
    if target is not None:
        target = check_index(target, y.shape[0], ignore_index, "target")
        chosen = target[:, None] == torch.arange(y.shape[0], device=y.device)
        u = torch.where(chosen, u - margin.reshape(-1, 1), u)
        u = torch.where((target == INVALID)[:, None], torch.nan, u)
    z = u * torch.where(scale > 0, scale, torch.nan).reshape(-1, 1)
    if bias is not None:
        z = z + bias
    return z.to(x.dtype)
