"""Every layout that users bring, in folders and in zip archives: small stand-in images, with the real lists where they
are there."""

import json
import os

import pytest
import torch

from fused_margins.fewshot.datasets import load, published
from fused_margins.fewshot.terminal import UserError

from .layouts import FORMS, lay, pack, png, real, values, write

# Any folder


SPLIT_FILES = {
    "train/b/2.png": png(1),
    "train/b/10.PNG": png(2),
    "train/a/deeper/x.png": png(3),
    "train/a/notes.txt": b"not an image",
    "val/c/x.png": png(4),
    "test/d/x.png": png(5, "L"),
    "test/d/.hidden.png": b"",
    "__MACOSX/train/a/._x.png": b"",
}


@FORMS
def test_a_folder_of_splits(tmp_path, form):
    lay(tmp_path, form, "birds", SPLIT_FILES)
    splits = load(f"folder:{tmp_path / ('birds' if form == 'folder' else 'birds.zip')}", 6)
    assert {name: s.class_names for name, s in splits.items()} == {"train": ("a", "b"), "val": ("c",), "test": ("d",)}
    assert {name: s.shape for name, s in splits.items()} == dict.fromkeys(splits, (3, 6, 6))
    assert {name: values(s) for name, s in splits.items()} == {"train": [3, 2, 1], "val": [4], "test": [5]}
    assert splits["train"].coarse_names == ("a", "b")
    assert splits["train"].images.data_ptr() == splits["test"].images.data_ptr()


@FORMS
@pytest.mark.parametrize("around", ["train/", "images/", "my birds/images/"])
def test_folders_between_split_and_classes_are_no_classes(tmp_path, form, around, capsys):
    files = {f"train/{around}{name}/1.png": png(i) for i, name in enumerate("abc")} | {"train/labels.csv": b""}
    lay(tmp_path, form, "birds", files | {"test/d/1.png": png(3), "test/d/more/2.png": png(4)})
    splits = load(f"folder:{tmp_path / ('birds' if form == 'folder' else 'birds.zip')}", 6)
    assert {s: images.class_names for s, images in splits.items()} == {"train": ("a", "b", "c"), "test": ("d",)}
    assert {s: values(images) for s, images in splits.items()} == {"train": [0, 1, 2], "test": [3, 4]}
    said = capsys.readouterr().out
    assert f": the classes are the folders in {around}\n" in said
    assert "1 left out, no images by their names, or in no class: " in said


def test_val_may_be_missing_and_test_may_not(tmp_path):
    write(tmp_path, {"train/a/1.png": png(1)})
    with pytest.raises(UserError, match=rf"{tmp_path}/test: no folders with images of a class each here"):
        load(f"folder:{tmp_path}")
    write(tmp_path, {"test/a/1.png": png(1)})
    assert list(load(f"folder:{tmp_path}")) == ["train", "test"]


def test_a_folder_that_is_not_there_or_not_an_archive(tmp_path):
    with pytest.raises(UserError, match=rf"{tmp_path}/none: no such folder or zip archive"):
        load(f"folder:{tmp_path}/none")
    (tmp_path / "text").write_text("text")
    with pytest.raises(UserError, match=rf"{tmp_path}/text: not a readable zip archive \(File is not a zip file\)"):
        load(f"folder:{tmp_path}/text")


def test_a_class_without_images(tmp_path):
    write(tmp_path, SPLIT_FILES)
    (tmp_path / "val/empty").mkdir()
    with pytest.raises(UserError, match=rf"{tmp_path}/val/empty: no images in this class \(\.png, \.jpg"):
        load(f"folder:{tmp_path}")


# CIFAR-FS


def _cifar_fs(*left_out: str) -> dict[str, bytes]:
    """An image of each class, of its number in the alphabet: ray, bee and what remains."""
    split = {"ray": "val", "bee": "test"}
    classes = enumerate(sorted(published.COARSE))
    return {f"{split.get(c, 'train')}/{c}/1.png": png(i) for i, c in classes if c not in left_out}


@FORMS
def test_cifar_fs(root, form):
    lay(root, form, "cifar-fs", _cifar_fs())
    splits = load("cifar-fs")
    train = splits.pop("train")
    assert (len(train.class_names), len(train.coarse_names), train.class_names[:2]) == (
        98,
        20,
        ("apple", "aquarium_fish"),
    )
    assert values(train) == [i for i, c in enumerate(sorted(published.COARSE)) if c not in ("ray", "bee")]
    assert {name: (values(s), s.class_names, s.coarse_names, s.shape) for name, s in splits.items()} == {
        "val": ([67], ("ray",), ("fish",), (3, 32, 32)),
        "test": ([6], ("bee",), ("insects",), (3, 32, 32)),
    }


def test_a_class_that_cifar_fs_lacks_is_named(root):
    write(root / "cifar-fs", _cifar_fs("wolf", "bed"))
    with pytest.raises(UserError, match=r"cifar-fs: bed is in no split \(2 of 100 classes missing\)"):
        load("cifar-fs")


def test_cifar_fs_has_the_classes_of_cifar_100(root):
    write(root / "cifar-fs", _cifar_fs() | {"train/ant/1.png": png(1)})
    with pytest.raises(UserError, match=r"cifar-fs: train: ant is not a class of CIFAR-100"):
        load("cifar-fs")


def test_the_superclasses_are_those_of_the_real_lists():
    lists = (real("cifar_fs.zip", f"cifar-fs/splits/{split}.json") for split in ("train", "val", "test"))
    pairs = [tuple(pair) for text in lists for pair in json.loads(text)]
    assert {fine: coarse for coarse, fine in pairs} == published.COARSE
    assert len(pairs) == 100


# mini-ImageNet


@pytest.mark.parametrize("place", ["mini-imagenet", "mini-imagenet/ravi"])
def test_mini_imagenet_by_lists(root, place):
    rows = {"train": "b.jpg,n2\na.jpg,n1\nc.jpg,n2\n", "val": "d.jpg,n3\n", "test": "e.jpg,n4\n"}
    write(root / place, {f"{split}.csv": f"filename,label\n{text}".encode() for split, text in rows.items()})
    write(root / "mini-imagenet/images", {f"{name}.jpg": png(i) for i, name in enumerate("abcdef")})
    splits = load("mini-imagenet", 5)
    assert splits["train"].class_names == ("n1", "n2")
    assert {name: values(s) for name, s in splits.items()} == {"train": [0, 1, 2], "val": [3], "test": [4]}


def test_mini_imagenet_in_folders(root):
    write(root / "miniImageNet", {"train/n1/a.jpg": png(1), "val/n2/a.jpg": png(2), "test/n3/a.jpg": png(3)})
    assert {name: (values(s), s.shape) for name, s in load("mini-imagenet").items()} == {
        "train": ([1], (3, 84, 84)),
        "val": ([2], (3, 84, 84)),
        "test": ([3], (3, 84, 84)),
    }


def test_the_real_lists_of_mini_imagenet(root):
    lists = {s: real("splits_meta.zip", f"mini-imagenet/ravi/{s}.csv") for s in ("train", "val", "test")}
    # Stand-ins for the first and the last image of each class; the lists are cut to them and otherwise as they are.
    cut: dict[str, list[str]] = {}
    for split, text in lists.items():
        head, *rows = text.splitlines()
        assert len(rows) == 600 * {"train": 64, "val": 16, "test": 20}[split]
        cut[split] = [head, *(row for i, row in enumerate(rows) if i % 600 in (0, 599))]
    files = [row.split(",") for rows in cut.values() for row in rows[1:]]
    number = {label: i for i, label in enumerate(sorted({label for _, label in files}))}
    pack(root / "splits.zip", {f"mini-imagenet/ravi/{s}.csv": "\n".join(rows).encode() for s, rows in cut.items()})
    pack(root / "mini-imagenet.zip", {f"images/{file}": png(number[label]) for file, label in files})
    splits = load("mini-imagenet", 4)
    assert {name: (len(s.class_names), len(s)) for name, s in splits.items()} == {
        "train": (64, 128),
        "val": (16, 32),
        "test": (20, 40),
    }
    for s in splits.values():
        assert values(s) == [number[s.class_names[label]] for label in s.labels]


# CUB-200-2011


def bird_files(class_names: list[str], images: list[tuple[str, int]]) -> dict[str, bytes]:
    lists = {
        "classes.txt": [f"{i} {name}" for i, name in enumerate(class_names, start=1)],
        "images.txt": [f"{i} {file}" for i, (file, _) in enumerate(images, start=1)],
        "image_class_labels.txt": [f"{i} {label}" for i, (_, label) in enumerate(images, start=1)],
    }
    return {name: "\n".join(lines).encode() for name, lines in lists.items()}


BIRDS = ["004.D", "001.A", "002.B", "003.C"]


@FORMS
def test_cub(root, form):
    files = bird_files(
        BIRDS, [("001.A/x y.jpg", 2), ("002.B/b.jpg", 3), ("003.C/c.jpg", 4), ("004.D/d.jpg", 1), ("001.A/e.jpg", 2)]
    )
    photos = {
        "001.A/x y.jpg": png(1, "L"),
        "002.B/b.jpg": png(2),
        "003.C/c.jpg": png(3),
        "004.D/d.jpg": png(4),
        "001.A/e.jpg": png(5),
    }
    lay(root, form, "CUB_200_2011", files | {f"images/{name}": data for name, data in photos.items()})
    few_shot = {name: (s.class_names, values(s)) for name, s in load("cub").items()}
    assert few_shot == {"train": (("001.A", "003.C"), [1, 5, 3]), "val": (("002.B",), [2]), "test": (("004.D",), [4])}
    retrieval = {name: (s.class_names, values(s)) for name, s in load("cub-retrieval").items()}
    assert retrieval == {"train": (("001.A", "002.B"), [1, 5, 2]), "test": (("003.C", "004.D"), [3, 4])}


def test_the_real_lists_of_cub(root):
    lists = {f: real("splits_meta.zip", f"CUB_200_2011/{f}.txt") for f in ("classes", "images", "image_class_labels")}
    write(root / "CUB_200_2011", {f"{file}.txt": text.encode() for file, text in lists.items()})
    names = [line.split(" ", 1)[1] for line in lists["images"].splitlines()]
    # One stand-in a class, to which all of its images lead: what is decoded is 1 x 1.
    for class_name in {name.split("/")[0] for name in names}:
        write(root / "CUB_200_2011/images", {f"{class_name}/one": png(int(class_name[:3]), size=1)})
    for name in names:
        os.link(root / "CUB_200_2011/images" / name.split("/")[0] / "one", root / "CUB_200_2011/images" / name)
    counts = {
        "cub": {"train": (100, 5885), "val": (50, 2950), "test": (50, 2953)},
        "cub-retrieval": {"train": (100, 5864), "test": (100, 5924)},
    }
    remainders = {"train": {0, 2}, "val": {1}, "test": {3}}
    for dataset, expected in counts.items():
        splits = load(dataset, 1)
        assert {name: (len(s.class_names), len(s)) for name, s in splits.items()} == expected
        for split, images in splits.items():
            numbers = torch.tensor([int(name[:3]) for name in images.class_names])  # from 1, sorted
            assert values(images) == numbers[images.labels].tolist()
            if dataset == "cub":
                assert {(number - 1) % 4 for number in numbers.tolist()} == remainders[split]
            else:
                assert ((numbers <= 100) == (split == "train")).all()


@pytest.mark.parametrize("name", ["omniglot-background", "cifar-fs", "mini-imagenet", "cub", "cub-retrieval"])
def test_what_is_not_there_is_named_and_where_it_comes_from(root, name):
    with pytest.raises(UserError, match=rf"{root}: no .* in this folder \(FUSED_MARGINS_DATA names.*https://"):
        load(name)
