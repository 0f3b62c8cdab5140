"""The site: pages are in its navigation, names of the reference are there, pictures drawn, and nothing is fetched."""

import importlib
import inspect
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def test_every_page_is_in_the_navigation():
    in_navigation = set(
        re.findall(r": (\S+\.(?:md|py))$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    )
    pages = {str(p.relative_to(DOCS)) for p in (*DOCS.rglob("*.md"), *DOCS.glob("notebooks/*.py"))}
    generated = {page for page in pages if page.startswith("benchmarks/")}  # their index has links to them
    assert in_navigation == pages - generated | {"benchmarks/index.md"}
    linked = re.findall(r"\((\S+\.md)\)", (DOCS / "benchmarks/index.md").read_text(encoding="utf-8"))
    assert {f"benchmarks/{page}" for page in linked} >= generated - {"benchmarks/index.md"}


def test_scripts_and_styles_of_the_site_are_here():
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    keys = ("extra_css", "extra_javascript", "polyfills")
    files = {key: re.search(rf"{key}: \[(.+?)\]", config)[1] for key in keys}
    assert all((DOCS / file).is_file() for file in files.values())
    # The search without a server: a script of another name would be fetched from a content network beside ours.
    assert "iframe-worker" in files["polyfills"]


def test_pictures_are_the_same_each_time_and_shown_with_a_text():
    drawn = runpy.run_path(str(DOCS / "site/pictures.py"))
    shown = dict(re.findall(r"!\[(.+?)\]\((pictures/\S+?)\)", (DOCS / "losses.md").read_text(encoding="utf-8")))
    assert sorted(shown.values()) == sorted(drawn["PICTURES"])
    assert all(len(text) > 80 for text in shown)
    for draw in drawn["PICTURES"].values():
        text = drawn["svg"](draw())
        assert text == drawn["svg"](draw())
        assert "<svg" in text


def test_the_picture_of_margins_overlaps_meets_and_parts():
    panels = runpy.run_path(str(DOCS / "site/pictures.py"))["margins"]().axes
    claimed = [[int((line.get_xdata() == line.get_xdata()).sum()) for line in axes.lines[:2]] for axes in panels]
    assert claimed[0][0] > claimed[1][0] > claimed[2][0]
    assert all(abs(first - second) <= 1 for first, second in claimed)
    assert sum(claimed[1]) == pytest.approx(3600, abs=3)


@pytest.mark.parametrize("notebook", sorted((DOCS / "notebooks").glob("*.py")), ids=lambda path: path.stem)
def test_notebooks_run(notebook, monkeypatch, capsys):
    monkeypatch.setenv("MPLBACKEND", "agg")
    shorter, found = re.subn(r"^(EPOCHS, \w+) = .*", r"\1 = 2, 2", notebook.read_text(encoding="utf-8"), flags=re.M)
    assert found == 1
    names = {"__name__": "notebook"}
    exec(compile(shorter, notebook.name, "exec"), names)
    names["pyplot"].close("all")
    assert "nan" not in capsys.readouterr().out
    drawn = [cell for cell in shorter.split("# %%") if "pyplot.subplots" in cell]
    links = re.findall(r"^# .*\]\((\S+?)\)", shorter, re.M)  # nobody rewrites or checks those of a notebook
    assert all((notebook.parent / re.sub(r"\.html$", ".md", link)).is_file() for link in links)
    assert not any(link.endswith(".md") for link in links)
    assert all(cell.startswith("\n# ") for cell in drawn)  # the site takes the comment for those who do not see


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


def test_attributes_of_the_reference_are_names():
    """One a line, then its text in deeper lines: the site takes whatever else stands there for names as well."""
    modules = [importlib.import_module(f"fused_margins.{name}") for name in ("losses", "clustering", "distributed")]
    documented = {member for module in modules for member in vars(module).values() if inspect.isclass(member)}
    sections = [re.search(r"^Attributes:\n((?: {4}.*\n)+)", inspect.getdoc(c) or "", re.M) for c in documented]
    lines = [line for section in sections if section for line in re.findall(r"^ {4}(\S.*)", section[1], re.M)]
    assert len(lines) > 10
    assert [line for line in lines if not re.match(r"[a-z_]+: ", line)] == []
