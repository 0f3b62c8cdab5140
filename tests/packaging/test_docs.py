"""The site: every page is in its navigation, every name of the API reference is there, and nothing comes from elsewhere."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def test_every_page_is_in_the_navigation():
    in_navigation = set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE))
    pages = {str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md")}
    generated = {page for page in pages if page.startswith("benchmarks/")}  # their index has links to them
    assert in_navigation == pages - generated | {"benchmarks/index.md"}
    linked = re.findall(r"\((\S+\.md)\)", (DOCS / "benchmarks/index.md").read_text(encoding="utf-8"))
    assert {f"benchmarks/{page}" for page in linked} >= generated - {"benchmarks/index.md"}


def test_scripts_and_styles_of_the_site_are_here():
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    found = {key: re.search(rf"{key}: \[(.+?)\]", config) for key in ("extra_css", "extra_javascript", "polyfills")}
    files = {key: match[1] for key, match in found.items() if match}
    assert all((DOCS / file).is_file() for file in files.values())
    # The search without a server: a script of another name would be fetched from a content network beside ours.
    assert "iframe-worker" in files["polyfills"]


NAMES = [name for page in sorted(DOCS.glob("api/*.md")) for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M)]


@pytest.mark.parametrize("name", NAMES)
def test_every_name_of_the_reference_is_there(name):
    if "sentence_transformers" in name:
        pytest.importorskip("sentence_transformers", reason="needs the sentence-transformers extra")
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, attribute = name.rpartition(".")
        getattr(importlib.import_module(module), attribute)
