"""Images decoded, 8 bits a channel, as viewers show them: upright and on a white ground; once, and then memory-mapped.

An array lies beside a note with the checksum of its source, from which both have their names, so that a note never
vouches for another array. The checksum covers the layout of the array and the decoding, and for each image the name and
a stamp: within a zip archive the size and CRC-32 that its directory states (hashing a few gigabytes at each start would
take longer than to read what is needed, and a damaged entry fails its CRC-32 when it is decoded); within a folder the
size and the time of the last change. The note also has the CRC-32 of the array, which is computed at each opening: a
gigabyte a second, and where it differs the images are decoded again.
"""

import hashlib
import io
import json
import os
import re
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..runs import replacing, write_json
from ..terminal import UserError, progress
from .sources import Tree, reader

# A format that its file's name does not claim is read, too, but none that runs other programs (EPS) or is drawn (WMF).
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
PIXELS = 50_000_000  # of an image: that is 200 MB, which is held two and a half times at most
_TIFF_BITS, _TIFF_MEANING, _WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF 6.0, BitsPerSample, PhotometricInterpretation
CACHE_VARIABLE = "FUSED_MARGINS_CACHE"
LAYOUT = 2  # to be raised when arrays, or what is decoded into them, change


@dataclass(frozen=True)
class Decoder:
    """How a file becomes channels x size x size bytes: the whole image is resized, whatever its proportions."""

    mode: str  # of Pillow: L is grey, RGB is colour (a grey image gets three equal channels)
    filter: Image.Resampling  # both filters widen with the reduction: nothing is aliased
    inverted: bool = False

    def __call__(self, data: bytes, size: int) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > PIXELS:
                    raise ValueError(f"{image.width} x {image.height} pixels, expected at most {PIXELS:,}")
                with suppress(Exception):  # metadata are damaged in many ways, and viewers overlook it
                    ImageOps.exif_transpose(image, in_place=True)
                image.load()
                pixels = np.asarray(self._resized(image, (size, size)))
        pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        return 255 - pixels if self.inverted else pixels

    def _resized(self, image: Image.Image, size: tuple[int, int]) -> Image.Image:
        if image.mode[0] in "IF":
            white = _white(image)
            image = _on_white(image, white).resize(size, self.filter)
            values = np.asarray(image) * (255 / white)
            if not np.isfinite(values).all():
                raise ValueError("pixels are floating-point numbers that are not finite, expected 0 to 1")
            return Image.fromarray(values.round().clip(0, 255).astype(np.uint8)).convert(self.mode)
        if image.has_transparency_data:
            if image.mode not in ("RGBA", "LA"):  # which are resized by a copy that is multiplied by their alpha
                former, image = image, image.convert("RGBA")
                former.close()  # its memory is free from here on
            image = image.resize(size, self.filter).convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", size, "white"), image).convert(self.mode)
        return (image if image.mode == self.mode else image.convert(self.mode)).resize(size, self.filter)


def decode(decoder: Decoder, data: bytes, size: int, where: str) -> np.ndarray:
    """What `decoder` makes of a file; a `UserError` says `where` it is if that is not a readable image."""
    try:
        return decoder(data, size)
    except UnidentifiedImageError:
        raise UserError(f"{where}: not an image in a known format") from None
    except Exception as error:  # damage shows itself in many ways, all of which mean the same to the user
        raise UserError(f"{where}: not a readable image ({str(error) or type(error).__name__})") from error


def _white(image: Image.Image) -> float:
    """The value that viewers show white, of a grey image that has more than 8 bits; an error where they disagree."""
    tags = getattr(image, "tag_v2", {})
    if tags.get(_TIFF_MEANING) == _WHITE_IS_ZERO:
        raise ValueError("white is zero; expected zero to be black where pixels have more than 8 bits")
    if image.mode == "F":
        low, high = map(float, np.ravel(image.getextrema()))
        if not 0 <= low <= high <= 1:
            raise ValueError(f"pixels are floating-point numbers from {low:g} to {high:g}, expected 0 to 1")
        return 1.0
    if image.mode == "I" and image.format not in ("PNG", "PPM"):  # of these Pillow reads 16 bits as 32
        raise ValueError("pixels are integers of 32 bits or with a sign, expected 8 or 16 bits without one")
    return 2.0 ** tags.get(_TIFF_BITS, (16,))[0] - 1


def _on_white(image: Image.Image, white: float) -> Image.Image:
    """The image in floating point; PNG knows one transparent grey."""
    transparent = image.info.get("transparency")
    if transparent is None:
        return image.convert("F")
    values = np.asarray(image).astype(np.float32)
    image.close()
    values[values == transparent] = white
    return Image.fromarray(values)


INK = Decoder("L", Image.Resampling.BOX, inverted=True)  # the share of ink in each pixel, white on black
PHOTO = Decoder("RGB", Image.Resampling.BILINEAR)


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
