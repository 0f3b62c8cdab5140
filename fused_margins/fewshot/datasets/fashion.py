"""Fashion-MNIST (Xiao, Rasul and Vollgraf, Fashion-MNIST: a Novel Image Dataset, 2017), where the user has it."""

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..errors import UserError
from .cache import cached
from .images import ImageSet
from .registry import register
from .sources import Tree, bounded, require

SIZE = 28
# The grouping is this project's: what is worn in the same place has much the same outline.
GROUPS = {
    "tops": ("T-shirt/top", "Pullover", "Coat", "Shirt"),
    "trousers and dresses": ("Trouser", "Dress"),
    "shoes": ("Sandal", "Sneaker", "Ankle boot"),
    "bags": ("Bag",),
}
CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)  # the order of the labels in the files
_COARSE = torch.tensor([next(i for i, group in enumerate(GROUPS.values()) if name in group) for name in CLASSES])
_GUIDE = (
    "The four *-ubyte.gz files come from https://github.com/zalandoresearch/fashion-mnist: put them in "
    "FashionMNIST/raw/, as torchvision does."
)


@register("fashion-mnist")
def load(root: Path, image_size: int = SIZE) -> dict[str, ImageSet]:
    """Fashion-MNIST: 60,000 and 10,000 images of ten classes; coarse: tops, trousers and dresses, shoes, bags."""
    tree = require(root, ["FashionMNIST/raw", "fashion-mnist"], _GUIDE)
    return {split: _split(tree, part, image_size) for split, part in (("train", "train"), ("test", "t10k"))}


def _split(tree: Tree, part: str, image_size: int) -> ImageSet:
    labels_file = f"{part}-labels-idx1-ubyte"
    labels = torch.from_numpy(_read(tree, labels_file).astype(np.int64))
    if len(labels) and int(labels.max()) >= len(CLASSES):
        raise UserError(f"{tree.where(_present(tree, labels_file))}: expected labels 0 to 9, got {int(labels.max())}")
    file = f"{part}-images-idx3-ubyte"
    name = _present(tree, file)
    if not len(labels):
        raise UserError(f"{tree.where(_present(tree, labels_file))}: no labels in it")

    def frames() -> Iterator[np.ndarray]:
        pixels = _read(tree, file)
        if len(pixels) != len(labels):
            raise UserError(f"{tree.where(name)}: {len(pixels)} images, but {len(labels)} labels")
        if pixels.shape[1:] != (SIZE, SIZE):
            raise UserError(f"{tree.where(name)}: expected images of {SIZE} x {SIZE} pixels, got {pixels.shape[1:]}")
        for frame in pixels:
            yield np.asarray(Image.fromarray(frame).resize((image_size, image_size), Image.Resampling.BOX))

    shape = (len(labels), 1, image_size, image_size)
    images = cached(f"fashion-mnist-{part}", f"box {name} {tree.stamp(name)}", shape, frames())
    return ImageSet(images, labels, _COARSE[labels], CLASSES, tuple(GROUPS))


def _present(tree: Tree, file: str) -> str:
    """The file's name, which ends in .gz where it is compressed."""
    return f"{file}.gz" if f"{file}.gz" in tree.children() else file


def _read(tree: Tree, file: str) -> np.ndarray:
    """The array in an idx file: zero, zero, the type 8 for bytes, the number of dimensions, each of them, the bytes."""
    name = _present(tree, file)
    with tree.open() as read:
        data = read(name)
    try:
        if name.endswith(".gz"):
            data = bounded(gzip.GzipFile(fileobj=io.BytesIO(data)), tree.where(name))
        dimensions = data[3]
        shape = np.frombuffer(data, ">u4", dimensions, offset=4)
        if data[:3] != b"\0\0\x08" or dimensions != int(file[-7]):
            raise ValueError(f"it begins with {data[:4].hex()}")
        return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
        raise UserError(f"{tree.where(name)}: not a whole idx file ({error})") from None
