"""The loaders by name, and the folder that they read."""

import os
from collections.abc import Callable
from pathlib import Path

from ..errors import UserError
from .images import ImageSet

DATA_ROOT_VARIABLE = "FUSED_MARGINS_DATA"
MAX_IMAGE_SIZE = 4096  # pixels
OF_FEATURES = ("features", "gtsrb-tracks", "gtsrb-parents")  # loaders that take a file of features
OF_PATHS = ("folder", *OF_FEATURES)  # those that take a path instead of the data root

# loader(root) or loader(root, image_size): the splits "train", "test", and "val" where there is one
Loader = Callable[..., dict[str, ImageSet]]
LOADERS: dict[str, Loader] = {}


def register(name: str) -> Callable[[Loader], Loader]:
    """Make a loader available under `name`."""

    def add(loader: Loader) -> Loader:
        LOADERS[name] = loader
        return loader

    return add


def data_root() -> Path:
    """The folder with the user's data sets: what FUSED_MARGINS_DATA names, else `data` in the working directory."""
    return Path(os.environ.get(DATA_ROOT_VARIABLE) or "data")


def is_of_features(name: str) -> bool:
    """Whether a data set is one of features."""
    return name.partition(":")[0] in OF_FEATURES


def load(name: str, image_size: int | None = None) -> dict[str, ImageSet]:
    """The splits "train", "test", and "val" where there is one, of a data set in the data root.

    Args:
        name: of a registered loader; `folder:PATH` for a folder or a zip with `{train,val,test}/<class>/<image>` or
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
