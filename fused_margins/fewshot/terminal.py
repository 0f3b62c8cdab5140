"""What the user sees: lines of text, a bar with its rate and the time that remains, and a mistake in a single line."""

import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


def printable(name: str) -> str:
    r"""A name with escapes for what no line of text can hold: control characters, and bytes that are not UTF-8.

    >>> printable("caf\udce9\n")
    'caf\\xe9\\n'
    """
    return "".join(_escaped(c) if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") else c for c in name)


def _escaped(character: str) -> str:
    code = ord(character)
    # Python keeps byte b of a name that is not UTF-8 as the character 0xDC00 + b.
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else ascii(character)[1:-1]


class UserError(Exception):
    """A mistake that the user can correct (a path, an option, a damaged file): shown without a traceback."""

    def __str__(self) -> str:
        return printable(super().__str__())


INTERRUPTED = 130  # what a shell reports for a command that Ctrl-C ended

# In a file or a pipe there is no edge to break a table at.
console = Console(width=None if sys.stdout.isatty() else 160)
errors = Console(stderr=True)


def say(text: str) -> None:
    """One line as it is: no markup, no line breaks within a path."""
    console.print(printable(text), markup=False, highlight=False, soft_wrap=True)


class _RateColumn(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} {self.unit}/s", style="progress.data.speed")


@contextmanager
def progress(
    description: str, total: int, unit: str, completed: int = 0, console: Console = console
) -> Iterator[Callable[[], None]]:
    """A bar that the yielded function advances by one `unit`; silent where the output is no terminal."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(unit),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=total, completed=completed)
        yield lambda: bar.advance(task)
