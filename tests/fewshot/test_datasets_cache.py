"""Decoded images in the cache: what is reused, what is made anew, and what damage is called."""

import json
import multiprocessing
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fused_margins.fewshot.datasets import decoding, load
from fused_margins.fewshot.terminal import UserError
from tests.forks import Forked

from .layouts import pack


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three noisy images, which no compression makes small."""
    generator = np.random.default_rng(0)
    for name in ("train/a/1.png", "train/b/1.png", "test/c/1.png"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True)
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    return tmp_path / "data"


def packed(folder: Path) -> Path:
    files = {file.relative_to(folder).as_posix(): file.read_bytes() for file in sorted(folder.rglob("*.png"))}
    return pack(folder.with_suffix(".zip"), files)


@pytest.fixture
def archive(folder) -> Path:
    return packed(folder)


@pytest.fixture
def decoded(monkeypatch) -> list[int]:
    """Grows by one with each image that is decoded."""
    count: list[int] = []
    decode = decoding.Decoder.__call__
    monkeypatch.setattr(
        decoding.Decoder, "__call__", lambda self, data, size: count.append(1) or decode(self, data, size)
    )
    return count


def arrays() -> list[Path]:
    return sorted(decoding.cache_folder().glob("*.npy"))


def pixels(source: Path, size: int = 8) -> torch.Tensor:
    splits = load(f"folder:{source}", size)
    return torch.cat([splits["train"].pixels(), splits["test"].pixels()])


@pytest.mark.parametrize("form", ["folder", "archive"])
def test_decoded_once_and_then_mapped(form, decoded, folder, request):
    source = request.getfixturevalue(form)
    first = pixels(source)
    for image, file in zip(first, sorted(folder.rglob("train/*/*.png")) + sorted(folder.rglob("test/*/*.png"))):
        expected = torch.from_numpy(np.asarray(Image.open(file)).copy()).permute(2, 0, 1)
        assert torch.equal((image * 255).round().to(torch.uint8), expected)
    assert len(decoded) == 3
    assert torch.equal(pixels(source), first)
    assert len(decoded) == 3
    note = json.loads(arrays()[0].with_suffix(".json").read_text())
    assert (note["shape"], note["images"]) == ([3, 3, 8, 8], ["train/a/1.png", "train/b/1.png", "test/c/1.png"])
    assert arrays()[0].stem.endswith(note["checksum"][:16])
    # A map of the file, not a copy of it: what is written there shows.
    images = load(f"folder:{source}", 8)["train"].images
    with open(arrays()[0], "rb+") as file:
        file.seek(-images.numel(), os.SEEK_END)
        file.write(b"\x07")
    assert images[0, 0, 0, 0] == 7


def test_sizes_have_arrays_of_their_own(decoded, folder):
    pixels(folder, 8)
    pixels(folder, 4)
    pixels(folder, 8)
    assert len(decoded) == 6
    assert len(arrays()) == 2


def test_a_changed_source_is_decoded_anew_and_takes_the_place_of_the_former(decoded, folder):
    first = pixels(folder)
    before = arrays()
    Image.new("RGB", (8, 8), (255, 0, 0)).save(folder / "train/a/1.png")
    second = pixels(folder)
    assert torch.equal(second[0].mean((1, 2)), torch.tensor([1.0, 0, 0]))
    assert torch.equal(second[1:], first[1:])
    assert len(decoded) == 6
    assert len(arrays()) == 1
    assert arrays() != before
    assert len(list(decoding.cache_folder().iterdir())) == 2


def test_a_changed_archive_is_decoded_anew(decoded, folder, archive):
    pixels(archive)
    Image.new("RGB", (8, 8), (255, 0, 0)).save(folder / "train/a/1.png")
    packed(folder)
    assert torch.equal(pixels(archive)[0].mean((1, 2)), torch.tensor([1.0, 0, 0]))


def one_bit(array: Path, place: int) -> None:
    data = bytearray(array.read_bytes())
    data[place] ^= 1
    array.write_bytes(data)


DAMAGE = {
    "bit": lambda array, note: one_bit(array, -1),
    "first-bit": lambda array, note: one_bit(array, -3 * 3 * 8 * 8),
    "order": lambda array, note: array.write_bytes(array.read_bytes().replace(b"False", b"True ")),
    "zip": lambda array, note: array.write_bytes(b"PK\x03\x04" + array.read_bytes()),
    "unsummed": lambda array, note: note.write_text(note.read_text().replace("array_crc32", "other")),
    "cut": lambda array, note: array.write_bytes(array.read_bytes()[:-1]),
    "empty": lambda array, note: array.write_bytes(b""),
    "noise": lambda array, note: array.write_bytes(b"noise" * 100),
    "gone": lambda array, note: array.unlink(),
    "shape": lambda array, note: np.save(array, np.zeros((3, 3, 8, 9), np.uint8)),
    "dtype": lambda array, note: np.save(array, np.zeros((3, 3, 8, 8), np.float32)),
    "json": lambda array, note: note.write_text("{"),
    "utf8": lambda array, note: note.write_bytes(b"\xff"),
    "list": lambda array, note: note.write_text("[]"),
    "other": lambda array, note: note.write_text('{"checksum": "0"}'),
    "unnoted": lambda array, note: note.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_cache_is_made_anew(damage, decoded, folder):
    first = pixels(folder)
    array = arrays()[0]
    whole = {path: path.read_bytes() for path in (array, array.with_suffix(".json"))}
    damage(*whole)
    assert torch.equal(pixels(folder), first)
    assert len(decoded) == 6
    assert {path: path.read_bytes() for path in whole} == whole


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda data: b"text", "not an image in a known format"),
        (lambda data: b"", "not an image in a known format"),
        (lambda data: data[:-60], r"not a readable image \(.*truncated"),
    ],
    ids=["text", "empty", "cut"],
)
def test_an_unreadable_image_is_named_and_nothing_is_kept(folder, content, reason):
    path = folder / "train/b/1.png"
    path.write_bytes(content(path.read_bytes()))
    with pytest.raises(UserError, match=rf"{path}: {reason}"):
        pixels(folder)
    assert list(decoding.cache_folder().iterdir()) == []


def test_a_damaged_entry_of_an_archive_is_named(archive):
    data = bytearray(archive.read_bytes())
    with zipfile.ZipFile(archive) as opened:
        start = opened.getinfo("train/b/1.png").header_offset
    data[start + 100] ^= 255
    archive.write_bytes(data)
    with pytest.raises(UserError, match=rf"{archive}: train/b/1.png: cannot be read \(Bad CRC-32"):
        pixels(archive)
    assert list(decoding.cache_folder().iterdir()) == []


def test_a_cut_archive_is_named(archive):
    archive.write_bytes(archive.read_bytes()[:-30])
    with pytest.raises(UserError, match=rf"{archive}: not a readable zip archive \(File is not a zip file\)"):
        pixels(archive)


def test_an_interrupt_leaves_nothing_behind(folder, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(decoding.Decoder, "__call__", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pixels(folder)
    assert list(decoding.cache_folder().iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FUSED_MARGINS_CACHE", str(tmp_path / "file/cache"))
    with pytest.raises(
        UserError, match=r"file/cache: the cache of decoded images cannot .*; FUSED_MARGINS_CACHE names"
    ):
        pixels(folder)


def test_the_cache_is_in_the_home_unless_named(monkeypatch):
    monkeypatch.delenv("FUSED_MARGINS_CACHE")
    assert decoding.cache_folder() == Path.home() / ".cache/fused-margins"


def test_two_processes_at_once(folder):
    for i in range(200):
        Image.new("RGB", (8, 8), (i, i, i)).save(folder / f"train/a/{i + 2:03d}.png")
    here, there = multiprocessing.get_context("fork").Pipe()

    def sum_up(pipe):
        pipe.send("ready")  # both start together
        pipe.recv()
        return load(f"folder:{folder}", 8)["train"].images.sum().item()

    other = Forked(lambda: there.send(sum_up(there)))
    assert here.recv() == "ready"
    here.send("go")
    total = load(f"folder:{folder}", 8)["train"].images.sum().item()
    assert here.recv() == total
    assert other.result() == (0, "")
    # All splits share these images.
    assert total == sum(int(np.asarray(Image.open(file)).sum()) for file in folder.rglob("*.png"))
    assert len(list(decoding.cache_folder().iterdir())) == 2
