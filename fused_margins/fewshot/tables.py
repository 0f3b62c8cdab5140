"""One table, shown in the terminal and written to Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table as RichTable


@dataclass(frozen=True)
class Table:
    """Rows of text below their column titles; the first column names the row.

    Example:
        >>> print(Table("Sizes", ["name", "bytes"], [["a", "1"]]).markdown())
        **Sizes**
        <BLANKLINE>
        | name | bytes |
        |---|---:|
        | a | 1 |
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: bool = True  # all but the first column to the right

    def markdown(self) -> str:
        lines = [
            f"**{self.title}**",
            "",
            _row(self.columns),
            "|---|" + ("---:|" if self.numeric else "---|") * (len(self.columns) - 1),
            *(_row(row) for row in self.rows),
        ]
        return "\n".join(lines)

    def rich(self) -> RichTable:
        table = RichTable(title=self.title, title_justify="left")
        for number, column in enumerate(self.columns):
            table.add_column(column, justify="right" if number and self.numeric else "left")
        for row in self.rows:
            table.add_row(*row)
        return table


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def percent(value: float, interval: float | None = None) -> str:
    """A fraction in percent, with half the width of its interval.

    >>> percent(0.5), percent(0.123, 0.0456)
    ('50.0', '12.3 ± 4.6')
    """
    return f"{100 * value:.1f}" + ("" if interval is None else f" ± {100 * interval:.1f}")
