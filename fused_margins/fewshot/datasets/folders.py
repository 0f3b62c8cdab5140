"""Colour images in folders by split and class, and the few-shot sets that come so: CIFAR-FS and mini-ImageNet."""

import csv
import hashlib
import json
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
    else:
        # An archive may have everything within a folder of whatever name.
        starts = {name.partition("train/")[0] for name in entries(root) if f"/{name}".count("/train/") == 1}
        tree = Archive(root, min(starts, default="", key=len))
    name = f"folder-{root.stem}-{hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:8]}"
    return image_sets(name, class_folders(tree), image_size)


@register("cifar-fs")
def load_cifar_fs(root: Path, image_size: int = 32) -> dict[str, ImageSet]:
    """CIFAR-FS (Bertinetto et al. 2019): 64, 16 and 20 classes of CIFAR-100, each with 600 images.

    Read from `cifar-fs/{train,val,test}/<class>/`, with coarse classes from `cifar-fs/splits/*.json` if they are there,
    or as its authors published it, in `cifar100/data/<class>/` with the splits in `cifar100/splits/bertinetto/*.txt`.
    """
    original = find(root, ["cifar100"], holding="splits/bertinetto/train.txt")
    if original is not None:
        folders = _by_class(original, "data/")
        return image_sets("cifar-fs", {split: _named(original, split, folders) for split in SPLITS}, image_size)
    guide = "CIFAR-FS is linked from https://github.com/bertinetto/r2d2: put cifar-fs.zip or the unpacked folder there."
    tree = require(root, ["cifar-fs", "cifar_fs", "CIFAR-FS"], guide, holding="train/")
    splits = class_folders(tree)
    coarse: dict[str, str] = {}
    for split, classes in splits.items():
        file = f"splits/{split}.json"
        if file in tree.names():
            coarse |= _superclasses(tree, file, classes)
    return image_sets("cifar-fs", splits, image_size, coarse)


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
    splits = {split: _by_class(tree, f"{split}/") for split in SPLITS}
    for split in ("train", "test"):
        if not splits[split]:
            raise UserError(f"{tree.where(split)}: no folders with images of a class each here")
    return {split: classes for split, classes in splits.items() if classes}


def _by_class(tree: Tree, prefix: str) -> Files:
    """The images below each folder at `prefix`, classes and images sorted by name."""
    classes: Files = {}
    for name in tree.names():
        class_name, slash, file = name.removeprefix(prefix).partition("/")
        if name.startswith(prefix) and slash:
            members = classes.setdefault(class_name, [])
            if file.lower().endswith(SUFFIXES):
                members.append((tree, name))
    for class_name, members in classes.items():
        if not members:
            raise UserError(f"{tree.where(prefix + class_name)}: no images in this class ({', '.join(SUFFIXES)})")
    return classes


def _named(tree: Tree, split: str, folders: Files) -> Files:
    """The classes that a list of names chooses."""
    file = f"splits/bertinetto/{split}.txt"
    names = tree.text(file).split()
    for number, name in enumerate(names, start=1):
        if name not in folders:
            raise UserError(f"{tree.where(file)}: line {number}: there is no folder data/{name}")
    return {name: folders[name] for name in sorted(names)}


def _superclasses(tree: Tree, file: str, classes: Sequence[str] | Files) -> dict[str, str]:
    """The superclass of each class, from a list of pairs [superclass, class]."""
    try:
        coarse = {fine: superclass for superclass, fine in json.loads(tree.text(file))}
    except (ValueError, TypeError) as error:
        raise UserError(f"{tree.where(file)}: expected a list of pairs [superclass, class] ({error})") from None
    for name in classes:
        if name not in coarse:
            raise UserError(f"{tree.where(file)}: the class {name} is missing")
    return coarse


def _from_csv(lists: Tree, file: str, images: Tree) -> Files:
    """The images of each class by a list with the columns filename and label."""
    classes: Files = {}
    rows = csv.DictReader(lists.text(file).splitlines())
    if not {"filename", "label"} <= set(rows.fieldnames or ()):
        raise UserError(f"{lists.where(file)}: expected the columns filename and label, got {rows.fieldnames}")
    for row in rows:
        classes.setdefault(row["label"], []).append((images, f"images/{row['filename']}"))
    if not classes:
        raise UserError(f"{lists.where(file)}: no images in this list")
    return dict(sorted(classes.items()))
