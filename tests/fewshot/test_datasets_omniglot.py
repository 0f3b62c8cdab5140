"""Omniglot in every layout that users bring: three ways to split it, and the official one-shot runs."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from fused_margins.fewshot.datasets import load, one_shot_runs
from fused_margins.fewshot.datasets.omniglot import DOWNLOADS, missing
from fused_margins.fewshot.terminal import UserError

from .layouts import FORMS, encoded, lay, pack, png, real, values, write


def drawings(characters: dict[str, int], drawers=(1, 20)) -> dict[str, bytes]:
    """A drawing is black in the upper left corner, where the ink is; a grey elsewhere tells its number."""
    files = {}
    for name, number in characters.items():
        for drawer in drawers:
            image = Image.new("L", (4, 4), 255 - number)
            image.putpixel((0, 0), 0)
            files[f"{name}/{number:04d}_{drawer:02d}.png"] = encoded(image)
    return files


def lay_omniglot(root: Path, form: str) -> None:
    lay(root, form, "images_background", drawings({"Abc/character01": 1, "Abc/character02": 2, "Def/character01": 3}))
    lay(root, form, "images_evaluation", drawings({"Ghi/character01": 4, "Ghi/character02": 5}))


LISTS = {
    "train.txt": b"Ghi/character01/rot090\nAbc/character02/rot000\n",
    "val.txt": b"Abc/character01/rot180\n",
    "test.txt": b"Def/character01/rot270\n",
}


def numbers(images) -> list[int]:
    return (images.pixels()[:, 0, 1, 1] * 255).round().int().tolist()


def corners(images) -> list[str]:
    """Where the ink is in each image: `|` goes between the two rows of corners."""
    found = images.pixels()[:, 0, ::3, ::3] > 0.5
    return ["|".join("".join("#" if ink else "." for ink in row) for row in image.tolist()) for image in found]


@FORMS
def test_omniglot_by_the_split_of_vinyals(root, form):
    lay_omniglot(root, form)
    write(root / "omniglot/vinyals", LISTS)
    splits = load("omniglot", 4)
    train = splits["train"]
    assert train.class_names == ("Ghi/character01/rot090", "Abc/character02/rot000")
    assert (train.coarse_names, train.coarse_labels.tolist()) == (("Ghi", "Abc"), [0, 0, 1, 1])
    assert (numbers(train), numbers(splits["val"]), numbers(splits["test"])) == ([4, 4, 2, 2], [1, 1], [3, 3])
    # Counter-clockwise, as torch.rot90 and the rotations of Pillow go.
    assert corners(train) == ["..|#."] * 2 + ["#.|.."] * 2
    assert corners(splits["val"]) == ["..|.#"] * 2
    assert corners(splits["test"]) == [".#|.."] * 2


def test_omniglot_by_alphabets_and_by_drawers(root):
    lay_omniglot(root, "zip")
    splits = load("omniglot-background", 4)
    assert len(splits["train"].class_names) == 12
    assert (numbers(splits["train"])[::8], numbers(splits["test"])[::2]) == ([1, 2, 3], [4, 5])
    assert corners(splits["train"])[:8:2] == ["#.|..", "..|#.", "..|.#", ".#|.."]
    assert corners(splits["test"]) == ["#.|.."] * 4
    assert (splits["train"].coarse_names, splits["test"].coarse_names) == (("Abc", "Def"), ("Ghi",))

    splits = load("omniglot-alphabets", 4)
    assert splits["train"].class_names == splits["test"].class_names
    assert splits["train"].coarse_names == ("Abc", "Def")
    assert (numbers(splits["train"]), numbers(splits["test"])) == ([1, 2, 3], [1, 2, 3])


def test_omniglot_that_is_not_whole(root):
    with pytest.raises(UserError, match=r"no omniglot/vinyals/train.txt or .*`fused-margins data omniglot` downloads"):
        load("omniglot")
    write(root / "omniglot/vinyals", LISTS)
    with pytest.raises(UserError, match=rf"{root}: no images_background/ or .* in a zip archive there\. .*brendenlake"):
        load("omniglot")
    write(root, {"images_background.zip": b"PK"})
    with pytest.raises(
        UserError, match=r"images_background.zip: not a readable zip archive \(File is not a zip file\)"
    ):
        load("omniglot")
    (root / "images_background.zip").unlink()
    lay_omniglot(root, "folder")
    write(root / "omniglot/vinyals", {"val.txt": b"Abc/character01/rot180\nAbc/character09/rot180"})
    with pytest.raises(UserError, match=r"vinyals/val.txt: line 2: there are no images of Abc/character09"):
        load("omniglot")
    write(root / "omniglot/vinyals", {"val.txt": b"Abc/character01"})
    with pytest.raises(UserError, match=r"vinyals/val.txt: line 1: expected .../rot000, 090, 180 or 270, got 'Abc/cha"):
        load("omniglot")
    write(root, {"images_evaluation/Ghi/character04/0009_01.png": png(9)})
    with pytest.raises(UserError, match=r"images_evaluation/Ghi: character03 has no images"):
        load("omniglot-background")
    (root / "images_evaluation/Ghi/character04/0009_01.png").unlink()
    (root / "images_background/Def/character01/0003_20.png").unlink()
    with pytest.raises(UserError, match=r"images_background: Def/character01 has no image for the test split"):
        load("omniglot-alphabets")
    shutil.rmtree(root / "images_evaluation")
    write(root / "images_evaluation", {"other.png": png(1)})
    with pytest.raises(UserError, match=r"images_evaluation: no images <alphabet>/characterNN/NNNN_NN.png here"):
        load("omniglot-background")


def test_what_of_omniglot_is_missing(root):
    assert missing(root) == list(DOWNLOADS)
    lay_omniglot(root, "zip")
    write(root / "omniglot-py/all_runs", {"run01/class_labels.txt": b""})
    pack(root / "lists.zip", {f"omniglot/vinyals/{name}": text for name, text in LISTS.items() if name != "val.txt"})
    assert [d.place for d in missing(root)] == ["omniglot/vinyals/val.txt"]


def test_the_real_lists_of_omniglot(root):
    lists = {s: real("splits_meta.zip", f"omniglot/vinyals/{s}.txt") for s in ("train", "val", "test")}
    names = sorted({line.rpartition("/")[0] for text in lists.values() for line in text.split()})
    assert len(names) == 1623
    number = {name: i for i, name in enumerate(names)}
    pngs = [png(255 - v, "L", size=1) for v in range(255)]
    files = {f"{name}/{i:04d}_01.png": pngs[i % 255] for name, i in number.items()}
    half = len(files) // 2
    for place, part in (("images_background", list(files)[:half]), ("images_evaluation", list(files)[half:])):
        pack(root / f"{place}.zip", {f"{place}/{name}": files[name] for name in part})
    write(root / "omniglot/vinyals", {f"{split}.txt": text.encode() for split, text in lists.items()})
    splits = load("omniglot", 1)
    assert {name: len(s) for name, s in splits.items()} == {"train": 4112, "val": 688, "test": 1692}
    for split, images in splits.items():
        assert images.class_names == tuple(lists[split].split())
        assert values(images) == [number[name.rpartition("/")[0]] % 255 for name in images.class_names]


# The official one-shot runs


def run_files() -> dict[str, bytes]:
    files = {}
    for run in range(1, 21):
        order = [(7 * i + run) % 20 + 1 for i in range(20)]  # the class of each test item
        lines = [
            f"run{run:02d}/test/item{i:02d}.png run{run:02d}/training/class{c:02d}.png" for i, c in enumerate(order, 1)
        ]
        files[f"run{run:02d}/class_labels.txt"] = "\n".join(reversed(lines)).encode()
        files |= {f"run{run:02d}/training/class{c:02d}.png": png(255 - c, "L") for c in range(1, 21)}
        files |= {f"run{run:02d}/test/item{i:02d}.png": png(255 - 100 - c, "L") for i, c in enumerate(order, 1)}
    return files


@FORMS
def test_official_runs(root, form):
    lay(root, form, "all_runs", run_files())
    runs = one_shot_runs(5)
    assert runs.training.shape == runs.test.shape == (20, 20, 1, 5, 5)
    assert runs.training.dtype == torch.float32
    training, test = ((images * 255).round()[:, :, 0, 2, 2] for images in (runs.training, runs.test))
    assert torch.equal(training, torch.arange(1.0, 21).expand(20, 20))
    assert torch.equal(training.gather(1, runs.answers), test - 100)


@pytest.mark.parametrize("text", ["", "run03/test/item01.png", "a b c\n" * 20, "a b\n" * 20], ids=range(4))
def test_official_runs_that_are_not_whole(root, text):
    write(root / "all_runs", run_files() | {"run03/class_labels.txt": text.encode()})
    with pytest.raises(
        UserError, match=r"run03/class_labels.txt: expected 20 lines with a test and a training image each"
    ):
        one_shot_runs()


def test_a_damaged_archive_of_something_else_is_passed_over(root):
    lay_omniglot(root, "zip")
    pack(root / "lists.zip", {f"omniglot/vinyals/{name}": text for name, text in LISTS.items()})
    write(root, {"broken.zip": b"PK"})
    assert len(load("omniglot", 4)["train"]) == 4
