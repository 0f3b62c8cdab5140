"""A drop-in whose package is not installed says which extra brings it."""

import importlib
import sys
from types import ModuleType

import pytest


class Old(ModuleType):
    __version__ = "5.4.1"


@pytest.mark.parametrize(("found", "got"), [(None, "got none"), (Old("sentence_transformers"), "got 5.4.1")])
def test_without_sentence_transformers_the_extra_is_named(monkeypatch, found, got):
    monkeypatch.setitem(sys.modules, "sentence_transformers", found)
    monkeypatch.delitem(sys.modules, "fused_margins.compat.sentence_transformers", raising=False)
    expected = f"sentence-transformers 6.0 or newer, {got}; .*fused-margins\\[sentence-transformers\\]"
    with pytest.raises(ImportError, match=expected):
        importlib.import_module("fused_margins.compat.sentence_transformers")
