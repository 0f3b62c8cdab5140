"""A report: sections of text, tables and pictures, as a page and as Markdown, one template each.

The page is one file: style and pictures are inside, it loads nothing, opens offline, and suits a phone.
"""

import base64
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import markup
from rich.table import Table as RichTable

from .runs import write_text

NOT_FRACTIONS = ("discriminability", "modes", "variance")  # words in the names of figures that no percent suits
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
DOTS_PER_CSS_PIXEL = 1.5  # pictures are drawn that much finer than they are shown, for sharp screens and print

STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --faint: #5f6670; --paper: #fff; --line: #dfe3e8; --band: #f4f6f8 }
@media (prefers-color-scheme: dark) {
  :root { --text: #e3e6ea; --faint: #9aa3ae; --paper: #14171a; --line: #31373e; --band: #1d2125 }
  img.plot { filter: invert(0.92) hue-rotate(180deg) }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 62rem; background: var(--paper); color: var(--text);
  font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .4rem }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; padding-top: .9rem; border-top: 1px solid var(--line) }
p { max-width: 44rem; margin: .6rem 0 }
.lead, figcaption { color: var(--faint) }
.table, .picture { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .8rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line);
  overflow-wrap: normal }
thead th { border-bottom: 2px solid var(--line); vertical-align: bottom }
tbody th { font-weight: normal }
.numeric td, .numeric th:not(:first-child) { text-align: right; white-space: nowrap }
tbody tr:nth-child(even) { background: var(--band) }
figure { margin: 1rem 0 }
figcaption { font-size: .9rem; max-width: 44rem; margin: .4rem 0 }
/* What is wider than a phone shrinks to 36rem at most, so that its text stays legible, and scrolls. */
img { display: block; height: auto; max-width: max(100%, 36rem) }
@media print {
  :root { color-scheme: light; --text: #000; --faint: #444; --paper: #fff; --line: #bbb; --band: #fff }
  body { max-width: none; padding: 0; font-size: 10pt }
  img.plot { filter: none }
  .picture, tr { break-inside: avoid }
  h2, figcaption { break-after: avoid }
  img { max-width: 100% }
  .table, .picture { overflow: visible }
}
"""

# default-src 'none' keeps a browser from loading whatever a text might smuggle in.
PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ report.title }}</title>
<style>{{ style|safe }}</style>
</head>
<body>
<h1>{{ report.title }}</h1>
<p class="lead">{{ report.lead }}</p>
{% for section in report.sections %}
<h2>{{ section.title }}</h2>
{% for text in section.texts %}
<p>{{ text }}</p>
{% endfor %}
{% for table in section.tables %}
<figure><figcaption>{{ table.title }}</figcaption>
<div class="table"><table{% if table.numeric %} class="numeric"{% endif %}>
<thead><tr>{% for column in table.columns %}<th scope="col">{{ column }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows %}
<tr>{% for cell in row %}\
{% if loop.first %}<th scope="row">{{ cell }}</th>{% else %}<td>{{ cell }}</td>{% endif %}\
{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div></figure>
{% endfor %}
{% for picture in section.pictures %}
<figure><div class="picture"><img class="{{ "photographs" if picture.photographs else "plot" }}" \
{{ picture.source()|safe }} alt="{{ picture.caption }}"></div>
<figcaption>{{ picture.caption }}</figcaption></figure>
{% endfor %}
{% endfor %}
</body>
</html>
"""

MARKDOWN = """\
# {{ report.title }}

{{ report.lead }}
{% for section in report.sections %}

## {{ section.title }}
{% for text in section.texts %}

{{ text }}
{% endfor %}
{% for table in section.tables %}

**{{ table.title }}**

{{ row(table.columns) }}
|---|{{ ("---:|" if table.numeric else "---|") * (table.columns|length - 1) }}
{% for cells in table.rows %}
{{ row(cells) }}
{% endfor %}
{% endfor %}
{% for picture in section.pictures %}

![{{ picture.caption }}]({{ picture.path.relative_to(folder).as_posix() }})
{% endfor %}
{% endfor %}
"""


@dataclass(frozen=True)
class Table:
    """Rows of text below their column titles; the first column names the row."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: bool = True  # all but the first column to the right

    def rich(self) -> RichTable:
        table = RichTable(title=markup.escape(self.title), title_justify="left")
        for number, column in enumerate(self.columns):
            table.add_column(markup.escape(column), justify="right" if number and self.numeric else "left")
        for row in self.rows:
            table.add_row(*map(markup.escape, row))
        return table


@dataclass(frozen=True)
class Picture:
    """A PNG file; dark screens turn a plot dark, but no photographs."""

    path: Path
    caption: str
    photographs: bool = False

    def source(self) -> str:
        """Its size on a page, and the file as it is now."""
        data = self.path.read_bytes()
        if not data.startswith(PNG_SIGNATURE):
            raise ValueError(f"path: expected a PNG file, {self.path} is none")
        width, height = (round(size / DOTS_PER_CSS_PIXEL) for size in struct.unpack(">II", data[16:24]))
        encoded = base64.b64encode(data).decode()
        return f'width="{width}" height="{height}" src="data:image/png;base64,{encoded}"'


@dataclass(frozen=True)
class Section:
    """Below a heading paragraphs, then tables, then pictures."""

    title: str
    texts: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()


@dataclass(frozen=True)
class Report:
    """A title, a sentence or two below it, and sections.

    Example:
        >>> table = Table("Percent", ["margin", "1-shot"], [["-0.3", "48.7"]])
        >>> report = Report("Margins", "What a < 0 does.", [Section("Accuracy", tables=[table])])
        >>> "What a &lt; 0 does." in report.html()
        True
        >>> print(report.markdown(Path()))
        # Margins
        <BLANKLINE>
        What a < 0 does.
        <BLANKLINE>
        ## Accuracy
        <BLANKLINE>
        **Percent**
        <BLANKLINE>
        | margin | 1-shot |
        |---|---:|
        | -0.3 | 48.7 |
        <BLANKLINE>
    """

    title: str
    lead: str
    sections: Sequence[Section]

    def html(self) -> str:
        """One page; all text is escaped."""
        return _template(PAGE, escape=True).render(report=self, style=STYLE)

    def markdown(self, folder: Path) -> str:
        """For a file in `folder`, where pictures are linked."""
        return _template(MARKDOWN, escape=False).render(report=self, folder=folder, row=_row)

    def write(self, folder: Path) -> None:
        """report.html and report.md, each whole or not at all."""
        write_text(folder / "report.html", self.html())
        write_text(folder / "report.md", self.markdown(folder))


def percent(value: float, interval: float | None = None) -> str:
    """A fraction in percent, with half the width of its interval.

    >>> percent(0.5), percent(0.123, 0.0456)
    ('50.0', '12.3 ± 4.6')
    """
    return f"{100 * value:.1f}" + ("" if interval is None else f" ± {100 * interval:.1f}")


def figure_text(name: str, value: float | None, interval: float | None = None, signed: bool = False) -> str:
    """A figure of an evaluation: fractions in percent, what is none (see `NOT_FRACTIONS`) as it is, "-" for no value.

    >>> figure_text("nmi", 0.5), figure_text("novel_discriminability", 2.5, 0.25), figure_text("nmi", None)
    ('50.0', '2.50 ± 0.25', '-')
    >>> figure_text("nmi", 0.05, 0.02, signed=True)  # of a difference
    '+5.0 ± 2.0'
    """
    if value is None or math.isnan(value):
        return "-"
    if not any(word in name for word in NOT_FRACTIONS):
        text = percent(value, interval)
    else:
        text = f"{value:.2f}" + ("" if interval is None else f" ± {interval:.2f}")
    return f"+{text}" if signed and value >= 0 else text


def _template(text: str, escape: bool):  # type: ignore[no-untyped-def]  # jinja2's
    from jinja2 import Environment

    environment = Environment(autoescape=escape, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    return environment.from_string(text)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
