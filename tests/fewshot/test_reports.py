"""The page: valid, whole in itself, and everything in it escaped."""

import csv
import json
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.figure import Figure

from fused_margins.fewshot import plots
from fused_margins.fewshot.reports import Picture, Report, Section, Table
from fused_margins.fewshot.studies import NO_DIFFERENCE, REPRODUCED, Verdict, claims_table

VOID = {"meta", "img", "br", "hr", "link"}


class Checked(HTMLParser):
    """Notes tags that do not balance, and whatever an attribute would load."""

    def __init__(self, text):
        super().__init__()
        self.open, self.loads, self.links, self.tags, self.images = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.loads += [value for name, value in attributes if name in ("src", "srcset", "data")]
        self.links += [value for name, value in attributes if name == "href"]
        self.images += [dict(attributes)] if tag == "img" else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def page(tmp_path):
    figure = Figure(figsize=(1, 1))
    figure.savefig(tmp_path / "p.png")
    table = Table("t<", ["name", "v&w"], [["<b>", "1|2"]])
    section = Section("x > y", ["1 < 2"], [table], [Picture(tmp_path / "p.png", 'a "caption"')])
    return Report("a < b & c", "lead <script>", [section])


def test_a_page_is_whole_in_itself_and_its_tags_balance(page, tmp_path):
    page.write(tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    checked = Checked(text)
    assert checked.open == []
    assert len(checked.loads) == 1
    assert checked.loads[0].startswith("data:image/png;base64,")
    assert all(link.startswith("#") or (tmp_path / link).exists() for link in checked.links)
    assert "http" not in text.replace("http-equiv", "")
    assert {"table", "figure", "h1", "h2"} <= set(checked.tags)
    assert "script" not in checked.tags
    assert "b" not in checked.tags


def test_text_is_escaped(page):
    text = page.html()
    for piece in ("a &lt; b &amp; c", "&lt;script&gt;", "x &gt; y", "v&amp;w", "&lt;b&gt;", "a &#34;caption&#34;"):
        assert piece in text


def test_markdown_has_the_same_and_links_pictures(page, tmp_path):
    page.write(tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert text == (
        "# a < b & c\n\nlead &lt;script>\n\n## x > y\n\n1 < 2\n\n**t<**\n\n"
        "| name | v&w |\n|---|---:|\n| &lt;b> | 1\\|2 |\n"
        '\n![a "caption"](p.png)\n'
    )


def test_what_is_no_png_is_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros(3))
    with pytest.raises(ValueError, match="path: expected a PNG file"):
        Picture(tmp_path / "x.npy", "caption").source()


METHODS = [
    ["a", "5.0 ± 1.0", "2.00"],
    ["b", "7.0 ± 1.0", "2.00"],
    ["c", "-", "1.50 ± 0.10"],
    ["b minus a", "+2.0", "-9"],
]


@pytest.mark.parametrize(
    ("title", "columns", "best"),
    [
        ("Percent", ["", "1-shot", "modes"], {(1, 1), (0, 2), (1, 2)}),
        ("Percent", ["", "kNC error", "modes"], {(0, 1), (0, 2), (1, 2)}),
        ("Error", ["", "L = 1", "L = 2"], {(0, 1), (2, 2)}),
        ("Percent", ["figure", "a", "b"], set()),  # nothing says that rows compare
    ],
)
def test_the_best_of_each_column_is_bold(title, columns, best):
    table = Table(title, columns, METHODS)
    assert table.best() == best
    page = Report("", "", [Section("", tables=[table])]).html()
    assert page.count("<b>") == len(best)
    for row, column in best:
        assert f"<td><b>{METHODS[row][column]}</b></td>" in page
    assert ("Bold: " in page) == bool(best)


def test_the_head_says_what_was_asked_and_found():
    verdicts = [Verdict("x", "y", outcome, "") for outcome in (REPRODUCED, NO_DIFFERENCE, REPRODUCED)]
    tables = [Table("", ["", "1-shot", "modes"], METHODS), claims_table(verdicts)]
    checks = Table("", ["loss", "within 0.1"], [["a", "yes"], ["b", "NO"]])
    page = Report("", "", [Section("Margins", tables=tables), Section("Parity", tables=[checks])]).html()
    head = page[: page.index("</header>")]
    assert '<li><a href="#section-1">Margins</a>' in head
    assert "1-shot: highest 7.0 ± 1.0 (b), lowest 5.0 ± 1.0 (a). Claims: 2 reproduced, 1 no difference seen." in head
    close = Table("", ["", "1-shot"], [["a", "95.1 ± 37.3"], ["b", "95.0 ± 38.1"]])
    assert list(close.findings()) == [
        "1-shot: highest 95.1 ± 37.3 (a), lowest 95.0 ± 38.1 (b), whose intervals overlap."
    ]
    assert '<li><a href="#section-2">Parity</a><span>Within 0.1: 1 of 2.</span>' in head
    assert '<h2 id="section-2">Parity</h2>' in page
    assert "<span>as it is</span>" in Report("", "", [Section("", tables=tables, answer="as it is")]).html()


def test_the_head_says_when_and_how_the_report_was_made(page, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/fused-margins", "demo", "--output", "a b"])
    facts = dict(piece.split("</dt><dd>") for piece in page.html().split("<dt>")[1:])
    assert facts["Written"].startswith("20")
    assert facts["Command"].startswith("fused-margins demo --output &#39;a b&#39;</dd>")
    assert "torch" in facts["Versions"]
    assert "cores" in facts["Machine"]


def test_runs_and_figures_beside_a_report_are_linked(page, tmp_path):
    for name in ("margins/m 0", "margins/m 1", "parity/x"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "report.json").write_text("{}")
    (tmp_path / "margins/m 1/report.html").touch()
    (tmp_path / "studies.json").touch()
    page.write(tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<summary>3 beside this page</summary>" in text
    links = ["figures.csv", "figures.json", "studies.json"]
    links += ["margins/m%200/report.json", "margins/m%201/report.html", "parity/x/report.json"]
    assert [link for link in Checked(text).links if not link.startswith("#")] == links


def test_figures_are_there_as_csv_and_json(tmp_path):
    Report("", "", [Section("s", tables=[Table("t", ["", "1-shot", "modes"], METHODS)])]).write(tmp_path)
    records = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    with open(tmp_path / "figures.csv", encoding="utf-8", newline="") as file:
        assert list(csv.DictReader(file)) == records
    first = {"section": "s", "table": "t", "row": "a", "column": "1-shot", "value": "5.0", "interval": "1.0"}
    assert (records[0], len(records)) == (first, 8)


def test_wide_tables_scroll_in_a_box_that_keys_reach_and_keep_their_first_column(page):
    text = page.html()
    assert '<div class="table" tabindex="0" role="group" aria-label="t&lt;">' in text
    assert "tr > :first-child { position: sticky; left: 0;" in text
    assert "overflow-x: auto" in text
    assert '<th scope="col"></th>' not in Report("", "", [Section("", tables=[Table("", ["", "x"], [])])]).html()


def test_pictures_say_what_is_seen_and_plots_of_lines_are_svg(tmp_path):
    plots.sweep(tmp_path / "s.png", [-0.3, 0.0, 0.3], {"accuracy, %": {"novel": [[48.0], [50.0], [49.0]]}}, "margin")
    picture = Picture(tmp_path / "s.png", "caption")
    (image,) = Checked(Report("", "", [Section("", pictures=[picture])]).html()).images
    assert image["src"].startswith("data:image/svg+xml;base64,")
    assert image["alt"] == "accuracy, % by margin: novel from 48 at -0.3 to 49 at 0.3, highest 50 at 0."
    assert image["class"] == "plot"
