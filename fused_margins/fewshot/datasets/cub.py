"""CUB_200_2011: 11,788 photographs of 200 kinds of birds (Wah et al., Caltech-UCSD Birds-200-2011, 2011)."""

from collections.abc import Callable
from pathlib import Path

from ..errors import UserError
from .cache import PHOTO, decoded
from .images import ImageSet, from_classes
from .registry import register
from .sources import Tree, require

PLACE = "CUB_200_2011"
_GUIDE = (
    "CUB_200_2011.tgz comes from https://www.vision.caltech.edu/datasets/cub_200_2011: unpack it there, so that "
    "CUB_200_2011/images.txt and CUB_200_2011/images/ exist."
)


@register("cub")
def load(root: Path, image_size: int = 84) -> dict[str, ImageSet]:
    """CUB-200-2011 by the few-shot split of Chen et al. 2019: sorted classes 0, 2 (mod 4) train, 1 val, 3 test."""
    return _load(root, image_size, lambda i, count: ("train", "val", "train", "test")[i % 4])


@register("cub-retrieval")
def load_retrieval(root: Path, image_size: int = 84) -> dict[str, ImageSet]:
    """CUB-200-2011 by the split of metric learning: the first 100 classes train, the last 100 test."""
    return _load(root, image_size, lambda i, count: "train" if i < count // 2 else "test")


def _load(root: Path, image_size: int, split_of: Callable[[int, int], str]) -> dict[str, ImageSet]:
    """The splits to which `split_of(class, number of classes)` sends each class."""
    lists = require(root, [PLACE], _GUIDE, holding="images.txt")
    photos = require(root, [PLACE], _GUIDE, holding="images/")
    class_names = _column(lists, "classes.txt")
    class_of = _column(lists, "image_class_labels.txt")
    members: dict[str, list[int]] = {name: [] for name in sorted(class_names.values())}
    files: list[tuple[Tree, str]] = []
    for image, file in _column(lists, "images.txt").items():
        name = class_names.get(class_of.get(image, ""))
        if name is None:
            labels = lists.where("image_class_labels.txt")
            raise UserError(f"{labels}: no class of classes.txt for image {image} ({file})")
        members[name].append(len(files))
        files.append((photos, f"images/{file}"))
    for name, rows in members.items():
        if not rows:
            raise UserError(f"{lists.where('images.txt')}: no images of the class {name}")
    images = decoded("cub", files, PHOTO, image_size)
    splits: dict[str, dict[str, list[int]]] = {"train": {}, "val": {}, "test": {}}
    for i, (name, rows) in enumerate(members.items()):
        splits[split_of(i, len(members))][name] = rows
    return {split: from_classes(images, classes) for split, classes in splits.items() if classes}


def _column(lists: Tree, file: str) -> dict[str, str]:
    """The text that each identifier has in a list of lines `<identifier> <text>`."""
    column = {}
    for number, line in enumerate(lists.text(file).splitlines(), start=1):
        identifier, _, text = line.strip().partition(" ")
        if not text:
            raise UserError(f"{lists.where(file)}: line {number}: expected a number and a name, got {line!r}")
        column[identifier] = text
    return column
