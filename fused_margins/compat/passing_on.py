"""Modules of another library under the names of ours, so that a changed import finds all that theirs finds."""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec, spec_from_loader
from types import ModuleType
from typing import Any


class _Theirs(MetaPathFinder, Loader):
    """Finds `OURS.name` as the very module `THEIRS.name`, where ours have no module of that name."""

    def __init__(self, ours: str, theirs: str, without: Sequence[str]) -> None:
        self.ours, self.theirs, self.without = f"{ours}.", f"{theirs}.", tuple(f"{ours}.{name}." for name in without)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if not name.startswith(self.ours) or name.startswith(self.without):
            return None
        parent = sys.modules[name.rpartition(".")[0]]
        if f"{parent.__name__}.".startswith(self.ours) and PathFinder.find_spec(name, path):
            return None
        try:
            known = find_spec(self._their_name(name))
        except ModuleNotFoundError:
            return None
        return known and spec_from_loader(name, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self._their_name(spec.name))
        spec.loader_state = module.__spec__, module.__loader__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """It has been; what the import system has written over is what it was."""
        spec = module.__spec__
        if spec is not None and spec.loader is self:
            module.__spec__, module.__loader__ = spec.loader_state

    def _their_name(self, name: str) -> str:
        return self.theirs + name.removeprefix(self.ours)


def pass_on(ours: str, theirs: str, without: Sequence[str] = ()) -> None:
    """Have imports of modules within the package `ours` find those of `theirs`.

    without: packages of ours, within which no module is theirs: it would have classes that ours replace.
    """
    # Before others, which would load the files of their packages a second time, under our name.
    sys.meta_path.insert(0, _Theirs(ours, theirs, without))


def attribute_of(ours: str, theirs: ModuleType, name: str) -> Any:
    """What a package of ours gives for a name that it does not have: an attribute of theirs, or a module of theirs."""
    if not name.startswith("_"):
        if hasattr(theirs, name) and not isinstance(getattr(theirs, name), ModuleType):
            return getattr(theirs, name)
        try:
            return importlib.import_module(f"{ours}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{ours}.{name}":
                raise
    raise AttributeError(f"module {ours!r} has no attribute {name!r}")
