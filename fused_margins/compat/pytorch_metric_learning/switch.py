"""Their classes turned into ours and back: in a module that exists, and in all that is built from now on."""

import sys
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, TypeVar

from pytorch_metric_learning import losses as _their_losses
from pytorch_metric_learning import miners as _their_miners
from pytorch_metric_learning.utils import distributed as _their_distributed
from pytorch_metric_learning.utils.module_with_records import ModuleWithRecords
from torch import nn

from . import losses, miners
from .utils import distributed

M = TypeVar("M", bound=nn.Module)


def _pairs_of_classes() -> Iterator[tuple[type, type]]:
    """Each class of theirs that ours replace, with ours."""
    for ours, theirs in ((losses, _their_losses), (miners, _their_miners), (distributed, _their_distributed)):
        for name, kind in vars(theirs).items():
            replaced = getattr(ours, name, kind)
            if isinstance(kind, type) and replaced is not kind:
                yield kind, replaced


OURS: dict[type, type] = dict(_pairs_of_classes())
THEIRS = {ours: theirs for theirs, ours in OURS.items()}


def accelerate(module: M) -> M:
    """Turn every loss, miner and wrapper of pytorch-metric-learning in a module into ours, in place.

    Only the class changes: parameters, what an optimizer refers to, hooks, buffers and options stay. A subclass of a
    user's stays what it is; name one of `losses` as its base instead.

    Args:
        module: any module, such as a model, a wrapper or a loss.

    Returns:
        The module.

    Raises:
        TypeError: no module.

    >>> import pytorch_metric_learning.losses
    >>> from fused_margins.compat.pytorch_metric_learning import accelerate, losses, restore
    >>> loss = pytorch_metric_learning.losses.NTXentLoss()
    >>> type(accelerate(loss)) is losses.NTXentLoss
    True
    >>> type(restore(loss)) is pytorch_metric_learning.losses.NTXentLoss
    True
    """
    return _turned(module, OURS)


def restore(module: M) -> M:
    """Undo `accelerate`: ours are theirs again, in place. Args, returns and errors as there."""
    return _turned(module, THEIRS)


def _turned(module: M, classes: dict[type, type]) -> M:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    for part in module.modules():
        if type(part) in classes:
            part.__class__ = classes[type(part)]
    return module


class patch:
    """Build ours wherever pytorch-metric-learning is asked for theirs, from now on; as a context manager, within it.

    `losses`, `miners` and `utils.distributed` of theirs export ours, in the whole process, so that imports and
    subclasses find them, and a class that was imported before builds ours as well. `undo` or the end of the context
    takes that back; what was built stays what it is, and `accelerate` turns what was built before.

    >>> import pytorch_metric_learning.losses
    >>> from fused_margins.compat.pytorch_metric_learning import losses, patch
    >>> with patch():
    ...     loss = pytorch_metric_learning.losses.NTXentLoss()
    >>> type(loss) is losses.NTXentLoss
    True
    >>> pytorch_metric_learning.losses.NTXentLoss is losses.NTXentLoss
    False
    """

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        if not _active:
            _install_hooks()
            _builds_as.update(OURS)
            _export(OURS)
        _active.append(self)

    def undo(self) -> None:
        """Take it back, once; theirs are theirs again when the last of several patches is undone."""
        if self in _active:
            _active.remove(self)
            if not _active:
                _builds_as.clear()
                _export(THEIRS)

    def __enter__(self) -> "patch":
        if self not in _active:  # after an end of it
            self._begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()


_active: list[patch] = []
_builds_as: dict[type, type] = {}


def _export(classes: dict[type, type]) -> None:
    """Under the names by which theirs are imported, these classes; their own code goes on to check for theirs.

    Not in the module that defines one, where pickle looks for the class of what was built before.
    """
    for old, new in classes.items():
        theirs = old if old in OURS else new
        package = sys.modules[theirs.__module__.rpartition(".")[0]]
        if vars(package).get(theirs.__name__) is old:
            setattr(package, theirs.__name__, new)


def _install_hooks() -> None:
    """Have their classes ask `_builds_as` what to build; for good: without its `__new__` a class takes no arguments."""
    for root in (
        ModuleWithRecords,
        _their_distributed.DistributedLossWrapper,
        _their_distributed.DistributedMinerWrapper,
    ):
        if "__new__" not in vars(root):
            root.__new__ = staticmethod(_building(root))


def _building(root: Any) -> Callable[..., Any]:
    def build(cls: type, *args: Any, **kwargs: Any) -> Any:
        return super(root, cls).__new__(_builds_as.get(cls, cls))

    return build
