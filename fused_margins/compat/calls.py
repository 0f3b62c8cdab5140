"""Which tensors of another library's calls the kernels can read. All others are left to that library's own code.

What is asked here answers with None, or with the reason why not, in words for a user.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..core import checks
from ..core.indices import UNADMITTED


def why_not_matrices(*tensors: Any) -> str | None:
    """Whether all are dense matrices with entries, of one device, width and dtype, and `torch.func` transforms none."""
    for t in tensors:
        if type(t) not in (Tensor, nn.Parameter) or t.dim() != 2 or t.dtype not in checks.FLOATING or not t.shape[0]:
            return "the embeddings are no matrix with rows of floating dtype"
        if t.layout != torch.strided or t.is_nested or t.device.type == "meta":
            return "the embeddings are no dense matrix"
    x = tensors[0]
    if not x.shape[1] or any(
        t.device != x.device or t.dtype != x.dtype or t.shape[1] != x.shape[1] for t in tensors if t is not x
    ):
        return "both sides differ in device, dtype or width"
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is None:
        return None
    return "torch.func transforms the call"  # for which kernels have no rule


def why_not_labels(labels: Any, x: Tensor, dtypes: tuple[torch.dtype, ...] = checks.INTEGER) -> str | None:
    """Whether labels are integers where the rows are; that there is one for every row is checked elsewhere."""
    if labels is None:
        return "there are no labels"
    known = type(labels) is Tensor and labels.dtype in dtypes and labels.layout == torch.strided
    if known and labels.device == x.device:
        return None
    return "the labels are no integers" if dtypes is checks.INTEGER else "the labels are no int64"


def why_not_admitted(labels: Tensor) -> str | None:
    """Whether no label (N,) of columns, N >= 1, is the one that no relation of the kernels admits."""
    if labels.dtype != torch.int64 or torch.compiler.is_compiling() or int(labels.min()) != UNADMITTED:
        return None
    return f"the label {UNADMITTED} is reserved"


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody looks at the calls of a module, or changes them."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks)
