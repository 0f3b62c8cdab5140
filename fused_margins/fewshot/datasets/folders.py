"""Colour images in folders by split and class; mini-ImageNet, which comes so or with lists."""

import csv
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import UserError
from .cache import PHOTO, decoded
from .images import ImageSet, from_classes
from .registry import register
from .sources import Archive, Folder, Tree, entries, find, require

SPLITS = ("train", "val", "test")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")

Files = dict[str, list[tuple[Tree, str]]]  # of each class


@register("folder")
def load(root: Path, image_size: int = 84) -> dict[str, ImageSet]:
    """Any folder or zip archive with `{train,val,test}/<class>/<image>`; val may be missing."""
    if root.is_dir():
        tree: Tree = Folder(root)
    elif root.exists():
        # An archive may have everything within a folder of whatever name.
        starts = {before for before, train, _ in (f"/{n}".partition("/train/") for n in entries(root)) if train}
        tree = Archive(root, f"{min(starts, default='', key=len)}/"[1:])
    else:
        raise UserError(f"{root}: no such folder or zip archive")
    name = f"folder-{root.stem}-{hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:8]}"
    return image_sets(name, class_folders(tree), image_size)


@register("mini-imagenet")
def load_mini_imagenet(root: Path, image_size: int = 84) -> dict[str, ImageSet]:
    """mini-ImageNet by the split of Ravi and Larochelle 2017: 64, 16 and 20 classes, each with 600 images.

    Read from `mini-imagenet/{train,val,test}/<class>/`, or from `mini-imagenet/images/` with the lists
    `mini-imagenet/{train,val,test}.csv` (or in `mini-imagenet/ravi/`).
    """
    places = ["mini-imagenet", "miniimagenet", "miniImageNet"]
    split_folders = find(root, places, holding="train/")
    if split_folders is not None:
        return image_sets("mini-imagenet", class_folders(split_folders), image_size)
    guide = (
        "mini-ImageNet is a selection from ImageNet, whose images may not be passed on: make it with the tools of "
        "https://github.com/yaoyao-liu/mini-imagenet-tools, then put images/*.jpg and {train,val,test}.csv there."
    )
    images = require(root, places, guide, holding="images/")
    lists = require(root, [*places, *(f"{place}/ravi" for place in places)], guide, holding="train.csv")
    return image_sets("mini-imagenet", {s: _from_csv(lists, f"{s}.csv", images) for s in SPLITS}, image_size)


def image_sets(
    name: str, splits: Mapping[str, Files], image_size: int, coarse: Mapping[str, str] | None = None
) -> dict[str, ImageSet]:
    """The sets of all splits over one store of images."""
    files = [file for classes in splits.values() for members in classes.values() for file in members]
    images = decoded(name, files, PHOTO, image_size)
    sets, row = {}, 0
    for split, classes in splits.items():
        members = {}
        for class_name, class_files in classes.items():
            members[class_name] = range(row, row + len(class_files))
            row += len(class_files)
        sets[split] = from_classes(images, members, coarse)
    return sets


def class_folders(tree: Tree) -> dict[str, Files]:
    """The images of each class of each split that is there."""
    names = tree.names()
    splits = {split: classes_in(tree, names, f"{split}/") for split in SPLITS}
    for split in ("train", "test"):
        if not splits[split]:
            raise UserError(f"{tree.where(split)}: no folders with images of a class each here")
    return {split: classes for split, classes in splits.items() if classes}


def classes_in(tree: Tree, names: Sequence[str], prefix: str) -> Files:
    """The images below each folder at `prefix`, in the order of the names: those of `tree`, sorted."""
    classes: Files = {}
    for name in names:
        class_name, slash, file = name.removeprefix(prefix).partition("/")
        if name.startswith(prefix) and slash:
            members = classes.setdefault(class_name, [])
            if file.lower().endswith(SUFFIXES):
                members.append((tree, name))
    for class_name, members in classes.items():
        if not members:
            raise UserError(f"{tree.where(prefix + class_name)}: no images in this class ({', '.join(SUFFIXES)})")
    return classes


def _from_csv(lists: Tree, file: str, images: Tree) -> Files:
    """The images of each class by a list with the columns filename and label."""
    classes: Files = {}
    rows = csv.DictReader(lists.text(file).splitlines())
    if not {"filename", "label"} <= set(rows.fieldnames or ()):
        raise UserError(f"{lists.where(file)}: expected the columns filename and label, got {rows.fieldnames}")
    for row in rows:
        if not row["filename"] or not row["label"]:
            raise UserError(f"{lists.where(file)}: line {rows.line_num}: expected a file name and a label")
        classes.setdefault(row["label"], []).append((images, f"images/{row['filename']}"))
    if not classes:
        raise UserError(f"{lists.where(file)}: no images in this list")
    return dict(sorted(classes.items()))
