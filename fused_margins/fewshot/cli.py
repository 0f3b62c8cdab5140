"""The command `fused-margins`: train few-shot embeddings, judge them, and compare backends."""

import dataclasses
import io
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro
from pydantic import ValidationError
from rich.markup import escape

from . import commands
from .config import Judging, TrainConfig, explain_validation
from .errors import UserError
from .memory import keep_freed_memory
from .presets import preset
from .runs import Run
from .terminal import INTERRUPTED, errors

USER_ERROR = 2


SUBCOMMANDS: dict[str, type] = {
    "demo": commands.Demo,
    "data": commands.Data,
    "train": commands.Train,
    "evaluate": commands.Evaluate,
    "compare": commands.Compare,
    "sweep": commands.Sweep,
    "coarse-to-fine": commands.CoarseToFine,
    "magnet": commands.MagnetStudy,
    "one-shot": commands.OneShot,
    "parity": commands.ParityCommand,
    "reproduce": commands.Reproduce,
    "doctor": commands.Doctor,
}


def parse(arguments: Sequence[str] | None, base: TrainConfig | None = None, judging: Judging | None = None) -> Any:
    """The subcommand and its options; `base` and `judging` take the place of the defaults of training and judgement."""
    choices: Any = None
    for name, command in SUBCOMMANDS.items():
        trains = any(f.name == "config" for f in dataclasses.fields(command))
        default = command(config=base) if trains and base is not None else tyro.MISSING_NONPROP
        if isinstance(default, commands.Train) and judging is not None:
            default = dataclasses.replace(default, judging=judging)
        if command is commands.Evaluate and judging is not None:
            default = commands.Evaluate(tyro.MISSING, judging)
        choice = Annotated[command, tyro.conf.subcommand(name, default=default)]  # type: ignore[valid-type]
        choices = choice if choices is None else choices | choice
    return tyro.cli(choices, prog="fused-margins", args=arguments, description=__doc__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; the exit code is 2 for a mistake of the user, 130 after an interrupt."""
    try:
        command = parse(arguments)
        if getattr(command, "preset", None) is not None:
            command = parse(arguments, preset(command.preset))
        if isinstance(command, commands.Evaluate):
            command = parse(arguments, judging=Run(command.run).judging())
        if isinstance(command, commands.Train) and command.resume:
            command = _with_stored_settings(command, arguments)
        return command.main()
    except ValidationError as error:
        return _fail(explain_validation(error))
    except UserError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except KeyboardInterrupt:
        return INTERRUPTED


def _with_stored_settings(command: commands.Train, arguments: Sequence[str] | None) -> commands.Train:
    """The command with the settings of the run it resumes; others would lead to other numbers and are refused."""
    run = Run(command.folder())
    stored = run.config()
    resumed = parse(arguments, stored, run.judging())
    # A preset says every setting, as options say some; the threads are those that the run found.
    asked, kept = (command if command.preset else resumed).settings().model_dump(), stored.model_dump()
    changed = [name for name in kept if asked[name] != kept[name] and not (name == "threads" and asked[name] is None)]
    if changed:
        name = changed[0]
        raise UserError(f"resume: the run has {name} = {kept[name]}, which cannot become {asked[name]}")
    return resumed


def _fail(message: str) -> int:
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
