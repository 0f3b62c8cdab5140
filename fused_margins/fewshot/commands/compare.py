"""The subcommand that tabulates stored runs."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from ..compare import SUFFIXES, Comparison, read_runs
from ..errors import UserError
from ..terminal import console, say


@dataclass(frozen=True)
class Compare:
    """Tabulate finished runs: settings that differ, figures, and paired differences to the first group of runs.

    Runs that differ only in their seed are one group, shown as mean and 95% interval.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs, or with runs below them; the first run's group is what the others are compared with."""
    output: Path | None = None
    """File to write as well: .html, .md or .json."""

    def main(self) -> int:
        if self.output is not None and self.output.suffix not in SUFFIXES:
            raise UserError(f"output: expected a file name ending in {', '.join(SUFFIXES)}, got {self.output}")
        runs, left_out = read_runs(self.runs)
        for what in left_out:
            say(f"left out: {what}")
        comparison = Comparison(runs)
        for table in comparison.tables():
            console.print(table.rich())
        if self.output is not None:
            comparison.write(self.output)
            say(f"written: {self.output}")
        return 0
