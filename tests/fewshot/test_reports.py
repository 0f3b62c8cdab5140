"""The page: valid, whole in itself, and everything in it escaped."""

from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.figure import Figure

from fused_margins.fewshot.reports import Picture, Report, Section, Table

VOID = {"meta", "img", "br", "hr", "link"}


class Checked(HTMLParser):
    """Notes tags that do not balance, and whatever an attribute would load."""

    def __init__(self, text):
        super().__init__()
        self.open, self.loads, self.tags = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.loads += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]

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
        "# a < b & c\n\nlead <script>\n\n## x > y\n\n1 < 2\n\n**t<**\n\n| name | v&w |\n|---|---:|\n| <b> | 1\\|2 |\n"
        '\n![a "caption"](p.png)\n'
    )


def test_what_is_no_png_is_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros(3))
    with pytest.raises(ValueError, match="path: expected a PNG file"):
        Picture(tmp_path / "x.npy", "caption").source()
