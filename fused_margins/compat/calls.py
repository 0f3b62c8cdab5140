"""Which tensors of another library's calls the kernels can read. All others are left to that library's own code."""

from typing import Any

import torch
from torch import Tensor, nn

from ..core import checks
from ..core.indices import UNADMITTED


def are_matrices(*tensors: Any) -> bool:
    """Whether all are dense matrices with entries, of one device, width and floating dtype, and no transform of them.

    Kernels have no rule for `torch.func`.
    """
    for t in tensors:
        if type(t) not in (Tensor, nn.Parameter) or t.dim() != 2 or t.dtype not in checks.FLOATING or not t.numel():
            return False
        if t.layout != torch.strided or t.is_nested or t.device.type == "meta":
            return False
    if len({(t.device, t.dtype, t.shape[1]) for t in tensors}) > 1:
        return False
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is None


def are_labels(labels: Any, x: Tensor) -> bool:
    """Whether labels are integers where x is, none of them the one that is reserved."""
    if type(labels) is not Tensor or labels.dtype not in checks.INTEGER or labels.layout != torch.strided:
        return False
    if labels.device != x.device or not labels.numel():
        return False
    return labels.dtype != torch.int64 or torch.compiler.is_compiling() or int(labels.min()) != UNADMITTED
