"""What tests of data sets lay out for themselves: files in folders and archives, images of one value, real lists."""

import io
import os
import zipfile
from pathlib import Path

import pytest
from PIL import Image

REAL = Path(os.environ.get("FUSED_MARGINS_DATA") or "data")


def write(place: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(data)


def pack(archive: Path, files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    archive.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive, "w", method) as opened:
        for name, data in files.items():
            opened.writestr(name, data)
    return archive


def lay(root: Path, form: str, place: str, files: dict[str, bytes]) -> None:
    """`files` at `place` as a folder, as a zip archive of that folder, or as an archive of what is in it."""
    if form == "folder":
        write(root / place, files)
    elif form == "zip":
        pack(root / f"{place}.zip", {f"{place}/{name}": data for name, data in files.items()})
    else:
        pack(root / f"{place}.zip", files)


FORMS = pytest.mark.parametrize("form", ["folder", "zip", "flat zip"])


def encoded(image: Image.Image, kind: str = "png", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(value: int, mode: str = "RGB", size: int = 4) -> bytes:
    return encoded(Image.new(mode, (size, size), (value,) * 3 if mode == "RGB" else value))


def values(images) -> list[int]:
    """The one value of each image."""
    pixels = (images.pixels() * 255).round().int().flatten(1)
    assert (pixels == pixels[:, :1]).all()
    return pixels[:, 0].tolist()


def real(archive: str, member: str) -> str:
    """The text of a real list; the test is skipped where it is not there."""
    if not (REAL / archive).exists():
        pytest.skip(f"{REAL / archive} is not there: FUSED_MARGINS_DATA names the folder with the real lists")
    with zipfile.ZipFile(REAL / archive) as opened:
        return opened.read(member).decode()
