"""Whether a call needs torch's dispatcher, which costs as much as a small problem."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_PLAIN = (Tensor, torch.nn.Parameter)
_is_batched = torch._C._functorch.is_legacy_batchedtensor  # of autograd's batched gradients, which no stack shows
_func_transform = torch._C._functorch.peek_interpreter_stack
_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_tracing = torch._C._get_tracing_state
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling


def can_bypass_dispatcher(tensors: Sequence[Any]) -> bool:
    """Whether nothing watches these tensors but autograd, so that a kernel may be called around torch's dispatcher.

    Compilation, torch.func, forward-mode derivatives, modes and tracing need it, and so do batched gradients, nested
    tensors, subclasses of tensors, zeros without memory, and tensors that are negated when they are read (imaginary
    parts of conjugates); nothing else does.
    """
    if (
        _is_dynamo_compiling()
        or forward_ad._current_level >= 0
        or _func_transform() is not None
        or _dispatch_modes() > 0
        or _function_modes() > 0
        or _tracing() is not None
    ):
        return False
    for t in tensors:
        if t.__class__ in _PLAIN:
            if t.is_neg() or _is_batched(t) or t._is_zerotensor() or t.is_nested:
                return False
        elif t is not None and t.__class__ is not float:
            return False
    return True
