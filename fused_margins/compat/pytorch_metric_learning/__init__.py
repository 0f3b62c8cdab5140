"""pytorch-metric-learning on fused kernels: change the import, and nothing else.

`losses` and `miners` have all that theirs have. Those that the kernels can run are subclasses of theirs with the same
name, constructor, parameters and state dict; `docs/migration.md` says which, and what of a call is left to their code.
Every other module of theirs is passed on as it is. `accelerate` and `patch` do the same without a changed import, and
`explain` says which way a call takes.

Source: https://github.com/KevinMusgrave/pytorch-metric-learning, version 2.8 or newer.

>>> import torch
>>> from fused_margins.compat.pytorch_metric_learning import losses, reducers
>>> loss = losses.NTXentLoss(temperature=0.5, reducer=reducers.SumReducer())
>>> loss(torch.eye(3), torch.tensor([0, 0, 1]))
tensor(1.3863)
"""

from typing import Any

from ..passing_on import attribute_of, pass_on

try:
    import pytorch_metric_learning as _theirs
except ModuleNotFoundError as error:
    if error.name != "pytorch_metric_learning":
        raise
    raise ModuleNotFoundError(
        "fused_margins.compat.pytorch_metric_learning: expected pytorch-metric-learning 2.8 or newer, got none; "
        'install it with: pip install "fused-margins[pml]"',
        name=error.name,
    ) from None

if tuple(map(int, _theirs.__version__.split(".")[:2])) < (2, 8):
    raise ImportError(
        "fused_margins.compat.pytorch_metric_learning: expected pytorch-metric-learning 2.8 or newer, got "
        f'{_theirs.__version__}; install it with: pip install "fused-margins[pml]"'
    )

from . import losses, miners, utils
from .paths import explain
from .switch import accelerate, patch, restore

__all__ = ["accelerate", "explain", "losses", "miners", "patch", "restore", "utils"]
__version__ = _theirs.__version__

pass_on(__name__, _theirs.__name__, without=("losses", "miners"))


def __getattr__(name: str) -> Any:
    """distances, reducers, regularizers, samplers, testers, ...: theirs."""
    return attribute_of(__name__, _theirs, name)
