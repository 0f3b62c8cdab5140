"""Data sets as they are published, but for Omniglot: digits, CIFAR-FS, CUB and mini-ImageNet, and how to read the lists
of classes and files that come with such data sets, as people have them: byte order marks, blank lines, spaces.
"""

import codecs
import csv
import io
import posixpath
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from ..terminal import UserError
from .decoding import PHOTO, decoded
from .folders import SPLITS, Files, class_folders, classes_in, image_sets
from .images import ImageSet, from_classes
from .sources import Tree, find, left_out, reader, require

LINE_CHARACTERS = 4096  # as long as a path can be
LIST_BYTES = 16 << 20  # of a list: a hundred bytes for each of 160,000 images


@dataclass(frozen=True)
class Line:
    """A line that is not blank, without the spaces around it."""

    tree: Tree
    file: str
    number: int
    text: str

    def error(self, reason: str) -> UserError:
        return UserError(f"{self.tree.where(self.file)}: line {self.number}: {reason}")

    def fields(self, delimiter: str) -> list[str]:
        """What stands between delimiters, in quotes or without."""
        try:
            reader = csv.reader([self.text], delimiter=delimiter, skipinitialspace=True, strict=True)
            return [field.strip() for field in next(reader)]
        except csv.Error as error:
            raise self.error(str(error)) from None


def lines(tree: Tree, file: str) -> Iterator[Line]:
    """The lines of a list; bytes that are not UTF-8 become what Python makes of them in the names of files."""
    with reader() as read:
        data = read(tree, file)
    if len(data) > LIST_BYTES:
        raise UserError(f"{tree.where(file)}: larger than {LIST_BYTES >> 20} MiB, expected a list")
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # what Windows calls Unicode
    try:
        text = data.decode("utf-16") if wide else data.decode("utf-8-sig", "surrogateescape")
    except UnicodeDecodeError as error:
        raise UserError(f"{tree.where(file)}: not text ({error.reason} at byte {error.start})") from None
    for number, content in enumerate(io.StringIO(text, newline=None), start=1):
        line = Line(tree, file, number, content.strip())
        if "\0" in line.text:
            raise line.error("a NUL byte, which is in no name")
        if len(line.text) > LINE_CHARACTERS:
            raise line.error(f"expected at most {LINE_CHARACTERS} characters, got {len(line.text)}")
        if line.text:
            yield line


class Once:
    """What a list may say once: told again it is left out and counted, and with another value it is an error."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.values: dict[str, tuple[str, Line]] = {}
        self.repeated: list[str] = []

    def add(self, line: Line, key: str, value: str = "") -> bool:
        """Whether `key` is new."""
        former, before = self.values.setdefault(key, (value, line))
        if before is line:
            return True
        if former != value:
            place = f"line {before.number}" + (f" of {before.file}" if before.file != line.file else "")
            raise line.error(f"the {self.what} {key} is {value} here, but {former} in {place}")
        self.repeated.append(f"{self.what} {key} in line {line.number}")
        return False


class Finder:
    """The files of a folder of a tree, by the names that lists give them."""

    def __init__(self, tree: Tree, folder: str) -> None:
        self.tree = tree
        self.folder = folder

    def __call__(self, line: Line, name: str) -> str:
        """The file that is meant: of this name, else the only one that differs in case, accents or slashes alone."""
        plain = posixpath.normpath(name)
        if plain.startswith(("/", "../")):
            raise line.error(f"{name} leads out of {self.tree.where(self.folder)}")
        exact, alike = self._files
        if self.folder + plain in exact:
            return self.folder + plain
        meant = alike.get(_folded(self.folder + plain), [])
        if len(meant) != 1:
            reason = f"; {meant[0]} and {meant[1]} are like it" if meant else ""
            raise line.error(f"there is no {self.folder}{plain} in {self.tree.where('')}{reason}")
        return meant[0]

    def left_out(self, listed: Iterable[str]) -> None:
        """Say which files no list names, of all that `listed` has."""
        left_out(self.tree.where(self.folder), "in no list", sorted(self._files[0] - set(listed)))

    @cached_property
    def _files(self) -> tuple[set[str], dict[str, list[str]]]:
        names = [name for name in self.tree.names(self.folder) if not name.endswith("/")]
        alike = defaultdict(list)
        for name in names:
            alike[_folded(name)].append(name)
        return set(names), alike


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name.replace("\\", "/")).casefold()


DIGIT_SIZE = 8


def load_digits(root: Path, image_size: int = DIGIT_SIZE) -> dict[str, ImageSet]:
    """1797 handwritten digits of 8 x 8 pixels from scikit-learn; coarse labels: even, odd; a third is held out."""
    if image_size != DIGIT_SIZE:
        raise UserError(f"image_size: digits have {DIGIT_SIZE} x {DIGIT_SIZE} pixels, got {image_size}")
    from sklearn.datasets import load_digits as handwritten  # not for who loads other data: they take a while to import
    from sklearn.model_selection import train_test_split

    digits = handwritten()
    images = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(digits.target.astype(np.int64))
    everything = ImageSet(images, labels, labels % 2, tuple(str(name) for name in digits.target_names), ("even", "odd"))
    train, test = train_test_split(np.arange(len(labels)), test_size=1 / 3, stratify=labels, random_state=0)
    return {
        split: everything.subset(torch.from_numpy(np.sort(rows))) for split, rows in (("train", train), ("test", test))
    }


# Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009: five classes each.
SUPERCLASSES = {
    "aquatic_mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food_containers": "bottle bowl can cup plate",
    "fruit_and_vegetables": "apple mushroom orange pear sweet_pepper",
    "household_electrical_devices": "clock keyboard lamp telephone television",
    "household_furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large_carnivores": "bear leopard lion tiger wolf",
    "large_man-made_outdoor_things": "bridge castle house road skyscraper",
    "large_natural_outdoor_scenes": "cloud forest mountain plain sea",
    "large_omnivores_and_herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium_mammals": "fox porcupine possum raccoon skunk",
    "non-insect_invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small_mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles_1": "bicycle bus motorcycle pickup_truck train",
    "vehicles_2": "lawn_mower rocket streetcar tank tractor",
}
COARSE = {fine: coarse for coarse, members in SUPERCLASSES.items() for fine in members.split()}
CIFAR_GUIDE = (
    "CIFAR-FS is linked from https://github.com/bertinetto/r2d2: put cifar-fs.zip or the unpacked folder there."
)


def load_cifar_fs(root: Path, image_size: int = 32) -> dict[str, ImageSet]:
    """CIFAR-FS: 64, 16 and 20 classes, each with 600 images; coarse classes are the superclasses of CIFAR-100.

    Read from `cifar-fs/{train,val,test}/<class>/`, or as its authors published it, from `cifar100/data/<class>/` with
    the splits in `cifar100/splits/bertinetto/{train,val,test}.txt`.
    """
    places = ["cifar-fs", "cifar_fs", "CIFAR-FS"]
    tree = find(root, places, holding="train/")
    original = find(root, ["cifar100"], holding="splits/bertinetto/train.txt") if tree is None else None
    if original is None:
        tree = require(root, places, CIFAR_GUIDE, holding="train/")
        splits = class_folders(tree)
        missing = sorted(COARSE.keys() - {name for classes in splits.values() for name in classes})
        if missing:
            raise UserError(f"{tree.where('')}: {missing[0]} is in no split ({len(missing)} of 100 classes missing)")
    else:
        tree, splits = original, _cifar_classes(original)
    for split, classes in splits.items():
        unknown = sorted(classes.keys() - COARSE.keys())
        if unknown:
            raise UserError(f"{tree.where('')}: {split}: {unknown[0]} is not a class of CIFAR-100")
    return image_sets("cifar-fs", splits, image_size, COARSE)


def _cifar_classes(tree: Tree) -> dict[str, Files]:
    """The classes that a list of names chooses for each split."""
    folders = classes_in(tree, "data/")
    splits: dict[str, Files] = {}
    classes = Once("class")
    for split in SPLITS:
        file = f"splits/bertinetto/{split}.txt"
        names = []
        for line in lines(tree, file):
            if line.text not in folders:
                raise line.error(f"there is no folder data/{line.text}")
            if classes.add(line, line.text, f"in {split}"):
                names.append(line.text)
        if not names:
            raise UserError(f"{tree.where(file)}: no classes in this list")
        splits[split] = {name: folders[name] for name in sorted(names)}
    left_out(tree.where("splits/bertinetto"), "listed twice", classes.repeated)
    return splits


CUB_PLACE = "CUB_200_2011"
CUB_GUIDE = (
    "CUB_200_2011.tgz comes from https://www.vision.caltech.edu/datasets/cub_200_2011: unpack it there, so that "
    "CUB_200_2011/images.txt and CUB_200_2011/images/ exist."
)


def load_cub(root: Path, image_size: int = 84) -> dict[str, ImageSet]:
    """CUB-200-2011 by the few-shot split of Chen et al. 2019: sorted classes 0, 2 (mod 4) train, 1 val, 3 test."""
    return _load_cub(root, image_size, lambda i, count: ("train", "val", "train", "test")[i % 4])


def load_cub_retrieval(root: Path, image_size: int = 84) -> dict[str, ImageSet]:
    """CUB-200-2011 by the split of metric learning: the first 100 classes train, the last 100 test."""
    return _load_cub(root, image_size, lambda i, count: "train" if i < count // 2 else "test")


def _load_cub(root: Path, image_size: int, split_of: Callable[[int, int], str]) -> dict[str, ImageSet]:
    """The splits to which `split_of(class, number of classes)` sends each class."""
    lists = require(root, [CUB_PLACE], CUB_GUIDE, holding="images.txt")
    photos = require(root, [CUB_PLACE], CUB_GUIDE, holding="images/")
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
    return image_sets("mini-imagenet", _mini_imagenet_classes(lists, images), image_size)


def _mini_imagenet_classes(lists: Tree, images: Tree) -> dict[str, Files]:
    """The images of each class of each split, by lists with the columns filename and label."""
    files = lists.children()
    find_image = Finder(images, "images/")
    labels, splits = Once("image"), Once("class")
    sets: dict[str, Files] = {}
    for split, names in SPLITS.items():
        file = next((f"{name}.csv" for name in names if f"{name}.csv" in files), f"{split}.csv")
        classes: Files = {}
        for line, name, label in _rows(lists, file):
            image = find_image(line, name)
            if label not in classes:
                splits.add(line, label, f"in {split}")
            if labels.add(line, image, f"of the class {label}"):
                classes.setdefault(label, []).append((images, image))
        if not classes:
            raise UserError(f"{lists.where(file)}: no images in this list")
        sets[split] = dict(sorted(classes.items()))
    left_out(lists.where(""), "listed twice", labels.repeated)
    find_image.left_out(labels.values)
    return sets


def _rows(lists: Tree, file: str) -> Iterator[tuple[Line, str, str]]:
    """File name and label of each line of a table, whose head names its columns."""
    wanted = ("filename", "label")
    columns: list[str] | None = None
    for line in lines(lists, file):
        if columns is None:
            delimiter = next((d for d in ",;\t" if d in line.text), ",")
            columns = [column.lower() for column in line.fields(delimiter)]
            if not set(wanted) <= set(columns):
                break
            for column in wanted:
                if columns.count(column) > 1:
                    raise line.error(f"expected one column {column}, got {columns.count(column)}")
            continue
        fields = line.fields(delimiter)
        if any(fields[len(columns) :]):
            raise line.error(
                f"expected {len(columns)} fields, got {len(fields)}; a name with {delimiter!r} needs quotes"
            )
        row = dict(zip(columns, fields))
        if not row.get("filename") or not row.get("label"):
            raise line.error("expected a file name and a label")
        yield line, row["filename"], unicodedata.normalize("NFC", row["label"])
    if columns is None or not set(wanted) <= set(columns):
        raise UserError(f"{lists.where(file)}: expected the columns filename and label, got {columns}")
