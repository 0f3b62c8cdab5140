"""Decoded images, kept as memory-mapped arrays of bytes: a data set is decoded once, and opened at once ever after.

An array lies beside a note with the checksum of its source, from which both have their names, so that a note never
vouches for another array. The checksum covers the layout of the array and the decoding, and for each image the name and
a stamp: within a zip archive the size and CRC-32 that its directory states (hashing a few gigabytes at each start would
take longer than to read what is needed, and a damaged entry fails its CRC-32 when it is decoded); within a folder the
size and the time of the last change. The note also has the CRC-32 of the array, which is computed at each opening: a
gigabyte a second, and where it differs the images are decoded again.
"""

import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..runs import replacing, write_json
from ..terminal import progress
from .decoding import Decoder, decode
from .sources import Tree, reader

CACHE_VARIABLE = "FUSED_MARGINS_CACHE"
LAYOUT = 2  # to be raised when arrays, or what is decoded into them, change


def cache_folder() -> Path:
    """What FUSED_MARGINS_CACHE names, else ~/.cache/fused-margins."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "fused-margins")


def decoded(name: str, files: Sequence[tuple[Tree, str]], decoder: Decoder, size: int) -> Tensor:
    """The images of these files, uint8 (N, channels, size, size), from the cache or into it.

    Other files of the same `name` (of the data set) and size take their place in the cache.
    """
    source = "\n".join([repr(decoder), *(f"{file!r} {tree.stamp(file)}" for tree, file in files)])
    shape = (len(files), len(decoder.mode), size, size)
    checksum = hashlib.sha256(f"{LAYOUT}\n{shape}\n{source}".encode()).hexdigest()
    stem = f"{re.sub('[^A-Za-z0-9._-]', '_', name)}-{size}px"
    array_path = cache_folder() / f"{stem}-{checksum[:16]}.npy"
    note_path = array_path.with_suffix(".json")
    array = _open(array_path, note_path, checksum, shape)
    if array is None:
        note = {"checksum": checksum, "layout": LAYOUT, "shape": shape, "images": [file for _, file in files]}
        try:
            write_json(
                note_path, {**note, "array_crc32": _write(array_path, name, shape, _images(files, decoder, size))}
            )
        except OSError as error:
            raise UserError(
                f"{cache_folder()}: the cache of decoded images cannot be written ({error.strerror or error}); "
                f"{CACHE_VARIABLE} names another folder"
            ) from error
        for former in cache_folder().glob(f"{stem}-????????????????.*"):
            if former.stem != array_path.stem:
                former.unlink(missing_ok=True)
        array = _open(array_path, note_path, checksum, shape)
        if array is None:
            raise UserError(f"{array_path}: cannot be read back; another program changes the cache")
    return torch.from_numpy(array)


def _images(files: Sequence[tuple[Tree, str]], decoder: Decoder, size: int) -> Iterator[np.ndarray]:
    """One after the other, uint8."""
    with reader() as read:
        for tree, file in files:
            yield decode(decoder, read(tree, file), size, tree.where(file))


def _open(array_path: Path, note_path: Path, checksum: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """The array, if it is there and whole."""
    try:
        note = json.loads(note_path.read_text(encoding="utf-8"))
        # Copy on write: torch wants an array that it could write to, and nothing ever changes the file.
        array = np.lib.format.open_memmap(array_path, mode="c")
        fits = note["checksum"] == checksum and array.shape == shape and array.dtype == np.uint8
        return array if fits and note["array_crc32"] == zlib.crc32(array) else None
    except Exception:  # damage shows itself in many ways
        return None


def _write(path: Path, name: str, shape: tuple[int, ...], images: Iterable[np.ndarray]) -> int:
    """The CRC-32 of the images. Written from front to end, not through a map: a full disk is an error, not a crash."""
    crc = 0
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with (
        replacing(path) as temporary,
        open(temporary, "wb") as file,
        progress(f"decoding {name}", shape[0], "images") as advance,
    ):
        np.lib.format.write_array_header_1_0(file, header)
        for image in images:
            pixels = np.ascontiguousarray(image).tobytes()
            crc = zlib.crc32(pixels, crc)
            file.write(pixels)
            advance()
    return crc
