"""What is decoded looks as viewers show it, whatever its bits, its transparency and its orientation, or is refused."""

import ctypes
import json
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fused_margins.fewshot.datasets import decoding, load
from fused_margins.fewshot.datasets.decoding import INK, PHOTO
from fused_margins.fewshot.process import PeakMemory
from fused_margins.fewshot.terminal import UserError

from .layouts import encoded, png, write

M_MMAP_THRESHOLD = -3  # of mallopt: glibc's malloc.h
RAMP = np.tile(np.linspace(0, 255, 16).astype(np.uint8), (16, 1))
GREY = Image.fromarray(RAMP)


def paletted() -> Image.Image:
    image = Image.fromarray(RAMP // 17).convert("P")
    image.putpalette([17 * (i // 3) for i in range(48)])
    return image


def ink(mode: str) -> Image.Image:
    """Black of an opacity that makes the ramp on white."""
    return Image.merge("LA", (Image.new("L", GREY.size, 0), Image.fromarray(255 - RAMP))).convert(mode)


WIDE = RAMP.astype(np.uint16) * 257
TIFF_16 = encoded(Image.fromarray(WIDE), "tiff")
SHOW_A_RAMP = {
    "8 bits": encoded(GREY),
    "16 bits": encoded(Image.fromarray(WIDE)),
    "16 bits, tiff": TIFF_16,
    "16 bits, big-endian tiff": encoded(Image.frombytes("I;16B", GREY.size, WIDE.astype(">u2").tobytes()), "tiff"),
    "16 bits, ppm": b"P5 16 16 65535\n" + WIDE.astype(">u2").tobytes(),
    "floating point": encoded(Image.fromarray((RAMP / 255).astype(np.float32)), "tiff"),
    "palette": encoded(paletted()),
    "grey with alpha": encoded(ink("LA")),
    "colour with alpha": encoded(ink("RGBA")),
    "premultiplied": encoded(ink("RGBA"), "webp", lossless=True),
    "cmyk": encoded(Image.merge("CMYK", (Image.new("L", GREY.size),) * 3 + (Image.fromarray(255 - RAMP),)), "tiff"),
    "claims to be transparent": encoded(Image.merge("RGBA", (GREY,) * 3 + (Image.new("L", GREY.size, 255),))),
    "named otherwise": encoded(GREY, "bmp"),
}


@pytest.mark.parametrize("data", SHOW_A_RAMP.values(), ids=SHOW_A_RAMP)
def test_grey_levels_are_those_that_viewers_show(data):
    assert (PHOTO(data, 16) == RAMP).all()
    assert (INK(data, 16) == 255 - RAMP).all()
    halves = RAMP.astype(float).reshape(8, 2, 8, 2).mean((1, 3))
    assert abs(255.0 - INK(data, 8) - halves).max() <= 1


def test_photos_are_made_smaller_without_aliasing():
    checkers = Image.fromarray(np.indices((64, 64)).sum(0).astype(np.uint8) % 2 * 255)
    small = PHOTO(encoded(checkers), 8)
    assert small.shape == (3, 8, 8)
    assert abs(small.astype(int) - 128).max() <= 1


def test_ink_is_its_share_of_a_pixel():
    drawing = np.full((8, 8), 255, np.uint8)
    drawing[0, :3] = 0
    small = INK(encoded(Image.fromarray(drawing).convert("1")), 4)
    assert small.shape == (1, 4, 4)
    assert (small[0, 0, :3] == [128, 64, 0]).all() or (small[0, 0, :3] == [127, 63, 0]).all()
    assert small[0, 1:].max() == 0


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "I;16"])
def test_a_transparent_value_is_white(mode):
    black = Image.new("L", (4, 4), 0)
    image = Image.fromarray(np.zeros((4, 4), np.uint16)) if mode == "I;16" else black.convert(mode)
    image.putpixel((0, 0), {"RGB": (9, 9, 9), "P": 9, "1": 255}.get(mode, 9))
    data = encoded(image, transparency=(0, 0, 0) if mode == "RGB" else 0)
    assert (PHOTO(data, 4)[:, 1:] == 255).all()


def test_the_ground_of_a_gif_is_white():
    image = paletted()
    data = encoded(image, "gif", transparency=0)
    assert (PHOTO(data, 16)[:, :, 0] == 255).all()
    assert (PHOTO(data, 16)[:, :, 1:] == RAMP[:, 1:]).all()


def test_what_is_hidden_by_transparency_does_not_bleed_into_its_surroundings():
    red_under_glass = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert (PHOTO(encoded(red_under_glass), 1) == 255).all()


UPRIGHT = np.zeros((8, 8), np.uint8)
UPRIGHT[:4, :4], UPRIGHT[:4, 4:] = 200, 100
STORED = {  # what a camera of this orientation stores of it (Exif 2.3, 4.6.4)
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.T,
    6: np.rot90(UPRIGHT),
    7: UPRIGHT[::-1, ::-1].T,
    8: np.rot90(UPRIGHT, -1),
}


@pytest.mark.parametrize("kind", ["png", "jpeg", "tiff", "webp"])
@pytest.mark.parametrize("orientation", STORED)
def test_images_are_upright(kind, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    options = {"lossless": True} if kind == "webp" else {"quality": 100} if kind == "jpeg" else {}
    data = encoded(Image.fromarray(np.ascontiguousarray(STORED[orientation])), kind, exif=exif, **options)
    assert abs(PHOTO(data, 8).astype(int) - UPRIGHT).max() <= 3


def test_damaged_metadata_do_not_hide_the_image():
    assert (PHOTO(encoded(GREY, exif=b"Exif\0\0no header of a TIFF"), 16) == RAMP).all()


def tiff_with(data: bytes, tag: int, value: int) -> bytes:
    """A little-endian TIFF in which one tag has another value."""
    entry = tag.to_bytes(2, "little") + (3).to_bytes(2, "little") + (1).to_bytes(4, "little")
    at = data.index(entry) + len(entry)
    return data[:at] + value.to_bytes(2, "little") + data[at + 2 :]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (encoded(Image.fromarray(RAMP.astype(np.int32)), "tiff"), "pixels are integers of 32 bits or with a sign"),
        (
            encoded(Image.fromarray(RAMP.astype(np.float32)), "tiff"),
            "floating-point numbers from 0 to 255, expected 0 to 1",
        ),
        (encoded(Image.fromarray(-(RAMP / 255).astype(np.float32)), "tiff"), "floating-point numbers from -1 to -0"),
        (encoded(Image.fromarray(np.array([[0, np.nan]] * 2, np.float32)), "tiff"), "floating-point numbers"),
        (encoded(Image.fromarray(np.array([[0, np.inf]] * 2, np.float32)), "tiff"), "floating-point numbers"),
        (tiff_with(TIFF_16, 262, 0), "white is zero"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image in a known format"),
    ],
    ids=["32-bit", "float-255", "negative", "nan", "infinite", "white-is-zero", "postscript"],
)
def test_what_viewers_disagree_about_is_refused_by_name(tmp_path, data, message):
    write(tmp_path, {"train/a/1.png": data, "test/b/1.png": png(1)})
    with pytest.raises(UserError, match=rf"{tmp_path}/train/a/1.png: .*{message}"):
        load(f"folder:{tmp_path}", 8)


def test_the_brightest_of_twelve_bits_is_white():
    black = encoded(Image.fromarray(np.zeros((4, 4), np.uint16)), "tiff")
    white = black[:-32] + b"\xff" * 24 + bytes(8)  # 16 pixels of 12 bits
    assert (PHOTO(tiff_with(white, 258, 12), 4) == 255).all()


def test_pixels_are_counted_before_they_are_decoded(tmp_path):
    write(tmp_path, {"train/a/1.ppm": b"P5 9999 9999 255 ", "test/b/1.png": png(1)})
    with pytest.raises(UserError, match=rf"train/a/1.ppm: .*9999 x 9999 pixels, expected at most {decoding.PIXELS:,}"):
        load(f"folder:{tmp_path}", 8)


LARGE = Image.new("L", (3000, 2000), 7)
HELD = {
    "RGBA": lambda: encoded(LARGE.convert("RGBA"), compress_level=1),
    "LA": lambda: encoded(LARGE.convert("LA"), compress_level=1),
    "RGB": lambda: encoded(LARGE.convert("RGB"), compress_level=1, transparency=(0, 0, 0)),
    "16 bits": lambda: encoded(LARGE.convert("I;16"), compress_level=1, transparency=0),
}


def print_held_mib() -> None:
    """The peak of decoding, of each kind, where each array is mapped and unmapped."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 17)
    held = {}
    for kind, make in HELD.items():
        data = make()
        PHOTO(data, 84)  # before: pages of libraries count where they are first read
        memory = PeakMemory(torch.device("cpu"))
        PHOTO(data, 84)
        held[kind] = memory.mib()
    print(json.dumps(held))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the peak is counted as Linux and glibc do")
def test_an_image_is_held_two_and_a_half_times_at_most():
    """In a process of its own: arrays would find room in a heap that former work made long, where their pages stay."""
    image = 4 * LARGE.width * LARGE.height / 2**20
    run = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import print_held_mib; print_held_mib()"],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    for kind, held in json.loads(run.stdout).items():
        assert image < held < 2.5 * image, kind
