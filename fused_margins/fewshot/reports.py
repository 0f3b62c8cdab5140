"""A report: sections of text, tables and pictures, as a page, as Markdown, and its figures as CSV and JSON.

The page is one file: style and pictures are inside, it loads nothing, opens offline, and suits a phone. At its head
stand what was asked and found, and when, by which command and where; files and runs beside it are linked.
"""

import base64
import csv
import io
import math
import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from rich import markup
from rich.table import Table as RichTable

from ..doctor import instruction_sets, versions
from .page import MARKDOWN, PAGE, STYLE
from .runs import write_json, write_text

FIGURES = ("figures.csv", "figures.json")  # of all tables
NOT_FRACTIONS = ("discriminability", "modes", "variance")  # words in the names of figures that no percent suits
LOWER_IS_BETTER = ("error", "seconds")  # words in the titles of columns, or of their table
VALUE = re.compile(r"(\d+(?:\.\d+)?)(?: ± (\d+(?:\.\d+)?))?")  # as `figure_text` writes one; a difference has a sign
TAG = re.compile("<(?=[A-Za-z/!?])")  # what begins one in Markdown; "a < 0" does not
DOTS_PER_CSS_PIXEL = 1.5  # pictures are drawn that much finer than they are shown, for sharp screens and print


@dataclass(frozen=True)
class Table:
    """Rows of text below their column titles; the first column names the row.

    Where that column has no title, rows are what is compared, and each column of figures has a best one. A column
    "outcome" is of claims, one of "yes" and "NO" of checks: both are counted at the head of a report.

    >>> table = Table("", ["", "kNC error"], [["magnet", "5.0 ± 0.1"], ["softmax", "7.0"], ["the difference", "-2.0"]])
    >>> table.best(), list(table.findings())
    ({(0, 1)}, ['kNC error: lowest 5.0 ± 0.1 (magnet), highest 7.0 (softmax).'])
    """

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

    def best(self) -> set[tuple[int, int]]:
        """Row and column of the best value of each column of figures; several where they read the same."""
        found: set[tuple[int, int]] = set()
        for column in range(1, len(self.columns)):
            values = self._values(column)
            if len(values) > 1:
                best = (min if self._lower_is_better(column) else max)(values.values())
                found |= {(row, column) for row, value in values.items() if value == best}
        return found

    def findings(self) -> Iterator[str]:
        """What the first column of figures says, and how many claims and checks came out how."""
        values = self._values(1)
        if len(values) > 1:
            order = sorted(values, key=lambda row: values[row], reverse=not self._lower_is_better(1))
            best, worst = (self.rows[row] for row in (order[0], order[-1]))
            words = ("lowest", "highest") if self._lower_is_better(1) else ("highest", "lowest")
            text = f"{self.columns[1]}: {words[0]} {best[1]} ({best[0]}), {words[1]} {worst[1]} ({worst[0]})"
            yield text + (", whose intervals overlap." if self._overlap(order[0], order[-1]) else ".")
        for column, title in enumerate(self.columns):
            cells = [row[column] for row in self.rows]
            if title == "outcome":
                yield (
                    "Claims: "
                    + ", ".join(f"{count} {outcome}" for outcome, count in Counter(cells).most_common())
                    + "."
                )
            elif cells and {"yes", "NO"}.issuperset(cells):
                yield f"{title[0].upper()}{title[1:]}: {cells.count('yes')} of {len(cells)}."

    def _overlap(self, row: int, other: int) -> bool:
        """Whether the intervals of two rows in the first column of figures have values in common."""
        both = [VALUE.fullmatch(self.rows[number][1]) for number in (row, other)]
        (a, of_a), (b, of_b) = ((float(match[1]), float(match[2] or 0)) for match in both if match)
        return abs(a - b) < of_a + of_b

    def records(self) -> Iterator[dict[str, str]]:
        """A cell each, under the names of its row and column; a figure and its interval apart."""
        for row in self.rows:
            for column, cell in zip(self.columns[1:], row[1:]):
                value, _, interval = cell.partition(" ± ")
                yield {"table": self.title, "row": row[0], "column": column, "value": value, "interval": interval}

    def _values(self, column: int) -> dict[int, float]:
        """Of the rows that are compared the figures in a column."""
        if not self.numeric or self.columns[0]:
            return {}
        found = {number: VALUE.fullmatch(row[column]) for number, row in enumerate(self.rows)}
        return {number: float(match[1]) for number, match in found.items() if match}

    def _lower_is_better(self, column: int) -> bool:
        return any(word in f"{self.title} {self.columns[column]}".lower() for word in LOWER_IS_BETTER)


@dataclass(frozen=True)
class Picture:
    """A PNG file, and beside it, of a plot of lines, an SVG file of the same name, which the page takes instead.

    Dark screens turn a plot dark, but no photographs.
    """

    path: Path
    caption: str
    photographs: bool = False

    def source(self) -> str:
        """Its size on a page, and the file as it is now."""
        with self._png() as png:
            width, height = (round(size / DOTS_PER_CSS_PIXEL) for size in png.size)
        drawing = self.path.with_suffix(".svg")
        path, kind = (drawing, "svg+xml") if drawing.exists() else (self.path, "png")
        encoded = base64.b64encode(path.read_bytes()).decode()
        return f'width="{width}" height="{height}" src="data:image/{kind};base64,{encoded}"'

    def seen(self) -> str:
        """What the file says is to be seen on it (see `plots.save`); its caption where it says nothing."""
        with self._png() as png:
            return str(png.info.get("Description", self.caption))

    def _png(self) -> Image.Image:
        try:
            return Image.open(self.path, formats=["PNG"])
        except UnidentifiedImageError:
            raise ValueError(f"path: expected a PNG file, {self.path} is none") from None


@dataclass(frozen=True)
class Section:
    """Below a heading paragraphs, then tables, then pictures; `answer` is what they say, by default what tables say."""

    title: str
    texts: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    answer: str = ""

    def finding(self) -> str:
        """For the head of a report; empty where no table finds anything."""
        return self.answer or " ".join(finding for table in self.tables for finding in table.findings())


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

    def html(self, files: Sequence[str] = (), runs: Mapping[str, Mapping[str, str]] | None = None) -> str:
        """One page; all text is escaped.

        Args:
            files: beside the page, to be linked.
            runs: for each study names of runs and their pages, as links from this one.
        """
        return _template(PAGE, escape=True).render(report=self, style=STYLE, facts=facts(), files=files, runs=runs)

    def markdown(self, folder: Path) -> str:
        """For a file in `folder`, where pictures are linked. No text, such as the name of a class, becomes a tag."""
        text = _template(MARKDOWN, escape=False).render(report=self, folder=folder, row=_row)
        return TAG.sub("&lt;", text)

    def write(self, folder: Path) -> None:
        """report.html, report.md, figures.csv and figures.json, each whole or not at all."""
        records = [{"section": s.title, **record} for s in self.sections for t in s.tables for record in t.records()]
        text = io.StringIO(newline="")
        columns = ["section", "table", "row", "column", "value", "interval"]
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        write_text(folder / "figures.csv", text.getvalue())
        write_json(folder / "figures.json", records)
        # What has all digits: a study's trainings, or the result of this run.
        files = [name for name in (*FIGURES, "studies.json", "report.json") if (folder / name).exists()]
        write_text(folder / "report.html", self.html(files, _runs_below(folder)))
        write_text(folder / "report.md", self.markdown(folder))


def facts() -> list[tuple[str, str]]:
    """When, by which command, with what and on what machine this is written."""
    command = [Path(sys.argv[0]).name, *sys.argv[1:]]
    if command[0] == "command.py":  # python -m fused_margins.command
        command[0] = "fused-margins"
    gpus = ", ".join(map(torch.cuda.get_device_name, range(torch.cuda.device_count()))) or "no GPU"
    return [
        ("Written", f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC"),
        ("Command", shlex.join(command)),
        ("Versions", ", ".join(f"{name} {version}" for name, version in versions().items())),
        ("Machine", f"{os.cpu_count()} cores, {instruction_sets()}, {gpus}"),
    ]


def _runs_below(folder: Path) -> dict[str, dict[str, str]]:
    """Of each study in a folder its runs: their own pages, or their figures where they have none."""
    runs: dict[str, dict[str, str]] = {}
    for result in sorted(folder.glob("*/*/report.json")):
        page = result.with_suffix(".html")
        link = (page if page.exists() else result).relative_to(folder).as_posix()
        runs.setdefault(result.parent.parent.name, {})[result.parent.name] = link
    return runs


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
