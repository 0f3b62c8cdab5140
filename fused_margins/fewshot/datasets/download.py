"""Files from the internet: with a checksum, resumed where a former transfer stopped, and there whole or not at all."""

import hashlib
import http.client
import os
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

from ..terminal import UserError, progress, say

TIMEOUT_SECONDS = 30.0
_CHUNK = 1024  # bytes: what the bar counts


@dataclass(frozen=True)
class Download:
    """A file, where it comes from, and where below the data root it goes."""

    url: str
    place: str
    size: int  # bytes
    sha256: str


def fetch(download: Download, root: Path) -> Path:
    """Download a file that is not there yet; what is there stays, whatever its checksum.

    Raises:
        UserError: no connection, a transfer that broke off (what has come stays in a file that ends in .part, and the
            next call goes on from there), a checksum that does not match (then nothing stays), or a broken archive in
            its place.
    """
    path = root / download.place
    if path.exists():
        if not path.is_file():
            raise UserError(f"{path}: expected a file, got a folder, a pipe or a device")
        if _sha256(path) != download.sha256:
            if path.suffix == ".zip" and not zipfile.is_zipfile(path):
                raise UserError(f"{path}: no whole zip archive; remove it, and the same command downloads it again")
            say(f"{path}: there already, though it is not the official file (packed anew?); it is left alone")
        return path
    part = path.with_name(path.name + ".part")
    if part.exists() and part.stat().st_size > download.size:
        part.unlink()  # not a beginning of this file
    say(f"{download.url} -> {path}")
    if not part.exists() or part.stat().st_size < download.size:
        _transfer(download, part, path)
    found = _sha256(part)
    if found != download.sha256:
        part.unlink()
        raise UserError(f"{download.url}: expected a file with SHA-256 {download.sha256}, got {found}; it is not kept")
    with open(part, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
    return path


def _transfer(download: Download, part: Path, path: Path) -> None:
    """Append to `part` what it lacks."""
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(download.url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
            resumed = response.status == http.client.PARTIAL_CONTENT
            start = start if resumed else 0
            _make_folder(part.parent)  # only now: without a connection nothing is left behind
            with (
                open(part, "ab" if resumed else "wb") as file,
                progress(path.name, -(-download.size // _CHUNK), "KiB", completed=start // _CHUNK) as advance,
            ):
                while chunk := response.read(_CHUNK):
                    file.write(chunk)
                    advance()
    except urllib.error.HTTPError as error:
        error.close()
        raise UserError(f"{download.url}: the server answers {error.code} {error.reason}; {_by_hand(path)}") from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(f"{download.url}: {reason}; {_advice(download, part, path)}") from None
    if part.stat().st_size < download.size:
        raise UserError(f"{download.url}: the transfer ended early; {_advice(download, part, path)}")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror})") from None


def _advice(download: Download, part: Path, path: Path) -> str:
    if part.exists() and part.stat().st_size:
        return f"{part.stat().st_size} of {download.size} bytes have come: run the same command again to go on"
    return _by_hand(path)


def _by_hand(path: Path) -> str:
    return f"without the internet, fetch it elsewhere and put it at {path}"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
