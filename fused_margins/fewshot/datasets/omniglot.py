"""Omniglot: 1623 characters of 50 alphabets, each drawn by 20 people (Lake, Salakhutdinov and Tenenbaum, Human-level
concept learning through probabilistic program induction, 2015); three ways to split it, and the official one-shot runs.

Images are one channel, ink white on black; coarse classes are alphabets. A character turned by a quarter, a half or
three quarters counts as a class of its own where the names of classes end in rot090, rot180 or rot270.
"""

import itertools
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..terminal import UserError
from .decoding import INK, decoded
from .download import Download
from .images import ImageSet, from_classes
from .published import Finder, Once, lines
from .sources import Tree, data_root, find, left_out, require

SIZE = 28
TURNS = {"rot000": 0, "rot090": 1, "rot180": 2, "rot270": 3}
TRAINING_DRAWERS = 14  # of 20, for omniglot-alphabets
BACKGROUND, EVALUATION, LISTS, RUNS = "images_background", "images_evaluation", "omniglot/vinyals", "all_runs"
NUM_RUNS, RUN_IMAGES = 20, 20

_OFFICIAL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
_RUNS_URL = f"{_OFFICIAL}/one-shot-classification"
_PROTONETS = "https://raw.githubusercontent.com/jakesnell/prototypical-networks/master/data/omniglot/splits/vinyals"
# The checksums of images_*.zip are those of tensorflow/datasets (url_checksums/omniglot.txt); that of all_runs.zip is
# of a copy with the MD5 e8996daecdf12afeeb4a53a179f06b19 that public loaders state. The lists are those that
# Prototypical Networks (Snell et al. 2017) published.
_FILES = {  # place: folder of its URL, bytes, SHA-256
    "images_background.zip": (_OFFICIAL, 9464212, "ad41ab679c8b5d90b271ef46be6987cc81211774a695c29dcc5367b2b26ee640"),
    "images_evaluation.zip": (_OFFICIAL, 6462886, "1f61a8f3366785b057fc117d9228e78a16e3d976c8953b2a10fcc74cf0609cee"),
    "all_runs.zip": (_RUNS_URL, 352787, "437c1eeab0af8484112e1b4cc0f3d541ec727f7c47b9b202da738af9dfd6c325"),
    f"{LISTS}/train.txt": (_PROTONETS, 133244, "984522c194c30fb678ce53304a160a42faf5403ad4f9a67010f32dd3a35738e0"),
    f"{LISTS}/val.txt": (_PROTONETS, 21312, "11f99e54faee3e26f53d3231c1cceac5bf7b8730e9be31cb6dab256551dc0c1a"),
    f"{LISTS}/test.txt": (_PROTONETS, 50372, "845264cc5c156180828ccf17915668b17ee21424d0170df6e7d81676aa5d1204"),
}
DOWNLOADS = tuple(
    Download(f"{folder}/{place.rpartition('/')[2]}", place, size, sha256)
    for place, (folder, size, sha256) in _FILES.items()
)
_GUIDE = "`fused-margins data omniglot` downloads what is missing; by hand it comes from "

Characters = dict[str, dict[int, int]]  # Alphabet/characterNN: the row of each drawer's image, drawers in order


def load(root: Path, image_size: int = SIZE) -> dict[str, ImageSet]:
    """Omniglot by the split of Vinyals et al. 2016: 4112, 688 and 1692 classes of characters and rotations."""
    lists = require(root, _places(LISTS), f"{_GUIDE}{_PROTONETS}", holding="train.txt")
    images, background, evaluation = _drawings(root, image_size)
    classes = Once("class")
    splits = {
        split: _listed(lists, split, classes, images, background | evaluation) for split in ("train", "val", "test")
    }
    left_out(lists.where(""), "listed twice", classes.repeated)
    return splits


def load_background(root: Path, image_size: int = SIZE) -> dict[str, ImageSet]:
    """Omniglot by alphabet: the 30 background ones with rotations train, the 20 evaluation ones without test."""
    images, background, evaluation = _drawings(root, image_size)
    turned = {f"{character}/{turn}": character for character in background for turn in TURNS}
    test = {character: character for character in evaluation}
    return {"train": _image_set(images, background, turned), "test": _image_set(images, evaluation, test)}


def load_alphabets(root: Path, image_size: int = SIZE) -> dict[str, ImageSet]:
    """Omniglot's background alphabets by drawers: 1 to 14 train, 15 to 20 test, all characters in both, not rotated."""
    images, background, _ = _drawings(root, image_size)
    splits: dict[str, Characters] = {"train": {}, "test": {}}
    for character, rows in background.items():
        for split in splits:
            chosen = {d: row for d, row in rows.items() if (d <= TRAINING_DRAWERS) == (split == "train")}
            if not chosen:
                raise UserError(f"{root}: {BACKGROUND}: {character} has no image for the {split} split")
            splits[split][character] = chosen
    return {split: _image_set(images, part, {c: c for c in part}) for split, part in splits.items()}


def missing(root: Path) -> list[Download]:
    """What of Omniglot is not in the data root, neither as it comes nor unpacked nor packed anew."""

    def found(download: Download) -> Tree | None:
        folder, _, file = download.place.rpartition("/")
        # A list lies in its folder; an archive at the root stands for a folder of its name.
        return find(root, _places(folder), file) if folder else find(root, _places(file.removesuffix(".zip")))

    return [download for download in DOWNLOADS if found(download) is None]


def _places(part: str) -> list[str]:
    """Where a part may lie: by itself, or within the folder or the archive of the official repository."""
    name = part.removeprefix("omniglot/")
    return [part, *(f"{folder}/{name}" for folder in ("omniglot", "omniglot-py") if f"{folder}/{name}" != part)]


def _drawings(root: Path, image_size: int) -> tuple[Tensor, Characters, Characters]:
    """All images, and where each character of the background and of the evaluation set has its own."""
    files: list[tuple[Tree, str]] = []
    parts: list[Characters] = []
    for part in (BACKGROUND, EVALUATION):
        tree = require(root, _places(part), f"{_GUIDE}{_OFFICIAL}/{part}.zip")
        characters: Characters = {}
        others = []
        for file in tree.names():
            match = re.fullmatch(r"(?:.+/)?([^/]+/character\d+)/\d+_(\d+)\.png", file, re.IGNORECASE)
            if match:
                drawers = characters.setdefault(match[1], {})
                former = drawers.setdefault(int(match[2]), len(files))
                if former < len(files):
                    raise UserError(f"{tree.where(file)}: {files[former][1]} is of the same character and drawer")
                files.append((tree, file))
            elif not file.endswith("/"):
                others.append(file)
        left_out(tree.where(""), "no <alphabet>/characterNN/NNNN_NN.png", others)
        if not characters:
            raise UserError(f"{tree.where('')}: no images <alphabet>/characterNN/NNNN_NN.png here")
        _check_without_gaps(tree, characters)
        parts.append(characters)
    background, evaluation = parts
    both = sorted(background.keys() & evaluation.keys())
    if both:
        raise UserError(f"{root}: {both[0]} is in {BACKGROUND} and in {EVALUATION} ({len(both)} such characters)")
    return decoded("omniglot", files, INK, image_size), background, evaluation


def _check_without_gaps(tree: Tree, characters: Characters) -> None:
    """Refuse an alphabet that lacks one of the characters before its last."""
    numbers: dict[str, set[int]] = {}
    for name in characters:
        alphabet, _, number = name.rpartition("/character")
        numbers.setdefault(alphabet, set()).add(int(number))
    for alphabet, found in numbers.items():
        lacking = next(number for number in itertools.count(1) if number not in found)
        if lacking < max(found):
            raise UserError(f"{tree.where(alphabet)}: character{lacking:02d} has no images")


def _image_set(images: Tensor, characters: Characters, classes: dict[str, str]) -> ImageSet:
    """The set of these classes, which are turned as their names say; a class names its character."""
    return from_classes(
        images,
        {name: list(characters[character].values()) for name, character in classes.items()},
        coarse={name: name.split("/")[0] for name in classes},
        quarter_turns={name: TURNS.get(name.split("/")[-1], 0) for name in classes},
    )


def _listed(lists: Tree, split: str, once: Once, images: Tensor, characters: Characters) -> ImageSet:
    """The set of the classes that a list has, a line each: Alphabet/characterNN/rotRRR."""
    classes = {}
    for line in lines(lists, f"{split}.txt"):
        character, _, turn = line.text.rpartition("/")
        if turn not in TURNS:
            raise line.error(f"expected .../rot000, 090, 180 or 270, got {line.text!r}")
        if character not in characters:
            raise line.error(f"there are no images of {character}")
        if once.add(line, line.text, f"in {split}"):
            classes[line.text] = character
    if not classes:
        raise UserError(f"{lists.where(f'{split}.txt')}: no classes in this list")
    return _image_set(images, characters, classes)


@dataclass(frozen=True)
class OneShotRuns:
    """Runs of 20-way one-shot classification: for each test image, which training image shows the same character?"""

    training: Tensor  # (runs, 20, 1, size, size), float32 in [0, 1]: an image of each class
    test: Tensor  # (runs, 20, 1, size, size)
    answers: Tensor  # (runs, 20), int64: index of the training image


def one_shot_runs(image_size: int = SIZE) -> OneShotRuns:
    """The 20 official runs (Lake et al. 2015), each within an alphabet of the evaluation set, from `all_runs`."""
    tree = require(data_root(), _places(RUNS), f"{_GUIDE}{_RUNS_URL}/{RUNS}.zip", holding="run01/")
    find_image = Finder(tree, "")
    names, answers = [], []
    for run in (f"run{number:02d}" for number in range(1, NUM_RUNS + 1)):
        list_name = f"{run}/class_labels.txt"
        listed = list(lines(tree, list_name))
        pairs = [line.text.split() for line in listed]
        answer = {pair[0]: pair[1] for pair in pairs if len(pair) == 2}
        tests, classes = sorted(answer), sorted(set(answer.values()))
        if not len(pairs) == len(tests) == len(classes) == RUN_IMAGES:
            raise UserError(
                f"{tree.where(list_name)}: expected {RUN_IMAGES} lines with a test and a training image each"
            )
        found = {name: find_image(line, name) for line, pair in zip(listed, pairs) for name in pair}
        names += [found[name] for name in (*classes, *tests)]
        answers.append([classes.index(answer[test]) for test in tests])
    images = decoded("omniglot-runs", [(tree, name) for name in names], INK, image_size)
    images = images.float().div_(255).view(NUM_RUNS, 2, RUN_IMAGES, *images.shape[1:])
    return OneShotRuns(images[:, 0], images[:, 1], torch.tensor(answers))
