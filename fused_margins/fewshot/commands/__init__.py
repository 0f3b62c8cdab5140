"""The subcommands: what they do is `main`, their options are fields, also of settings: `--loss magnet --alpha 0.3`.

The command line says what is given, as text; pydantic makes numbers and paths of it, and checks them, as it does in a
stored configuration. An option has the name of its field. Where settings have a `name`, that is what the option means
which is called as the field that they are in: `--backbone`, `--loss`.

Each subcommand imports within `main` what is slow to import: no help waits for it.
"""

import argparse
import difflib
import re
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn, TypeVar, get_args, get_origin

from ..config import LOSSES, LossSettings, Settings, changed_loss
from ..terminal import UserError

if TYPE_CHECKING:
    from typing_extensions import Self

POSITIONAL = object()  # in the annotation of a field that is given without a name
OF_LOSS = "loss."  # begins the names of what is given for the loss
NAMES = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}

Given = Mapping[str, Any]
AnySettings = TypeVar("AnySettings", bound=Settings)


class Parser(argparse.ArgumentParser):
    """Whose errors are the user's; what looks like a negative number is a value, -1e-3 as well."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self._negative_number_matcher = re.compile(r"-(\d|\.\d|inf|nan)")

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))

    def closest(self, word: str) -> str:
        """What may have been meant, where an option is none; empty if nothing is like it."""
        meant = difflib.get_close_matches(word, self._option_string_actions, n=1)
        return f"; perhaps you meant {meant[0]}" if meant else ""


class Command(Settings):
    """A subcommand: its options are its fields, and those of the settings that it has."""

    has_loss: ClassVar[bool] = False  # whether what is in `config.loss` has options, too
    often: ClassVar[tuple[str, ...]] = ()  # of the settings that it has, those that `--help` shows
    example: ClassVar[str] = ""  # of its options
    _given: Given = {}  # noqa: RUF012  # pydantic copies it

    @classmethod
    def read(cls, given: Given) -> "Self":
        """The command with what is given over its defaults."""
        return build(cls, given)

    def main(self) -> int:
        """Do it; the exit code."""
        raise NotImplementedError


def filled(text: str | None) -> str:
    """Within 80 columns, as what is not an option's help has to be."""
    return textwrap.fill(" ".join((text or "").split()), 78)


def add_options(parser: Parser, command: type[Command], everything: bool) -> None:
    """All options of a command, with its defaults; the help has its own and those of `often`, or everything."""
    _Options(parser, command, everything).add(parser, command.model_construct())
    parser.epilog = f"example:\n  {parser.prog} {command.example}\n" if command.example else ""
    if command.often and not everything:
        parser.epilog += f"\n{parser.prog} --help-all lists every option.\n"


class _Options:
    """Adds the fields of settings within settings to a parser."""

    def __init__(self, parser: Parser, command: type[Command], everything: bool) -> None:
        self.parser, self.command, self.everything = parser, command, everything

    def add(self, group: Any, start: Settings, holder: str = "") -> None:
        for name, field in type(start).model_fields.items():
            value, option = getattr(start, name, None), holder if name == "name" else name
            if isinstance(value, LossSettings):
                if self.command.has_loss:
                    self._add_losses(
                        self._group(name, "What the chosen loss does not have is an error.", ["loss"]), value
                    )
            elif isinstance(value, Settings):
                within = [name, *type(value).model_fields]
                self.add(self._group(name, type(value).__doc__, within), value, name)
            elif POSITIONAL in field.metadata:
                optional = {} if field.is_required() else {"nargs": "?"}
                group.add_argument(name, **_takes(field.annotation), **optional, **_help(field.description, value))
            else:
                flags = [*(["-o"] if name == "output" else []), _flag(option)]
                about = {**_takes(field.annotation), **self._help(option, field.description, value, of=holder)}
                group.add_argument(*flags, dest=option, required=field.is_required(), **about)

    def _group(self, name: str, about: str | None, options: Iterable[str]) -> Any:
        """Described where one of its options is shown."""
        shown = self.everything or not set(options).isdisjoint(self.command.often)
        return self.parser.add_argument_group(name, filled(about) if shown else None)

    def _help(self, name: str, description: str | None, default: Any, of: str) -> dict[str, Any]:
        shown = self.everything or not of or name in self.command.often
        return _help(description, default) if shown else {"help": argparse.SUPPRESS, "default": argparse.SUPPRESS}

    def _add_losses(self, group: Any, start: LossSettings) -> None:
        about = self._help("loss", "Loss.", start.name, of="loss")
        group.add_argument("--loss", dest=f"{OF_LOSS}name", metavar=_one_of(LOSSES), **about)
        for name in dict.fromkeys(name for loss in LOSSES.values() for name in loss.model_fields if name != "name"):
            fields = {
                loss: settings.model_fields[name] for loss, settings in LOSSES.items() if name in settings.model_fields
            }
            description = next(field.description for field in fields.values() if field.description)
            defaults = ", ".join(f"{field.default} for {loss}" for loss, field in fields.items())
            takes = _takes(next(iter(fields.values())).annotation)
            group.add_argument(
                _flag(name), dest=OF_LOSS + name, **takes, **self._help(name, description, defaults, of="loss")
            )


def _takes(annotation: Any) -> dict[str, Any]:
    """How many values an option of this type takes, and what its help calls them.

    >>> _takes(tuple[int, ...] | None), _takes(Literal["fine", "coarse"])
    ({'metavar': 'INT', 'nargs': '+'}, {'metavar': '{fine,coarse}'})
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return {"metavar": _one_of(arguments)}
    if origin is tuple:
        return {**_takes(arguments[0]), "nargs": "+" if arguments[-1] is Ellipsis else len(arguments)}
    if arguments:  # of Annotated the type, of a union what is beside None
        return _takes(arguments[0])
    return {"action": argparse.BooleanOptionalAction} if annotation is bool else {"metavar": NAMES[annotation]}


def _one_of(names: Any) -> str:
    return f"{{{','.join(names)}}}"


def _help(description: str | None, default: Any) -> dict[str, Any]:
    """What is not given is not in what the parser returns: its default is shown, and comes from elsewhere."""
    default = " ".join(map(str, default)) if isinstance(default, tuple) else default
    text = " ".join((description or "").split()) + (f" (default: {default})" if default not in (None, "") else "")
    return {"help": text.replace("%", "%%"), "default": argparse.SUPPRESS}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def build(command: type[AnySettings], given: Given, **start: Settings) -> AnySettings:
    """A command with what is given over settings to start from, and over its defaults."""
    made = _with(command.model_construct(None, **start), given)
    if isinstance(made, Command):
        made._given = given
    return made


def _with(settings: AnySettings, given: Given, holder: str = "") -> AnySettings:
    """Settings with what is given over them, checked anew."""
    values: dict[str, Any] = {}
    for name in type(settings).model_fields:
        value, option = getattr(settings, name, None), holder if name == "name" else name
        if isinstance(value, LossSettings):
            values[name] = changed_loss(
                value, **{n.removeprefix(OF_LOSS): given[n] for n in given if n.startswith(OF_LOSS)}
            )
        elif isinstance(value, Settings):
            values[name] = _with(value, given, name)
        else:
            values[name] = given.get(option, value)
    return type(settings).model_validate(values)
