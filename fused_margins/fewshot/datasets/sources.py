"""The user's files, in folders or in zip archives, through one interface.

The data root is a folder. A place in it, such as `omniglot/vinyals`, is looked for below the root, then in the zip
archives that lie right in the root or in a folder there, which count as unpacked there: with or without a folder of
their own name. What is looked for may also lie one folder deeper than usual.

Only regular files are read, none beyond a size that is known before reading and bounded while reading. Links may lead
out of the root, names may not.
"""

import os
import posixpath
import stat
import zipfile
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, NamedTuple

from ..terminal import UserError, say

DATA_ROOT_VARIABLE = "FUSED_MARGINS_DATA"
FILE_BYTES = 128 << 20  # of a file, unpacked: no image or list of a few-shot data set is larger
_CHUNK_BYTES = 1 << 16

Read = Callable[[str], bytes]


say_once = lru_cache(maxsize=None)(say)  # a study loads the same data for each of its runs


def left_out(where: str, reason: str, names: Sequence[str]) -> None:
    """Say how many of the user's files are not read, and why."""
    if names:
        more = ", ..." if len(names) > 1 else ""
        say_once(f"{where}: {len(names)} left out, {reason}: {names[0]}{more}")


def bounded(stream: IO[bytes], where: str) -> bytes:
    """All of a stream, which may hold more than its size says, or not say it."""
    data = bytearray()
    while chunk := stream.read(_CHUNK_BYTES):
        data += chunk
        _check_size(len(data), where)
    return bytes(data)


def _check_size(size: int, where: str) -> None:
    if size > FILE_BYTES:
        raise UserError(f"{where}: larger than {FILE_BYTES >> 20} MiB, expected an image or a list")


class Tree(ABC):
    """Files below a folder; their names are relative and have forward slashes."""

    path: Path  # a folder or an archive

    @abstractmethod
    def names(self, folder: str = "") -> list[str]:
        """All files below a folder (which ends in a slash, or is all), and folders, which do; sorted, none hidden."""

    @abstractmethod
    def children(self, folder: str = "") -> list[str]:
        """Files and folders right in a folder by their own names, as above."""

    @abstractmethod
    def where(self, name: str) -> str:
        """The file as a message should call it."""

    @abstractmethod
    def stamp(self, name: str) -> str:
        """Text that changes when the file does; a `UserError` if it is missing, too large, or no regular file."""

    @abstractmethod
    def open(self) -> AbstractContextManager[Read]:
        """A function that reads a file's bytes, for as long as the context lasts."""


@contextmanager
def reader() -> Iterator[Callable[[Tree, str], bytes]]:
    """A function that reads a file of a tree, or raises a `UserError`; each tree is opened once for the whole block."""
    with ExitStack() as stack:
        opened: dict[Tree, Read] = {}

        def read(tree: Tree, name: str) -> bytes:
            tree.stamp(name)
            if tree not in opened:
                opened[tree] = stack.enter_context(tree.open())
            try:
                return opened[tree](name)
            except UserError:
                raise
            except Exception as error:  # damage shows itself in many ways: a checksum, a cut stream, a method
                raise UserError(f"{tree.where(name)}: cannot be read ({error or type(error).__name__})") from error

        yield read


@dataclass(frozen=True)
class Folder(Tree):
    """Files below a folder of the disk."""

    path: Path

    def names(self, folder: str = "") -> list[str]:
        start = self.path / folder
        if not start.is_dir():
            return []
        found: list[str] = []
        hidden: list[str] = []
        repeated: list[str] = []
        seen = {_identity(above) for above in start.resolve().parents}
        # What is really there comes before what links lead to: a folder is read once, where it lies.
        folders, links = deque([folder]), deque[str]()
        while folders or links:
            here = folders.popleft() if folders else links.popleft()
            identity = _identity(self.path / here)
            if identity in seen:
                repeated.append(here)
                continue
            seen.add(identity)
            if here != folder:
                found.append(here)
            for entry in _scan(self.path / here):
                name = here + entry.name
                if _hidden(entry.name):
                    hidden.append(name)
                elif _is_folder(entry):
                    (links if entry.is_symlink() else folders).append(f"{name}/")
                else:
                    found.append(name)
        left_out(str(self.path), HIDDEN, sorted(hidden))
        left_out(str(self.path), "links to folders that are read already or lie above", sorted(repeated))
        return sorted(found)

    def children(self, folder: str = "") -> list[str]:
        start = self.path / folder
        entries = _scan(start) if start.is_dir() else []
        return sorted(entry.name + "/" * _is_folder(entry) for entry in entries if not _hidden(entry.name))

    def where(self, name: str) -> str:
        return str(self.path / name)

    def stamp(self, name: str) -> str:
        try:
            status = (self.path / name).stat()
        except OSError as error:
            raise UserError(f"{self.where(name)}: {error.strerror}") from None
        _check_regular(status, self.where(name))
        _check_size(status.st_size, self.where(name))
        return f"{status.st_size} {status.st_mtime_ns}"

    @contextmanager
    def open(self) -> Iterator[Read]:
        def read(name: str) -> bytes:
            with (self.path / name).open("rb") as file:
                return bounded(file, self.where(name))

        yield read


def _identity(folder: Path) -> tuple[int, int]:
    """The same for all names of a folder."""
    status = folder.stat()
    return status.st_dev, status.st_ino


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({error.strerror})") from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: `stamp` says so where it is to be read
        return False


def _check_regular(status: os.stat_result, where: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "named pipe", stat.S_IFSOCK: "socket"}
        raise UserError(f"{where}: expected a file, got a {kinds.get(stat.S_IFMT(status.st_mode), 'device')}")


@dataclass(frozen=True)
class Archive(Tree):
    """Files in a zip archive whose names begin with `prefix`."""

    path: Path
    prefix: str  # empty, or ends with a slash

    def names(self, folder: str = "") -> list[str]:
        listed = listing(self.path)
        left_out(str(self.path), HIDDEN, listed.hidden)
        left_out(str(self.path), "names that lead out of the archive", listed.outside)
        left_out(str(self.path), "names that come again later in the archive", listed.repeated)
        start = bisect_left(listed.names, self.prefix + folder)
        end = bisect_left(listed.names, _behind(self.prefix + folder)) if self.prefix + folder else None
        return [n for n in (name[len(self.prefix) :] for name in listed.names[start:end]) if n not in ("", folder)]

    def children(self, folder: str = "") -> list[str]:
        return _children(listing(self.path).names, self.prefix + folder)

    def where(self, name: str) -> str:
        inside = self.prefix + name
        return f"{self.path}: {inside}" if inside else str(self.path)

    def stamp(self, name: str) -> str:
        try:
            size, crc = listing(self.path).stamps[self.prefix + name]
        except KeyError:
            raise UserError(f"{self.where(name)}: not in the archive") from None
        _check_size(size, self.where(name))
        return f"{size} {crc:08x}"

    @contextmanager
    def open(self) -> Iterator[Read]:
        with zipfile.ZipFile(self.path) as archive:
            members = {_member_name(info): info for info in archive.infolist()}

            def read(name: str) -> bytes:
                info = members[self.prefix + name]
                if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    # zipfile unpacks these without a bound.
                    raise UserError(f"{self.where(name)}: neither stored nor deflated, but packed by another method")
                with archive.open(info) as member:  # checks the CRC-32
                    return bounded(member, self.where(name))

            yield read


class Listing(NamedTuple):
    """The directory of a zip archive."""

    stamps: dict[str, tuple[int, int]]  # size and CRC-32 of what is in `names`
    names: list[str]  # sorted
    hidden: list[str]
    outside: list[str]
    repeated: list[str]


def listing(archive: Path) -> Listing:
    """What is in a zip archive; a `UserError` if it is not one."""
    try:
        status = archive.stat()
        _check_regular(status, str(archive))
        return _listing(archive, status.st_size, status.st_mtime_ns)
    except UserError:
        raise
    except Exception as error:  # damage shows itself in many ways
        raise UserError(f"{archive}: not a readable zip archive ({error})") from None


@lru_cache(maxsize=16)
def _listing(archive: Path, size: int, mtime_ns: int) -> Listing:
    stamps: dict[str, tuple[int, int]] = {}
    hidden, outside, repeated = [], [], []
    with zipfile.ZipFile(archive) as opened:
        for info in opened.infolist():
            name = _member_name(info)
            parts = name.rstrip("/").split("/")
            if name.startswith("/") or parts[0] == "..":
                outside.append(name)
            elif any(map(_hidden, parts)):
                hidden.append(name)
            else:
                if name in stamps and not info.is_dir():
                    repeated.append(name)
                stamps[name] = (info.file_size, info.CRC)
    return Listing(stamps, sorted(stamps), sorted(hidden), sorted(outside), sorted(repeated))


def _member_name(info: zipfile.ZipInfo) -> str:
    """The name as it is meant: macOS packs UTF-8 without saying so, some of Windows packs backslashes."""
    name = info.filename
    says_utf8 = info.flag_bits & 0x800
    if not says_utf8:
        with suppress(UnicodeError):
            name = name.encode("cp437").decode("utf-8")
    if info.create_system == 0:
        name = name.replace("\\", "/")
    return posixpath.normpath(name) + "/" * name.endswith("/")


def _behind(prefix: str) -> str:
    """The first name in order that comes after all those with this prefix, which ends with a slash."""
    return prefix[:-1] + chr(ord("/") + 1)


def _children(names: Sequence[str], prefix: str) -> list[str]:
    """What stands right behind the prefix in sorted names, folders with a slash."""
    children, i = [], bisect_left(names, prefix)
    while i < len(names) and names[i].startswith(prefix):
        head, slash, _ = names[i][len(prefix) :].partition("/")
        if head:
            children.append(head + slash)
        i = bisect_left(names, _behind(prefix + head + slash)) if head and slash else i + 1
    return children


HIDDEN = "hidden or of the system"
_OF_SYSTEMS = ("thumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "system volume information")


def _hidden(name: str) -> bool:
    """What systems leave behind, one part of a path: .DS_Store, .thumbnails, __MACOSX, Thumbs.db."""
    return name.startswith((".", "__MACOSX")) or name.lower() in _OF_SYSTEMS


def data_root() -> Path:
    """The folder with the user's data sets: what FUSED_MARGINS_DATA names, else `data` in the working directory."""
    return Path(os.environ.get(DATA_ROOT_VARIABLE) or "data")


def find(root: Path, places: Sequence[str], holding: str = "") -> Tree | None:
    """The first of the `places` in the data root that is there and has `holding`, a file or (with a slash) a folder."""
    for place in places:
        folder = Folder(root / place)
        for nested in ("", *(child for child in folder.children() if child.endswith("/"))):
            held = folder.path / nested / holding
            if held.is_file() if holding and not holding.endswith("/") else held.is_dir():
                return Folder(folder.path / nested)
    # Those of its own name first: an archive of many files takes a while to list.
    by_name = sorted(_archives(root), key=lambda a: all(len(_prefixes(a.stem, p)) == 1 for p in places))
    for archive in by_name:
        try:
            names = listing(archive).names
        except UserError:
            continue  # `require` names it
        for place in places:
            for prefix in _prefixes(archive.stem, place):
                for nested in ("", *(child for child in _children(names, prefix) if child.endswith("/"))):
                    if _any_begins(names, prefix + nested + holding):
                        return Archive(archive, prefix + nested)
    return None


def _any_begins(names: Sequence[str], prefix: str) -> bool:
    i = bisect_left(names, prefix)
    return i < len(names) and names[i].startswith(prefix)


def _archives(root: Path) -> list[Path]:
    """The zip archives in the data root, and those in its folders."""
    found = []
    for folder in (root, *(root / child for child in Folder(root).children() if child.endswith("/"))):
        with suppress(UserError):  # lost+found is nobody's to list
            found += [folder / name for name in Folder(folder).children() if name.lower().endswith(".zip")]
    return found


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
    for archive in _archives(root):
        try:
            listing(archive)
        except UserError as error:
            unreadable += f"; {error}"
    wanted = " or ".join(f"{place}/{holding}" for place in places)
    raise UserError(
        f"{root}: no {wanted} in this folder ({DATA_ROOT_VARIABLE} names another one) or in a zip archive there"
        f"{unreadable}. {guide}"
    )
