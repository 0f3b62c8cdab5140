"""From the bytes of an image file to 8 bits a channel, as viewers show it: upright and on a white ground."""

import io
import warnings
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import UserError

# A format that its file's name does not claim is read, too, but none that runs other programs (EPS) or is drawn (WMF).
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
PIXELS = 50_000_000  # of an image: that is 200 MB, which is held two and a half times at most
_TIFF_BITS, _TIFF_MEANING, _WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF 6.0, BitsPerSample, PhotometricInterpretation


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
