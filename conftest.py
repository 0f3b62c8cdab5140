"""Doctests that need a package that is not installed are left out: a drop-in's modules, and sections of a page."""

import ast
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

collect_ignore = ["docs/site", "docs/notebooks"]  # the documentation's own tools, and what a test runs
COMPAT = Path(__file__).parent / "fused_margins" / "compat"
_left_out: list[str] = []


def packages(code: str) -> Iterator[str]:
    """What the code imports; of a drop-in that is a package, the library that it needs."""
    for node in ast.walk(ast.parse(code)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
        for name in names:
            first, *_ = name.removeprefix("fused_margins.compat.").split(".")
            stands_in = name.startswith("fused_margins.compat.") and not (COMPAT / first).is_dir()
            yield "fused_margins" if stands_in else first


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Of a drop-in whose library is missing, the package."""
    missing = collection_path.parent == COMPAT and collection_path.is_dir() and find_spec(collection_path.name) is None
    return True if missing and collection_path.name != "__pycache__" else None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a page, the sections whose examples import what is missing."""
    for item in items:
        if item.path.suffix != ".md":
            continue
        if item.path.name == "training.md":  # where others' code runs, whose warnings are its own
            item.add_marker(pytest.mark.filterwarnings("ignore"))
        lines = item.path.read_text(encoding="utf-8").splitlines()
        headings = [i for i, line in enumerate(lines) if re.match("#{1,6} ", line)]
        sections: dict[int, list[Any]] = {}
        for example in item.dtest.examples:  # type: ignore[attr-defined]
            sections.setdefault(max([i for i in headings if i <= example.lineno], default=0), []).append(example)
        for heading, examples in sections.items():
            missing = {p for e in examples for p in packages(e.source) if find_spec(p) is None}
            if missing:
                _left_out.append(
                    f"{lines[heading].lstrip('# ')} in {item.path.name} (needs {', '.join(sorted(missing))})"
                )
                sections[heading] = []
        item.dtest.examples[:] = [e for examples in sections.values() for e in examples]  # type: ignore[attr-defined]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _left_out:
        terminalreporter.write_line(f"sections left out: {'; '.join(_left_out)}")
