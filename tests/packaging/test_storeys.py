"""Arrows between the folders of the package point down only, and the trainer reaches only what is public."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "fused_margins"
STOREYS = {"core": 0, "backends": 1, "ops": 2, "functional": 3, "mining": 3, "losses": 4, "clustering": 4}
STOREYS |= {"clusters": 5, "kmeans": 5, "margins": 5}  # three import paths that users have
STOREYS |= {"compat": 6, "distributed": 6, "doctor": 6, "fewshot": 7, "command": 8}


def imports() -> Iterator[tuple[str, tuple[str, ...]]]:
    """The file, and what it imports of the package: the names below it."""
    for file in sorted(PACKAGE.rglob("*.py")):
        inside = ("fused_margins", *file.relative_to(PACKAGE).parts)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                targets = [tuple(alias.name.split(".")) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = inside[: len(inside) - node.level] if node.level else ()
                of_module = (*base, *filter(None, (node.module or "").split(".")))
                targets = [(*of_module, alias.name) for alias in node.names]
            else:
                continue
            yield from ((str(file.relative_to(PACKAGE)), t[1:]) for t in targets if t[0] == "fused_margins" and t[1:])


def test_imports_go_down_only():
    found = [(f, f.split("/")[0].removesuffix(".py"), t) for f, t in imports()]
    assert {room for _, room, _ in found} > {"backends", "ops", "mining", "losses", "clustering", "fewshot"}
    # What is not in the list is a name of the package itself, which has that of the losses.
    up = [(f, t) for f, room, t in found if STOREYS.get(t[0], 5) > STOREYS.get(room, 9)]
    assert up == []
    assert {f.split("/")[0] for f, _, t in found if t[0] == "compat"} <= {"compat"}, "it needs what others do not"


def test_the_trainer_reaches_only_what_is_public():
    private = [(f, t) for f, t in imports() if f.startswith("fewshot/") and any(n.startswith("_") for n in t)]
    assert [p for p in private if p[1][0] != "fewshot"] == []
