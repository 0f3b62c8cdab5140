"""Data sets by name: `load` decodes the user's files once, keeps them memory-mapped, and returns a set of each split.

Splits may share their classes (digits) or have classes of their own (the usual few-shot sets); `make_task` sorts out
which is which. sources finds files, decoding makes images of them and keeps those, images holds the result; the
other modules have the data sets.
"""

from collections.abc import Callable
from pathlib import Path

from ..terminal import UserError
from . import features, folders, omniglot, published
from .images import ImageSet, Task, concatenate, make_task
from .omniglot import OneShotRuns, one_shot_runs
from .sources import DATA_ROOT_VARIABLE, data_root

__all__ = [
    "DATA_ROOT_VARIABLE",
    "LOADERS",
    "ImageSet",
    "OneShotRuns",
    "Task",
    "concatenate",
    "data_root",
    "is_of_features",
    "load",
    "make_task",
    "one_shot_runs",
]

MAX_IMAGE_SIZE = 4096  # pixels
OF_FEATURES = ("features", "gtsrb-tracks", "gtsrb-parents")  # loaders that take a file of features
OF_PATHS = ("folder", *OF_FEATURES)  # those that take a path instead of the data root
# loader(root) or loader(root, image_size): the splits "train", "test", and "val" where there is one
LOADERS: dict[str, Callable[..., dict[str, ImageSet]]] = {
    "cifar-fs": published.load_cifar_fs,
    "cub": published.load_cub,
    "cub-retrieval": published.load_cub_retrieval,
    "digits": published.load_digits,
    "features": features.load,
    "folder": folders.load,
    "gtsrb-parents": features.load_parents,
    "gtsrb-tracks": features.load_tracks,
    "mini-imagenet": published.load_mini_imagenet,
    "omniglot": omniglot.load,
    "omniglot-alphabets": omniglot.load_alphabets,
    "omniglot-background": omniglot.load_background,
}


def is_of_features(name: str) -> bool:
    """Whether a data set is one of features."""
    return name.partition(":")[0] in OF_FEATURES


def load(name: str, image_size: int | None = None) -> dict[str, ImageSet]:
    """The splits "train", "test", and "val" where there is one, of a data set in the data root.

    Args:
        name: of one of the `LOADERS`; `folder:PATH` for a folder or a zip with `{train,val,test}/<class>/<image>` or
            `<class>/<image>`; `features:FILE` for features of images.
        image_size: height and width in pixels; by default what is usual for the data set.

    Raises:
        UserError: the data are not there, or not whole; it says what to do.

    Example:
        >>> {split: len(images) for split, images in load("digits").items()}
        {'train': 1198, 'test': 599}
    """
    kind, _, path = name.partition(":")
    if kind not in LOADERS or (kind in OF_PATHS) != bool(path):
        known = sorted(f"{known}:PATH" if known in OF_PATHS else known for known in LOADERS)
        raise UserError(f"dataset: expected one of {', '.join(known)}, got {name!r}")
    if image_size is not None and not 1 <= image_size <= MAX_IMAGE_SIZE:
        raise UserError(f"image_size: expected 1 to {MAX_IMAGE_SIZE}, got {image_size}")
    if image_size is not None and is_of_features(name):
        raise UserError(f"image_size: features have none, got {image_size}")
    try:
        root = Path(path).expanduser() if path else data_root()
    except RuntimeError as error:  # nobody of this name has a home
        raise UserError(f"{path}: {error}") from None
    return LOADERS[kind](root) if image_size is None else LOADERS[kind](root, image_size)
