"""Features of images, made once by a pretrained network: a file of numbers in place of a folder of images.

A feature vector is an image of 1 x 1 pixels with as many channels as it has numbers, so that everything that trains or
judges on images does so on features.

German traffic signs as features: a class has tracks, each one sign seen from a passing car, and it has a parent
(Stallkamp et al., Man vs. computer: benchmarking machine learning algorithms for traffic sign recognition, 2012; the
classes by their official numbers).
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..runs import replacing
from ..terminal import UserError, printable
from .folders import split_by_name
from .images import ImageSet

SPLITS = ("train", "val", "test")
HELD_OUT = 1 / 3  # of the images of each class, where a file is to be split by image
ARRAYS = ("features", "labels", "split", "group", "coarse")
# Priority road, yield and stop (12, 13, 14) are alone in what they are.
PARENTS = {
    "speed limit": (*range(6), 7, 8),
    "other prohibition": (9, 10, 15, 16, 17),
    "danger": (11, *range(18, 32)),
    "mandatory": tuple(range(33, 41)),
    "end of restriction": (6, 32, 41, 42),
}


@dataclass(frozen=True)
class Features:
    """What a file of features holds."""

    features: Tensor  # (N, D), floating point
    labels: Tensor  # (N,), int64: index into class_names
    class_names: tuple[str, ...]
    split: Tensor | None = None  # (N,), int64: index into SPLITS
    group: Tensor | None = None  # (N,), int64: images of one group are of one thing, as the frames of a film are
    coarse: Tensor | None = None  # (N,), int64: index into coarse_names
    coarse_names: tuple[str, ...] = ()

    def images(self) -> ImageSet:
        """All of it as images of 1 x 1 pixels."""
        coarse, names = (self.labels, self.class_names) if self.coarse is None else (self.coarse, self.coarse_names)
        return ImageSet(
            self.features[:, :, None, None], self.labels, coarse, self.class_names, names, groups=self.group
        )


def load(path: Path) -> dict[str, ImageSet]:
    """Features in a file, `.safetensors`, `.npz` or `.npy` (and `.labels.npy`): split as it says, or by class."""
    features = read_features(path)
    try:
        return splits_of(features)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def splits_of(features: Features) -> dict[str, ImageSet]:
    """The sets of all splits; without any, the classes are split by their names as those of a folder are."""
    images = features.images()
    names = features.class_names
    if features.split is None:
        if len(names) < 4:
            raise UserError(
                f"features: expected at least 4 classes to split into base and novel ones, got {len(names)}"
            )
        number = {name: label for label, name in enumerate(names)}
        return {
            split: images.with_classes([number[name] for name in chosen])
            for split, chosen in split_by_name(names).items()
        }
    sets = _parts(images, features.split)
    of_training = sets["train"].labels.unique()
    if not torch.isin(sets["test"].labels, of_training).any():  # split by class: each has its own
        sets = {split: chosen.with_classes(chosen.labels.unique().tolist()) for split, chosen in sets.items()}
    return sets


def _parts(images: ImageSet, split: Tensor) -> dict[str, ImageSet]:
    """What there is of each split; all keep the names of all classes."""
    sets = {name: images.subset((split == number).nonzero()[:, 0]) for number, name in enumerate(SPLITS)}
    for name in ("train", "test"):
        if not len(sets[name]):
            raise UserError(f"split: there is nothing in {name}")
    return {name: part for name, part in sets.items() if len(part)}


def load_tracks(path: Path) -> dict[str, ImageSet]:
    """Features of German traffic signs: the class is the coarse label, the track the fine one, of tracks held out."""
    features = _read_signs(path)
    if features.group is None:
        raise UserError(f"{path}: expected a group for each track, there are no groups")
    tracks, number = features.group.unique(return_inverse=True)
    names = tuple(f"track {int(track)}" for track in tracks)
    # Every split names all tracks and has images of its own alone.
    of_tracks = replace(
        features,
        labels=number,
        class_names=names,
        coarse=features.labels,
        coarse_names=features.class_names,
        group=None,
    )
    assert features.split is not None
    return {name: part for name, part in _parts(of_tracks.images(), features.split).items() if name != "val"}


def load_parents(path: Path) -> dict[str, ImageSet]:
    """Features of German traffic signs in 40 of 43 classes, whose five kinds are the coarse labels."""
    features = _read_signs(path)
    parent = torch.full((len(features.class_names),), -1)
    for number, classes in enumerate(PARENTS.values()):
        parent[list(classes)] = number
    chosen = (parent >= 0).nonzero()[:, 0].tolist()
    of_parents = replace(features, coarse=parent[features.labels].clamp(min=0), coarse_names=tuple(PARENTS))
    return {split: images.with_classes(chosen) for split, images in splits_of(of_parents).items()}


def _read_signs(path: Path) -> Features:
    features = read_features(path)
    if [int(name) if name.isdecimal() else name for name in features.class_names] != list(range(43)):
        raise UserError(f"{path}: expected the 43 classes of GTSRB, 00000 to 00042, got {len(features.class_names)}")
    if features.split is None:
        raise UserError(f"{path}: expected a split by track (embed --group '^[0-9]+' --split image)")
    return features


def split_images(labels: Tensor, group: Tensor | None) -> Tensor:
    """(N,) train or test: a third of the groups of each class, one at least, is for testing, drawn by a hash.

    >>> split_images(torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([4, 4, 5, 6, 7, 8])).tolist()
    [2, 2, 0, 0, 0, 2]
    """
    group = torch.arange(len(labels)) if group is None else group
    split = torch.zeros_like(labels)
    for label in labels.unique():
        groups = sorted(
            group[labels == label].unique().tolist(), key=lambda g: hashlib.sha256(str(g).encode()).digest()
        )
        if len(groups) > 1:
            chosen = groups[: max(1, round(HELD_OUT * len(groups)))]
            split[(labels == label) & torch.isin(group, torch.tensor(chosen))] = SPLITS.index("test")
    return split


def write_features(path: Path, features: Features, notes: Mapping[str, str]) -> None:
    """A safetensors file, whole or not at all; names of classes and `notes` stand in its metadata."""
    tensors = {name: getattr(features, name) for name in ARRAYS if getattr(features, name) is not None}
    names = {"class_names": json.dumps(features.class_names), "coarse_names": json.dumps(features.coarse_names)}
    with replacing(path) as temporary:
        save_file({name: t.contiguous() for name, t in tensors.items()}, temporary, {**notes, **names})


def read_notes(path: Path) -> dict[str, str]:
    """What `write_features` was given as `notes`, and the names of classes; nothing of a file that is none of it."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def read_features(path: Path) -> Features:
    """The features in a file, memory-mapped but for `.npz`; an error names the file and what is wrong with it."""
    readers: dict[str, Callable[[Path], tuple[dict[str, Any], dict[str, str]]]] = {
        ".safetensors": _read_safetensors,
        ".npy": _read_npy,
        ".npz": _read_npz,
    }
    if path.suffix not in readers:
        raise UserError(f"{path}: expected a file of features, {', '.join(readers)}")
    try:
        arrays, notes = readers[path.suffix](path)
        return _checked(arrays, notes)
    except OSError as error:
        raise UserError(f"{error.filename or path}: {error.strerror or error}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (
        SafetensorError,
        BadZipFile,
        zlib.error,
        LookupError,
        NotImplementedError,
        ValueError,
        TypeError,
        EOFError,
        RecursionError,  # JSON within JSON
    ) as error:
        raise UserError(f"{path}: not a readable file of features ({error})") from None


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    path.stat()  # an error of the system says more than the library's
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys() if name in ARRAYS}, file.metadata() or {}  # noqa: SIM118


def _read_npy(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    found = {"features": np.load(path, mmap_mode="c", allow_pickle=False)}
    for name in ARRAYS[1:]:
        beside = path.with_name(f"{path.stem}.{name}.npy")
        if name == "labels" or beside.exists():
            found[name] = np.load(beside, allow_pickle=False)
    return found, {}


def _read_npz(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:  # which numpy leaves open if it fails
        return {name: file[name] for name in ARRAYS if name in file}, {}


def _checked(arrays: Mapping[str, Any], notes: Mapping[str, str]) -> Features:
    for name in ("features", "labels"):
        if name not in arrays:
            raise UserError(f"expected {name}, found {', '.join(arrays) or 'nothing of the kind'}")
    features = torch.as_tensor(arrays["features"])
    if features.ndim != 2 or not features.is_floating_point() or 0 in features.shape:
        raise UserError(f"features: expected floating point (N, D), got {features.dtype} {tuple(features.shape)}")
    alike = True
    for start in range(0, len(features), 4096):
        rows = features[start : start + 4096]
        bad = (~rows.isfinite().all(1)).nonzero()[:, 0]
        if len(bad):
            raise UserError(f"features: expected finite numbers, row {start + int(bad[0])} has others")
        bad = (~rows.float().square().sum(1).isfinite()).nonzero()[:, 0]
        if len(bad):
            raise UserError(f"features: expected a length that float32 can square, row {start + int(bad[0])} is longer")
        alike = alike and bool((rows == features[0]).all())
    if alike:
        raise UserError("features: expected rows that differ, all of them are equal")
    count = len(features)
    labels, names = _classes("labels", arrays["labels"], count, notes.get("class_names"))
    sizes = labels.bincount(minlength=len(names))
    if int((sizes > 0).sum()) < 2:
        raise UserError("labels: expected two or more classes, got one")
    if int(sizes.max()) < 2:
        raise UserError("labels: expected a class with more than one sample, each of them has one")
    coarse: Tensor | None = None
    coarse_names: tuple[str, ...] = ()
    if "coarse" in arrays:
        coarse, coarse_names = _classes("coarse", arrays["coarse"], count, notes.get("coarse_names"))
        parents = torch.stack([labels, coarse]).unique(dim=1)
        if parents.shape[1] > len(labels.unique()):
            mixed = int(parents[0].bincount().argmax())
            raise UserError(f"coarse: expected one coarse class for each class, {names[mixed]} has several")
    group = None if "group" not in arrays else _classes("group", arrays["group"], count, None)[0]
    split = None
    if "split" in arrays:
        split, found = _classes("split", arrays["split"], count, None)
        known = {**{name: i for i, name in enumerate(SPLITS)}, **{str(i): i for i in range(len(SPLITS))}}
        unknown = [name for name in found if name not in known]
        if unknown:
            raise UserError(f"split: expected {', '.join(SPLITS)} or 0, 1, 2, got {unknown[0]}")
        split = torch.tensor([known[name] for name in found])[split]
    return Features(features, labels, names, split, group, coarse, coarse_names)


def _classes(name: str, values: Any, count: int, names: str | None) -> tuple[Tensor, tuple[str, ...]]:
    """Numbers from 0 on, and what they are called: their names in the file, or the values."""
    array = np.asarray(values)
    kinds = "iuU" if name == "split" else "iu"
    if array.shape != (count,) or array.dtype.kind not in kinds:
        raise UserError(f"{name}: expected integers ({count},), got {array.dtype} {array.shape}")
    if names is not None:
        titles = json.loads(names)
        if not isinstance(titles, list) or not (0 <= int(array.min()) <= int(array.max()) < len(titles)):
            raise UserError(f"{name}: expected numbers of the file's class names, got {array.min()} to {array.max()}")
        if len(set(titles)) < len(titles):
            raise UserError(f"{name}: expected class names that differ, the file has one twice")
        return torch.from_numpy(array.astype(np.int64)), tuple(printable(str(title)) for title in titles)
    found, number = np.unique(array, return_inverse=True)
    return torch.from_numpy(number.astype(np.int64)), tuple(str(value) for value in found)
