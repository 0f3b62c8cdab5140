"""Labelled images in memory, and the registry of loaders that provide them by name.

A loader takes the data root and returns one `ImageSet` for each split ("train", "test", and "val" where there is one).
Splits may share their classes (digits) or have classes of their own (the usual few-shot sets); `make_task` sorts out
which is which.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from .errors import UserError

DATA_ROOT_VARIABLE = "FUSED_MARGINS_DATA"


@dataclass(frozen=True)
class ImageSet:
    """Images with a fine and a coarse label each."""

    images: Tensor  # (N, channels, height, width), uint8
    labels: Tensor  # (N,), int64: index into class_names
    coarse_labels: Tensor  # (N,), int64: index into coarse_names
    class_names: tuple[str, ...]
    coarse_names: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise ValueError(
                "images: expected uint8 (N, channels, height, width), "
                f"got {self.images.dtype} {tuple(self.images.shape)}"
            )
        for argument, names in (("labels", self.class_names), ("coarse_labels", self.coarse_names)):
            labels = getattr(self, argument)
            if labels.dtype != torch.int64 or labels.shape != self.images.shape[:1]:
                raise ValueError(f"{argument}: expected int64 ({len(self)},), got {labels.dtype} {tuple(labels.shape)}")
            if len(self) and (int(labels.min()) < 0 or int(labels.max()) >= len(names)):
                raise ValueError(
                    f"{argument}: expected values in [0, {len(names)}), got {int(labels.min())} to {int(labels.max())}"
                )

    def __len__(self) -> int:
        return self.images.shape[0]

    def pixels(self, indices: Tensor | slice = slice(None)) -> Tensor:
        """The chosen images as float32 in [0, 1]."""
        return self.images[indices].float().div_(255)

    def targets(self, kind: str) -> Tensor:
        """The labels to train on: "fine" or "coarse"."""
        return self.coarse_labels if kind == "coarse" else self.labels

    def with_classes(self, classes: Sequence[int]) -> "ImageSet":
        """Only the images of these fine classes, relabelled 0, 1, ... in the order given."""
        unknown = [c for c in classes if not 0 <= c < len(self.class_names)]
        if unknown or len(set(classes)) != len(classes) or not classes:
            raise UserError(f"classes: expected different values in [0, {len(self.class_names)}), got {list(classes)}")
        new_label = torch.full((len(self.class_names),), -1)
        new_label[list(classes)] = torch.arange(len(classes))
        chosen = (new_label[self.labels] >= 0).nonzero()[:, 0]
        return replace(
            self,
            images=self.images[chosen],
            labels=new_label[self.labels[chosen]],
            coarse_labels=self.coarse_labels[chosen],
            class_names=tuple(self.class_names[c] for c in classes),
        )


def concatenate(sets: Sequence[ImageSet]) -> ImageSet:
    """One set of all the images; the sets share their classes."""
    return replace(
        sets[0],
        images=torch.cat([s.images for s in sets]),
        labels=torch.cat([s.labels for s in sets]),
        coarse_labels=torch.cat([s.coarse_labels for s in sets]),
    )


Loader = Callable[[Path | None], dict[str, ImageSet]]
LOADERS: dict[str, Loader] = {}


def register(name: str) -> Callable[[Loader], Loader]:
    """Make a loader available under `name`."""

    def add(loader: Loader) -> Loader:
        LOADERS[name] = loader
        return loader

    return add


def load(name: str) -> dict[str, ImageSet]:
    """The splits of the data set `name`, read below the folder that FUSED_MARGINS_DATA names (digits need none).

    >>> {split: len(images) for split, images in load("digits").items()}
    {'train': 1198, 'test': 599}
    """
    if name not in LOADERS:
        raise UserError(f"dataset: expected one of {', '.join(sorted(LOADERS))}, got {name!r}")
    root = os.environ.get(DATA_ROOT_VARIABLE)
    return LOADERS[name](Path(root) if root else None)


@register("digits")
def _load_digits(root: Path | None) -> dict[str, ImageSet]:
    """1797 handwritten digits of 8 x 8 pixels from scikit-learn; coarse labels: even, odd; a third is held out."""
    digits = load_digits()
    images = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(digits.target.astype(np.int64))
    everything = ImageSet(images, labels, labels % 2, tuple(str(name) for name in digits.target_names), ("even", "odd"))
    train, test = train_test_split(np.arange(len(labels)), test_size=1 / 3, stratify=labels, random_state=0)

    def part(indices: np.ndarray) -> ImageSet:
        i = torch.from_numpy(np.sort(indices))
        return replace(everything, images=images[i], labels=labels[i], coarse_labels=labels[i] % 2)

    return {"train": part(train), "test": part(test)}


@dataclass(frozen=True)
class Task:
    """What a run trains on and what it is judged on."""

    training: ImageSet
    held_out: ImageSet | None  # other images of the training classes
    novel: ImageSet | None  # images of classes that the training never saw


def make_task(splits: dict[str, ImageSet], classes: Sequence[int] | None = None) -> Task:
    """Split by image, and by class where `classes` chooses some or the splits have classes of their own."""
    train, test = splits["train"], splits["test"]
    if train.class_names != test.class_names:
        if classes is not None:
            train = train.with_classes(classes)
        return Task(train, None, test)
    if classes is None:
        return Task(train, test, None)
    others = [c for c in range(len(train.class_names)) if c not in classes]
    novel = concatenate([train, test]).with_classes(others) if others else None
    return Task(train.with_classes(classes), test.with_classes(classes), novel)
