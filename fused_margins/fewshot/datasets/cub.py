"""CUB_200_2011: 11,788 photographs of 200 kinds of birds (Wah et al., Caltech-UCSD Birds-200-2011, 2011)."""

from collections.abc import Callable
from pathlib import Path

from ..errors import UserError
from .decoding import PHOTO, decoded
from .images import ImageSet, from_classes
from .lists import Finder, Line, Once, lines
from .sources import Tree, left_out, require

PLACE = "CUB_200_2011"
_GUIDE = (
    "CUB_200_2011.tgz comes from https://www.vision.caltech.edu/datasets/cub_200_2011: unpack it there, so that "
    "CUB_200_2011/images.txt and CUB_200_2011/images/ exist."
)


def load(root: Path, image_size: int = 84) -> dict[str, ImageSet]:
    """CUB-200-2011 by the few-shot split of Chen et al. 2019: sorted classes 0, 2 (mod 4) train, 1 val, 3 test."""
    return _load(root, image_size, lambda i, count: ("train", "val", "train", "test")[i % 4])


def load_retrieval(root: Path, image_size: int = 84) -> dict[str, ImageSet]:
    """CUB-200-2011 by the split of metric learning: the first 100 classes train, the last 100 test."""
    return _load(root, image_size, lambda i, count: "train" if i < count // 2 else "test")


def _load(root: Path, image_size: int, split_of: Callable[[int, int], str]) -> dict[str, ImageSet]:
    """The splits to which `split_of(class, number of classes)` sends each class."""
    lists = require(root, [PLACE], _GUIDE, holding="images.txt")
    photos = require(root, [PLACE], _GUIDE, holding="images/")
    class_names, labels = _column(lists, "classes.txt"), _column(lists, "image_class_labels.txt")
    names = Once("class")
    for label, (line, name) in class_names.items():
        names.add(line, name, f"number {label}")
    if not class_names:
        raise UserError(f"{lists.where('classes.txt')}: no classes in this list")
    members: dict[str, list[int]] = {name: [] for name in sorted(names.values)}
    files: list[tuple[Tree, str]] = []
    find_image, classes_of_files = Finder(photos, "images/"), Once("file")
    for image, (line, listed) in _column(lists, "images.txt").items():
        if image not in labels:
            raise line.error(f"image_class_labels.txt has no class for image {image} ({listed})")
        label_line, label = labels.pop(image)
        if label not in class_names:
            raise label_line.error(f"no class {label} of image {image} ({listed}) in classes.txt")
        name, file = class_names[label][1], find_image(line, listed)
        if classes_of_files.add(line, file, f"of the class {name}"):
            members[name].append(len(files))
            files.append((photos, file))
    for line, _ in labels.values():
        raise line.error("there is no such image in images.txt")
    left_out(lists.where("images.txt"), "listed twice", classes_of_files.repeated)
    find_image.left_out(classes_of_files.values)
    for name, rows in members.items():
        if not rows:
            raise UserError(f"{lists.where('images.txt')}: no images of the class {name}")
    images = decoded("cub", files, PHOTO, image_size)
    splits: dict[str, dict[str, list[int]]] = {"train": {}, "val": {}, "test": {}}
    for i, (name, rows) in enumerate(members.items()):
        splits[split_of(i, len(members))][name] = rows
    if not splits["test"]:
        raise UserError(f"{lists.where('classes.txt')}: too few classes to split, {len(members)}")
    return {split: from_classes(images, classes) for split, classes in splits.items() if classes}


def _column(lists: Tree, file: str) -> dict[str, tuple[Line, str]]:
    """The text that each identifier has in a list of lines `<identifier> <text>`, and its line."""
    texts, column = Once("identifier"), {}
    for line in lines(lists, file):
        identifier, *rest = line.text.split(maxsplit=1)
        if not rest:
            raise line.error(f"expected a number and a name, got {line.text!r}")
        if texts.add(line, identifier, rest[0]):
            column[identifier] = (line, rest[0])
    left_out(lists.where(file), "listed twice", texts.repeated)
    return column
