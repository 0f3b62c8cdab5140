"""The user's files, in folders or in zip archives, through one interface.

The data root is a folder. A place in it, such as `omniglot/vinyals`, is looked for below the root, then in the zip
archives that lie right in the root, which count as unpacked there: with or without a folder of their own name.
"""

import os
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..errors import UserError
from .registry import DATA_ROOT_VARIABLE

Read = Callable[[str], bytes]


class Tree(ABC):
    """Files below a folder; their names are relative and have forward slashes."""

    path: Path  # a folder or an archive

    @abstractmethod
    def names(self) -> list[str]:
        """All files, and folders with a slash at the end, sorted; without hidden ones."""

    @abstractmethod
    def where(self, name: str) -> str:
        """The file as a message should call it."""

    @abstractmethod
    def stamp(self, name: str) -> str:
        """Text that changes when the file does; a `UserError` if it is missing."""

    @abstractmethod
    def _open(self) -> AbstractContextManager[Read]:
        """A function that reads a file's bytes, for as long as the context lasts."""

    @contextmanager
    def open(self) -> Iterator[Read]:
        """As above; what cannot be read is a `UserError`."""
        with self._open() as read:

            def checked(name: str) -> bytes:
                self.stamp(name)
                try:
                    return read(name)
                except Exception as error:  # damage shows itself in many ways: a checksum, a cut stream, a method
                    raise UserError(f"{self.where(name)}: cannot be read ({error or type(error).__name__})") from error

            yield checked

    def text(self, name: str) -> str:
        """The text of one file."""
        with self.open() as read:
            data = read(name)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{self.where(name)}: not text ({error.reason} at byte {error.start})") from None


@dataclass(frozen=True)
class Folder(Tree):
    """Files below a folder of the disk."""

    path: Path

    def names(self) -> list[str]:
        found = []
        for folder, folders, files in os.walk(self.path, followlinks=True):
            above = Path(folder).relative_to(self.path)
            found += [(above / name).as_posix() for name in files]
            found += [(above / name).as_posix() + "/" for name in folders]
        return sorted(name for name in found if not _hidden(name))

    def where(self, name: str) -> str:
        return str(self.path / name)

    def stamp(self, name: str) -> str:
        try:
            status = (self.path / name).stat()
        except OSError as error:
            raise UserError(f"{self.where(name)}: {error.strerror}") from None
        return f"{status.st_size} {status.st_mtime_ns}"

    @contextmanager
    def _open(self) -> Iterator[Read]:
        yield lambda name: (self.path / name).read_bytes()


@dataclass(frozen=True)
class Archive(Tree):
    """Files in a zip archive whose names begin with `prefix`."""

    path: Path
    prefix: str  # empty, or ends with a slash

    def names(self) -> list[str]:
        start = len(self.prefix)
        found = (name[start:] for name in entries(self.path) if name.startswith(self.prefix))
        return sorted(name for name in found if name and not _hidden(name))

    def where(self, name: str) -> str:
        return f"{self.path}: {self.prefix}{name}"

    def stamp(self, name: str) -> str:
        try:
            return entries(self.path)[self.prefix + name]
        except KeyError:
            raise UserError(f"{self.where(name)}: not in the archive") from None

    @contextmanager
    def _open(self) -> Iterator[Read]:
        with zipfile.ZipFile(self.path) as archive:
            yield lambda name: archive.read(self.prefix + name)  # checks the CRC-32


def entries(archive: Path) -> Mapping[str, str]:
    """Name and stamp of everything in a zip archive; a `UserError` if it is not one."""
    try:
        status = archive.stat()
        return _entries(archive, status.st_size, status.st_mtime_ns)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{archive}: not a readable zip archive ({error})") from None


@lru_cache(maxsize=16)
def _entries(archive: Path, size: int, mtime_ns: int) -> Mapping[str, str]:
    with zipfile.ZipFile(archive) as opened:
        return {entry.filename: f"{entry.file_size} {entry.CRC:08x}" for entry in opened.infolist()}


def _hidden(name: str) -> bool:
    """What systems leave behind: .DS_Store, __MACOSX/, Thumbs.db."""
    return any(part.startswith((".", "__MACOSX")) or part == "Thumbs.db" for part in name.split("/"))


def find(root: Path, places: Sequence[str], holding: str = "") -> Tree | None:
    """The first of the `places` in the data root that is there and has `holding`, a file or (with a slash) a folder."""
    for place in places:
        if (root / place / holding).exists():
            return Folder(root / place)
    # Those of its own name first: an archive of many files takes a while to list.
    for archive in sorted(root.glob("*.zip"), key=lambda a: (all(len(_prefixes(a.stem, p)) == 1 for p in places), a)):
        try:
            names = entries(archive)
        except UserError:
            continue  # `require` names it
        for place in places:
            for prefix in _prefixes(archive.stem, place):
                if any(name.startswith(prefix + holding) for name in names):
                    return Archive(archive, prefix)
    return None


def _prefixes(stem: str, place: str) -> list[str]:
    """What the names of a place begin with in the archive stem.zip."""
    first, _, rest = place.partition("/")
    own = stem.replace("_", "-").lower() == first.replace("_", "-").lower()
    return [f"{place}/", *([f"{rest}/" if rest else ""] if own else [])]


def require(root: Path, places: Sequence[str], guide: str, holding: str = "") -> Tree:
    """As `find`, with an error that says what was looked for, what could not be read, and what to do."""
    tree = find(root, places, holding)
    if tree is not None:
        return tree
    unreadable = ""
    for archive in sorted(root.glob("*.zip")):
        try:
            entries(archive)
        except UserError as error:
            unreadable += f"; {error}"
    wanted = " or ".join(f"{place}/{holding}" for place in places)
    raise UserError(
        f"{root}: no {wanted} in this folder ({DATA_ROOT_VARIABLE} names another one) or in a zip archive there"
        f"{unreadable}. {guide}"
    )
