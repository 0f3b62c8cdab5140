"""What the user sees while something runs: lines of text, and a bar with its rate and the time that remains."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from .errors import printable

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
