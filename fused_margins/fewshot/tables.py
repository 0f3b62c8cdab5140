"""One table, shown in the terminal and in reports; and the figures in it as text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich import markup
from rich.table import Table as RichTable

NOT_FRACTIONS = ("discriminability", "modes", "variance")  # words in the names of figures that no percent suits


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
