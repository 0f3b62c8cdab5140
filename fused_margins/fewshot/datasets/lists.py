"""Lists of files and classes, as people have them: byte order marks, blank lines, spaces around what they say."""

import codecs
import csv
import io
import posixpath
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from ..errors import UserError
from .sources import Tree, left_out, reader

LINE_CHARACTERS = 4096  # as long as a path can be
LIST_BYTES = 16 << 20  # of a list: a hundred bytes for each of 160,000 images


@dataclass(frozen=True)
class Line:
    """A line that is not blank, without the spaces around it."""

    tree: Tree
    file: str
    number: int
    text: str

    def error(self, reason: str) -> UserError:
        return UserError(f"{self.tree.where(self.file)}: line {self.number}: {reason}")

    def fields(self, delimiter: str) -> list[str]:
        """What stands between delimiters, in quotes or without."""
        try:
            reader = csv.reader([self.text], delimiter=delimiter, skipinitialspace=True, strict=True)
            return [field.strip() for field in next(reader)]
        except csv.Error as error:
            raise self.error(str(error)) from None


def lines(tree: Tree, file: str) -> Iterator[Line]:
    """The lines of a list; bytes that are not UTF-8 become what Python makes of them in the names of files."""
    with reader() as read:
        data = read(tree, file)
    if len(data) > LIST_BYTES:
        raise UserError(f"{tree.where(file)}: larger than {LIST_BYTES >> 20} MiB, expected a list")
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # what Windows calls Unicode
    try:
        text = data.decode("utf-16") if wide else data.decode("utf-8-sig", "surrogateescape")
    except UnicodeDecodeError as error:
        raise UserError(f"{tree.where(file)}: not text ({error.reason} at byte {error.start})") from None
    for number, content in enumerate(io.StringIO(text, newline=None), start=1):
        line = Line(tree, file, number, content.strip())
        if "\0" in line.text:
            raise line.error("a NUL byte, which is in no name")
        if len(line.text) > LINE_CHARACTERS:
            raise line.error(f"expected at most {LINE_CHARACTERS} characters, got {len(line.text)}")
        if line.text:
            yield line


class Once:
    """What a list may say once: told again it is left out and counted, and with another value it is an error."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.values: dict[str, tuple[str, Line]] = {}
        self.repeated: list[str] = []

    def add(self, line: Line, key: str, value: str = "") -> bool:
        """Whether `key` is new."""
        former, before = self.values.setdefault(key, (value, line))
        if before is line:
            return True
        if former != value:
            place = f"line {before.number}" + (f" of {before.file}" if before.file != line.file else "")
            raise line.error(f"the {self.what} {key} is {value} here, but {former} in {place}")
        self.repeated.append(f"{self.what} {key} in line {line.number}")
        return False


class Finder:
    """The files of a folder of a tree, by the names that lists give them."""

    def __init__(self, tree: Tree, folder: str) -> None:
        self.tree = tree
        self.folder = folder

    def __call__(self, line: Line, name: str) -> str:
        """The file that is meant: of this name, else the only one that differs in case, accents or slashes alone."""
        plain = posixpath.normpath(name)
        if plain.startswith(("/", "../")):
            raise line.error(f"{name} leads out of {self.tree.where(self.folder)}")
        exact, alike = self._files
        if self.folder + plain in exact:
            return self.folder + plain
        meant = alike.get(_folded(self.folder + plain), [])
        if len(meant) != 1:
            reason = f"; {meant[0]} and {meant[1]} are like it" if meant else ""
            raise line.error(f"there is no {self.folder}{plain} in {self.tree.where('')}{reason}")
        return meant[0]

    def left_out(self, listed: Iterable[str]) -> None:
        """Say which files no list names, of all that `listed` has."""
        left_out(self.tree.where(self.folder), "in no list", sorted(self._files[0] - set(listed)))

    @cached_property
    def _files(self) -> tuple[set[str], dict[str, list[str]]]:
        names = [name for name in self.tree.names(self.folder) if not name.endswith("/")]
        alike = defaultdict(list)
        for name in names:
            alike[_folded(name)].append(name)
        return set(names), alike


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name.replace("\\", "/")).casefold()
