"""The command `fused-margins`: train few-shot embeddings, judge them, and compare backends."""

import difflib
import gc
import io
import re
import sys
from collections.abc import Sequence
from importlib.metadata import version

from pydantic import ValidationError
from rich.markup import escape

from .commands import Command, Parser, add_options, filled
from .commands.data import Compare, Data, Doctor, Embed, Presets
from .commands.studies import CoarseToFine, Demo, Heads, MagnetStudy, OneShot, ParityCommand, Reproduce, Sweep
from .commands.train import Evaluate, Train
from .config import explain_validation
from .process import check_alone, keep_freed_memory
from .terminal import INTERRUPTED, UserError, errors

USER_ERROR = 2
LONGEST = 1000  # characters of an error
OF_PLAN = (
    "What a step of a softmax over many ranks takes: memory, bytes and time, and what to change if it does not fit."
)

SUBCOMMANDS: dict[str, type[Command]] = {
    "demo": Demo,
    "data": Data,
    "embed": Embed,
    "train": Train,
    "evaluate": Evaluate,
    "compare": Compare,
    "heads": Heads,
    "sweep": Sweep,
    "coarse-to-fine": CoarseToFine,
    "magnet": MagnetStudy,
    "one-shot": OneShot,
    "parity": ParityCommand,
    "reproduce": Reproduce,
    "presets": Presets,
    "doctor": Doctor,
}


def parse(arguments: Sequence[str]) -> Command:
    """The subcommand with its options; a `UserError` for what it does not take."""
    everything = "--help-all" in arguments
    arguments = ["--help" if argument == "--help-all" else argument for argument in arguments]
    parser = Parser(prog="fused-margins", description=__doc__)
    parser.add_argument("--version", action="version", version=f"fused-margins {version('fused-margins')}")
    of_commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in SUBCOMMANDS.items():
        text = (command.__doc__ or "").replace("%", "%%")
        # argparse formats what stands in a list of commands, and of the rest nothing.
        usage, about = f"{parser.prog} {name} [OPTIONS]", filled(command.__doc__ or "")
        options = of_commands.add_parser(name, help=text.partition("\n")[0], description=about, usage=usage)
        add_options(options, command, everything)
    of_commands.add_parser("plan", help=OF_PLAN)  # with options of its own, see `main`
    if arguments and not arguments[0].startswith("-") and arguments[0] not in of_commands.choices:
        meant = difflib.get_close_matches(arguments[0], of_commands.choices, n=1)
        known = f"perhaps you meant {meant[0]}" if meant else f"expected one of {', '.join(of_commands.choices)}"
        raise UserError(f"unknown command: {arguments[0]}; {known}")
    # The name of an option may have underscores, as that of its field has.
    arguments = [re.sub("^--[^=]*", lambda option: option[0].replace("_", "-"), argument) for argument in arguments]
    found, unknown = parser.parse_known_args(arguments)
    given = {name: None if value in ("None", ["None"]) else value for name, value in vars(found).items()}
    name = str(given.pop("command"))
    if unknown:
        raise UserError(f"unknown options: {' '.join(unknown)}{of_commands.choices[name].closest(unknown[0])}")
    if name != "train":
        check_alone(name)
    return SUBCOMMANDS[name].read(given)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; the exit code is 2 for a mistake of the user, 130 after an interrupt."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments[:1] == ["plan"]:
            from ..distributed import plan  # torch's tensors over ranks take a second to import

            return plan.main(arguments[1:])
        return parse(arguments).main()
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


def _fail(message: str) -> int:
    message = message if len(message) < LONGEST else f"{message[:LONGEST]}..."  # what came may be of any length
    errors.print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    return USER_ERROR


def script() -> None:
    """`main` as a process of its own."""
    keep_freed_memory()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that this terminal cannot show is no reason to fail
    code = main()
    gc.freeze()  # at its end Python would look at all that was imported once more, for a second
    sys.exit(code)


if __name__ == "__main__":
    script()
