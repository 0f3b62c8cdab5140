"""Their utils, with our wrapper for distributed training."""

import importlib
from types import ModuleType

from pytorch_metric_learning import utils as _theirs

from . import distributed

__all__ = ["distributed"]


def __getattr__(name: str) -> ModuleType:
    """accuracy_calculator, inference, ...: theirs."""
    if not name.startswith("_"):
        try:
            return importlib.import_module(f"{_theirs.__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{_theirs.__name__}.{name}":
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
