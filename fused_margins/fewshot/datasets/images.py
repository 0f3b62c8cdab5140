"""Labelled images or features that share one store, and the task of a run: what it trains on, what it is judged on."""

import itertools
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..terminal import UserError, printable


@dataclass(frozen=True)
class ImageSet:
    """Samples with a fine and a coarse label each: a choice of `images`, which subsets share and never copy.

    Features of a pretrained network are images of 1 x 1 pixels in floating point, a channel a number.

    Example:
        >>> images = torch.arange(8, dtype=torch.uint8).view(2, 1, 2, 2)
        >>> labels = torch.tensor([0, 1])
        >>> both = ImageSet(images, labels, labels, ("a", "b"), ("a", "b"))
        >>> turned = replace(both.subset(torch.tensor([1])), quarter_turns=torch.tensor([1]))
        >>> (turned.pixels() * 255).round()
        tensor([[[[5., 7.],
                  [4., 6.]]]])
    """

    images: Tensor  # (M, channels, height, width), uint8, or floating point for features
    labels: Tensor  # (N,), int64: index into class_names
    coarse_labels: Tensor  # (N,), int64: index into coarse_names
    class_names: tuple[str, ...]
    coarse_names: tuple[str, ...]
    index: Tensor | None = None  # (N,), int64: the row of `images` of each sample; None: sample i is image i
    quarter_turns: Tensor | None = None  # (N,), int64, 0 to 3 counter-clockwise; None: as they are
    groups: Tensor | None = (
        None  # (N,), int64: samples of one thing, of which none is asked for another; None: none are
    )

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or not (self.images.dtype == torch.uint8 or self.are_features):
            raise ValueError(
                "images: expected uint8 (N, channels, height, width), or floating point (N, D, 1, 1), "
                f"got {self.images.dtype} {tuple(self.images.shape)}"
            )
        count = self.images.shape[0] if self.index is None else self.index.shape[0]
        limits = {
            "labels": len(self.class_names),
            "coarse_labels": len(self.coarse_names),
            "index": self.images.shape[0],
            "quarter_turns": 4,
        }
        for argument, limit in limits.items():
            values = getattr(self, argument)
            if values is None:
                continue
            if values.dtype != torch.int64 or values.shape != (count,):
                raise ValueError(f"{argument}: expected int64 ({count},), got {values.dtype} {tuple(values.shape)}")
            if count and (int(values.min()) < 0 or int(values.max()) >= limit):
                raise ValueError(
                    f"{argument}: expected values in [0, {limit}), got {int(values.min())} to {int(values.max())}"
                )
        _, height, width = self.shape
        if self.quarter_turns is not None and height != width:
            raise ValueError(f"quarter_turns: expected square images, got {height} x {width}")

        if self.groups is not None and self.groups.shape != (count,):
            raise ValueError(f"groups: expected ({count},), got {tuple(self.groups.shape)}")

    def __len__(self) -> int:
        return self.labels.shape[0]

    @property
    def are_features(self) -> bool:
        """Whether the samples are features: there are no pixels to turn or to look at."""
        return self.images.is_floating_point() and self.images.shape[2:] == (1, 1)

    def checksum(self) -> int:
        """CRC-32 of all pixels, labels, names and choices: data that changed has another.

        >>> labels = torch.tensor([0, 0])
        >>> black = ImageSet(torch.zeros(2, 1, 2, 2, dtype=torch.uint8), labels, labels, ("a",), ("a",))
        >>> black.checksum() == replace(black, images=black.images + 1).checksum()
        False
        """
        value = zlib.crc32(repr((self.class_names, self.coarse_names, self.images.shape)).encode())
        for t in (self.images, self.labels, self.coarse_labels, self.index, self.quarter_turns, self.groups):
            if t is not None:
                value = zlib.crc32(t.cpu().contiguous().view(-1).view(torch.uint8).numpy(), value)
        return value

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def pixels(self, indices: Tensor | slice = slice(None)) -> Tensor:
        """The chosen samples as float32, (B, channels, height, width), where `images` are: images in [0, 1]."""
        if isinstance(indices, Tensor):
            indices = indices.to(self.images.device)
        images = self.images[indices if self.index is None else self.index[indices]]
        if self.quarter_turns is not None:
            # Bit 0 is a quarter, bit 1 a half: two choices for the whole batch, and a GPU need not wait for a count.
            turns = self.quarter_turns[indices, None, None, None]
            images = torch.where(turns % 2 == 1, images.rot90(1, (2, 3)), images)
            images = torch.where(turns >= 2, images.flip(2, 3), images)
        return images.float() if self.are_features else images.float().div_(255)

    def targets(self, kind: str) -> Tensor:
        """The labels to train on: "fine" or "coarse"."""
        return self.coarse_labels if kind == "coarse" else self.labels

    def to(self, device: torch.device | str) -> "ImageSet":
        """The same samples with their pixels on `device`; labels stay where they are."""
        index, turns = (None if t is None else t.to(device) for t in (self.index, self.quarter_turns))
        return replace(self, images=self.images.to(device), index=index, quarter_turns=turns)

    def subset(self, indices: Tensor | slice) -> "ImageSet":
        """The chosen samples, in the order given; the classes keep their numbers."""
        indices = torch.arange(len(self))[indices]
        rows = indices.to(self.images.device)
        return replace(
            self,
            labels=self.labels[indices],
            coarse_labels=self.coarse_labels[indices],
            index=rows if self.index is None else self.index[rows],
            quarter_turns=None if self.quarter_turns is None else self.quarter_turns[rows],
            groups=None if self.groups is None else self.groups[indices],
        )

    def with_classes(self, classes: Sequence[int]) -> "ImageSet":
        """Only the images of these fine classes, relabelled 0, 1, ... in the order given."""
        unknown = [c for c in classes if not 0 <= c < len(self.class_names)]
        if unknown or len(set(classes)) != len(classes) or not classes:
            raise UserError(f"classes: expected different values in [0, {len(self.class_names)}), got {list(classes)}")
        new_label = torch.full((len(self.class_names),), -1)
        new_label[list(classes)] = torch.arange(len(classes))
        chosen = self.subset((new_label[self.labels] >= 0).nonzero()[:, 0])
        return replace(chosen, labels=new_label[chosen.labels], class_names=tuple(self.class_names[c] for c in classes))


def from_classes(
    images: Tensor,
    members: Mapping[str, Sequence[int]],
    coarse: Mapping[str, str] | None = None,
    quarter_turns: Mapping[str, int] | None = None,
) -> ImageSet:
    """The samples class by class.

    Args:
        images: (M, channels, height, width), uint8.
        members: rows of `images` for each class name; the classes are numbered in this order. The set has the names as
            text can show them.
        coarse: name of the coarse class for each class name; the class itself where there is none.
        quarter_turns: for each class name.
    """
    class_names = tuple(members)
    coarse_of = [coarse[name] if coarse else name for name in class_names]
    coarse_names = tuple(dict.fromkeys(coarse_of))
    labels = torch.tensor([label for label, rows in enumerate(members.values()) for _ in rows], dtype=torch.int64)
    coarse_number = {name: number for number, name in enumerate(coarse_names)}
    turns = torch.tensor([quarter_turns[name] for name in class_names])[labels] if quarter_turns else None
    return ImageSet(
        images,
        labels,
        torch.tensor([coarse_number[name] for name in coarse_of])[labels],
        tuple(map(printable, class_names)),
        tuple(map(printable, coarse_names)),
        torch.tensor([row for rows in members.values() for row in rows], dtype=torch.int64),
        turns,
    )


def concatenate(sets: Sequence[ImageSet]) -> ImageSet:
    """One set of all the samples; the sets share their classes, and their images if they are parts of one set."""
    stores = {s.images.data_ptr(): s.images for s in sets}
    first_rows = dict(zip(stores, itertools.accumulate(map(len, stores.values()), initial=0)))
    index = [first_rows[s.images.data_ptr()] + (torch.arange(len(s)) if s.index is None else s.index) for s in sets]
    turns = [torch.zeros_like(s.labels) if s.quarter_turns is None else s.quarter_turns for s in sets]
    return replace(
        sets[0],
        images=sets[0].images if len(stores) == 1 else torch.cat(list(stores.values())),
        labels=torch.cat([s.labels for s in sets]),
        coarse_labels=torch.cat([s.coarse_labels for s in sets]),
        index=torch.cat(index),
        quarter_turns=torch.cat(turns) if any(s.quarter_turns is not None for s in sets) else None,
        groups=torch.cat([s.groups for s in sets if s.groups is not None]) if sets[0].groups is not None else None,
    )


@dataclass(frozen=True)
class Task:
    """What a run trains on and what it is judged on."""

    training: ImageSet
    held_out: ImageSet | None  # other images of the training classes
    novel: ImageSet | None  # images of classes that the training never saw
    validation: ImageSet | None = None  # the "val" split, for choosing: novel classes where those of the test are

    @property
    def for_validation(self) -> ImageSet | None:
        """What tells during a training how far it is: never the novel classes that it is judged on."""
        return self.held_out if self.validation is None else self.validation


def make_task(splits: dict[str, ImageSet], classes: Sequence[int] | None = None, held_out: float = 0.0) -> Task:
    """Split by image, and by class where `classes` chooses some or the splits have classes of their own.

    Args:
        splits: "train", "test", and "val" where there is one.
        classes: the fine classes to train on; by default all of the training split.
        held_out: where the test classes are novel, this part of the training images is held out to measure the
            accuracy on base classes: the same number of each class (of the smallest class this part, but at least one
            image), the last ones.
    """
    if not 0 <= held_out < 1:
        raise UserError(f"held_out: expected a number in [0, 1), got {held_out}")
    train, test, validation = splits["train"], splits["test"], splits.get("val")
    shared = set(train.class_names) & set(test.class_names)
    if not shared:
        for other, part in (("training", train), ("test", test)):
            known = set(part.class_names) & set(validation.class_names if validation is not None else ())
            if known:
                raise UserError(
                    f"dataset: the test classes are novel, so validation must have classes of its own; "
                    f"it shares {len(known)} with {other} ({min(known)}, ...)"
                )
        training = train if classes is None else train.with_classes(classes)
        if not held_out:
            return Task(training, None, test, validation)
        training, last = _hold_out(training, held_out)
        return Task(training, last, test, validation)
    if train.class_names != test.class_names:
        raise UserError(
            f"dataset: training and test must have the same classes or none in common; "
            f"they share {len(shared)} of {len(train.class_names)} and {len(test.class_names)} ({min(shared)}, ...)"
        )
    if held_out:
        raise UserError(f"held_out: the test split is held out already, expected 0, got {held_out}")
    known = set(train.class_names) & set(validation.class_names if validation is not None else ())
    if validation is not None and known and validation.class_names != train.class_names:
        raise UserError(
            f"dataset: validation must have the classes of training and test or none of them; "
            f"it shares {len(known)} of {len(train.class_names)} ({min(known)}, ...)"
        )
    if classes is None:
        return Task(train, test, None, validation)
    others = [c for c in range(len(train.class_names)) if c not in classes]
    novel = concatenate([train, test]).with_classes(others) if others else None
    if validation is not None and validation.class_names == train.class_names:
        validation = validation.with_classes(classes)
    return Task(train.with_classes(classes), test.with_classes(classes), novel, validation)


def _hold_out(images: ImageSet, fraction: float) -> tuple[ImageSet, ImageSet]:
    """What remains, and the last images of each class."""
    sizes = images.labels.bincount(minlength=len(images.class_names))
    smallest, name = int(sizes.min()), images.class_names[int(sizes.argmin())]
    count = max(1, round(fraction * smallest))
    if count >= smallest:
        raise UserError(f"held_out: {fraction} leaves nothing of class {name}, which has {smallest} images")
    members = [(images.labels == c).nonzero()[:, 0] for c in range(len(images.class_names))]
    last = torch.cat([m[-count:] for m in members]).sort().values
    rest = torch.ones(len(images), dtype=torch.bool)
    rest[last] = False
    return images.subset(rest.nonzero()[:, 0]), images.subset(last)
