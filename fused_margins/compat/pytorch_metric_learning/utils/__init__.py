"""Their utils, with our wrapper for distributed training."""

from typing import Any

from pytorch_metric_learning import utils as _theirs

from ...passing_on import attribute_of
from . import distributed

__all__ = ["distributed"]


def __getattr__(name: str) -> Any:
    """accuracy_calculator, inference, ...: theirs."""
    return attribute_of(__name__, _theirs, name)
