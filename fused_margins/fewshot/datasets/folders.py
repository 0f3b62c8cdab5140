"""Colour images in folders by split and class, or by class: a user's own."""

import hashlib
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ..terminal import UserError, printable
from .decoding import PHOTO, decoded
from .images import ImageSet, from_classes
from .sources import Archive, Folder, Tree, left_out, say_once

SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pbm", ".pgm", ".ppm")
# Of the classes of a folder that has no splits, as mini-ImageNet has them: 64, 16 and 20 of a hundred.
VALIDATION_SHARE, TEST_SHARE = 0.16, 0.2
SPLIT_SEED = 0
NESTED = 3  # folders that may lie around those of splits or classes

Files = dict[str, list[tuple[Tree, str]]]  # of each class


def load(root: Path, image_size: int = 84) -> dict[str, ImageSet]:
    """Any folder or zip archive with `{train,val,test}/<class>/<image>` (val may be missing), or `<class>/<image>`.

    Without folders of splits the classes are split by `split_by_name`, which it says.
    """
    tree = tree_at(root)
    base = _base(tree)
    splits = class_folders(tree, base) if _split_folders(tree, base) else _without_splits(tree, base)
    name = (
        f"folder-{root.stem[:80]}-{hashlib.sha256(str(root.resolve()).encode(errors='surrogatepass')).hexdigest()[:8]}"
    )
    return image_sets(name, splits, image_size)


def tree_at(root: Path) -> Tree:
    """The files of a folder or of a zip archive."""
    if not root.exists():
        raise UserError(f"{root}: no such folder or zip archive")
    return Folder(root) if root.is_dir() else Archive(root, "")


def files_by_split(root: Path) -> dict[str, Files]:
    """The images of each class of each split of a folder or a zip archive; those without splits are one, called ""."""
    tree = tree_at(root)
    base = _base(tree)
    return class_folders(tree, base) if _split_folders(tree, base) else {"": classes_in(tree, base)}


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


def class_folders(tree: Tree, base: str = "") -> dict[str, Files]:
    """The images of each class of each split that is there."""
    folders = _split_folders(tree, base)
    for split in ("train", "test"):
        if split not in folders:
            raise UserError(f"{tree.where(base + split)}: no folders with images of a class each here")
    others = [child for child in tree.children(base) if base + child not in folders.values()]
    left_out(tree.where(base), "neither train, val nor test", others)
    return {split: classes_in(tree, folders[split]) for split in SPLITS if split in folders}


def _split_folders(tree: Tree, base: str) -> dict[str, str]:
    """Where each split is that has folders of classes."""
    folders: dict[str, str] = {}
    for child in _folders(tree, base):
        for split, names in SPLITS.items():
            if child[:-1].lower() in names and any(_folders(tree, base + child)):
                if split in folders:
                    raise UserError(
                        f"{tree.where(base + child)}: {tree.where(folders[split])} is the {split} split, too"
                    )
                folders[split] = base + child
    return folders


def _folders(tree: Tree, base: str) -> Iterator[str]:
    return (child for child in tree.children(base) if child.endswith("/"))


def _base(tree: Tree) -> str:
    """The folder of the splits or the classes: all, or the only one that can be meant, of whatever name."""
    base = ""
    for _ in range(NESTED):
        if _split_folders(tree, base):
            break
        folders = [base + child for child in _folders(tree, base)]
        inner = [folder for folder in folders if _split_folders(tree, folder)] or folders
        if len(inner) != 1:
            break
        base = inner[0]
    return base


def classes_in(tree: Tree, folder: str) -> Files:
    """The images below each folder in `folder`, or in what lies around all classes there, in the order of the names."""
    names = tree.names(folder)
    base = _around_classes(names, folder)
    if base != folder:
        say_once(f"{tree.where(folder)}: the classes are the folders in {base[len(folder) :]}")
    classes: Files = {}
    others = []
    for name in names:
        class_name, slash, file = name[len(base) :].partition("/") if name.startswith(base) else ("", "", "")
        class_name = unicodedata.normalize("NFC", class_name)  # the form of a name depends on the system
        if slash:
            members = classes.setdefault(class_name, [])
        if slash and file.lower().endswith(SUFFIXES):
            members.append((tree, name))
        elif not name.endswith("/"):
            others.append(name)
    left_out(tree.where(folder), "no images by their names, or in no class", others)
    for class_name, members in classes.items():
        if not members:
            raise UserError(f"{tree.where(base + class_name)}: no images in this class ({', '.join(SUFFIXES)})")
    return dict(sorted(classes.items(), key=lambda item: f"{item[0]}/"))  # as paths, whatever the form of a name


def _around_classes(names: Sequence[str], folder: str) -> str:
    """The folder of the classes: a folder that is alone, and holds folders and no image, is none itself."""
    for _ in range(NESTED):
        paths = [name[len(folder) :].split("/", 2) for name in names if name.startswith(folder)]
        alone = {path[0] for path in paths if len(path) > 1}
        deeper = any(len(path) > 2 for path in paths)
        if len(alone) != 1 or not deeper or any(path[1].lower().endswith(SUFFIXES) for path in paths if len(path) == 2):
            break
        folder += f"{alone.pop()}/"
    return folder


def _without_splits(tree: Tree, base: str) -> dict[str, Files]:
    """The classes of a folder of class folders, split by their names."""
    classes = classes_in(tree, base)
    where = tree.where(base)
    if len(classes) < 4:
        found = f"{len(classes)} ({', '.join(classes)})" if classes else "none"
        packed = [name for name in tree.children(base) if name.lower().endswith((".zip", ".tar", ".gz", ".tgz", ".7z"))]
        raise UserError(
            f"{where}: expected the folders train and test with a folder for each class, or at least 4 folders of "
            f"classes, got {found}" + (f"; there is an archive within, {packed[0]}: unpack it" if packed else "")
        )
    chosen = split_by_name(list(classes))
    say_once(f"{where}: no folders train and test, so the {len(classes)} classes are split by name, seed {SPLIT_SEED}:")
    for split, names in chosen.items():
        say_once(f"  {split}, {len(names)} of {where}: {', '.join(map(printable, names))}")
    return {split: {name: classes[name] for name in names} for split, names in chosen.items()}


def split_by_name(names: Sequence[str], seed: int = SPLIT_SEED) -> dict[str, list[str]]:
    """The classes to train on, to choose by and to test on (novel), drawn by a hash of their names and a seed.

    A fifth is for testing, two at least, and 16% for validation, which has two at least or does not take place. The
    order of the names does not count, and where a class is added few others change their place.

    >>> split_by_name(["ant", "bee", "cat", "dog", "eel"])
    {'train': ['bee', 'cat', 'dog'], 'test': ['ant', 'eel']}
    """

    def drawn(name: str) -> bytes:
        return hashlib.sha256(f"{seed} {name}".encode(errors="surrogatepass")).digest()

    order = sorted(names, key=drawn)
    num_test, num_validation = max(2, round(TEST_SHARE * len(order))), round(VALIDATION_SHARE * len(order))
    num_validation = num_validation if num_validation > 1 else 0
    ends = {"train": len(order), "val": num_test + num_validation, "test": num_test}
    starts = {"train": ends["val"], "val": num_test, "test": 0}
    return {split: sorted(order[starts[split] : end]) for split, end in ends.items() if end > starts[split]}
