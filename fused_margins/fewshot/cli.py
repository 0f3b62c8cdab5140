"""The command `fused-margins`: train few-shot embeddings, judge them, and compare backends."""

import dataclasses
import io
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr
from typing import Annotated, Any

import tyro
from pydantic import ValidationError
from rich.markup import escape

from . import commands
from .config import contradictions, explain_validation
from .errors import UserError
from .memory import keep_freed_memory
from .presets import preset
from .ranks import check_alone
from .runs import Run
from .terminal import INTERRUPTED, errors

USER_ERROR = 2
LONGEST = 1000  # characters of an error

SUBCOMMANDS: dict[str, type] = {
    "demo": commands.Demo,
    "data": commands.Data,
    "embed": commands.Embed,
    "train": commands.Train,
    "evaluate": commands.Evaluate,
    "compare": commands.Compare,
    "heads": commands.Heads,
    "sweep": commands.Sweep,
    "coarse-to-fine": commands.CoarseToFine,
    "magnet": commands.MagnetStudy,
    "one-shot": commands.OneShot,
    "parity": commands.ParityCommand,
    "reproduce": commands.Reproduce,
    "doctor": commands.Doctor,
}


def parse(arguments: Sequence[str] | None, default: Any = None) -> Any:
    """The subcommand and its options; `default` is what a command of its type has where an option is not given."""
    choices: Any = None
    for name, command in SUBCOMMANDS.items():
        starts_from = default if type(default) is command else tyro.MISSING_NONPROP
        choice = Annotated[command, tyro.conf.subcommand(name, default=starts_from)]  # type: ignore[valid-type]
        choices = choice if choices is None else choices | choice
    printed = io.StringIO()
    try:
        with redirect_stderr(printed):
            return tyro.cli(choices, prog="fused-margins", args=arguments, description=__doc__)
    except SystemExit as exit_:
        for error in _causes(exit_):
            if isinstance(error, ValidationError):
                raise UserError(explain_validation(error)) from None
        if exit_.code:
            raise UserError(_reason(printed.getvalue())) from None
        raise


def _causes(error: BaseException) -> Iterator[BaseException]:
    """What led to an error, the last first."""
    cause = error.__context__
    while cause is not None:
        yield cause
        cause = cause.__context__


def _reason(text: str) -> str:
    """Why options do not parse, out of the message with a box and help around it that the parser prints.

    >>> _reason("╭─ Value error ─╮\\n│ Error parsing │\\n│ --seed: no │\\n│ ─────── │\\n│ Argument helptext: │\\n")
    '--seed: no'
    """
    lines = (line.strip("│| ") for line in text.splitlines()[1:])  # without its title
    words = " ".join(line for line in lines if not re.fullmatch("[╰╯─-]*", line))
    reason = re.split(" ?(?:Argument helptext:|For full helptext)", words.removeprefix("Error parsing "))[0]
    # Of options that are alike the names alone.
    reason = re.sub(r" Perhaps you meant: (--\S+).*", r"; perhaps you meant \1", reason)
    # What an optional value can be, and then Python's names of these types.
    reason = re.sub(
        r"no type matching (.*) could be instantiated from (.*?)\. Got errors.*", r"expected \1, got \2", reason
    )
    return textwrap.shorten(re.sub(r"\d{30}[\d ]+", "...", reason), 300)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; the exit code is 2 for a mistake of the user, 130 after an interrupt."""
    try:
        command = parse(arguments)
        if getattr(command, "preset", None) is not None:
            command = parse(arguments, type(command)(config=preset(command.preset)))
        if isinstance(command, commands.Evaluate):
            command = parse(arguments, commands.Evaluate(tyro.MISSING, Run(command.run).judging()))
        if not isinstance(command, commands.Train):
            check_alone(arguments[0] if arguments else sys.argv[1])
        elif command.resume:
            command = _with_stored_settings(command, arguments)
        return command.main()
    except ValidationError as error:
        return _fail(explain_validation(error))
    except UserError as error:
        return _fail(str(error))
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate memory", str(error)):
            raise
        return _fail("not enough memory: try a smaller batch_size, image_size, memory or network, or fewer workers")
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except KeyboardInterrupt:
        return INTERRUPTED


def _with_stored_settings(command: commands.Train, arguments: Sequence[str] | None) -> commands.Train:
    """The command with the settings of the run it resumes; others would lead to other numbers and are refused."""
    run = Run(command.folder())
    stored = run.config()
    resumed = parse(arguments, commands.Train(config=stored, judging=run.judging()))
    # Another preset than the run began with says every setting, as options say some.
    asked = (resumed if command.preset in (None, run.preset()) else command).settings()
    if asked.threads is None:  # those that the run found
        asked = asked.model_copy(update={"threads": stored.threads})
    changed = contradictions(stored, asked)
    if changed:
        raise UserError(f"resume: the run has {', '.join(changed)}; leave out what is to stay as it was")
    return dataclasses.replace(resumed, output=run.folder)


def _fail(message: str) -> int:
    message = message if len(message) < LONGEST else f"{message[:LONGEST]}..."  # what came may be of any length
    errors.print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    return USER_ERROR


def script() -> None:
    """`main` as a process of its own."""
    keep_freed_memory()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that this terminal cannot show is no reason to fail
    sys.exit(main())


if __name__ == "__main__":
    script()
