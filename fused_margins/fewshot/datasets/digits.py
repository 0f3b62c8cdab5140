"""Handwritten digits that come with scikit-learn: nothing to download."""

from pathlib import Path

import numpy as np
import torch

from ..errors import UserError
from .images import ImageSet

SIZE = 8


def load(root: Path, image_size: int = SIZE) -> dict[str, ImageSet]:
    """1797 handwritten digits of 8 x 8 pixels from scikit-learn; coarse labels: even, odd; a third is held out."""
    if image_size != SIZE:
        raise UserError(f"image_size: digits have {SIZE} x {SIZE} pixels, got {image_size}")
    from sklearn.datasets import load_digits  # not for who loads other data: they take a while to import
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(digits.target.astype(np.int64))
    everything = ImageSet(images, labels, labels % 2, tuple(str(name) for name in digits.target_names), ("even", "odd"))
    train, test = train_test_split(np.arange(len(labels)), test_size=1 / 3, stratify=labels, random_state=0)
    return {
        split: everything.subset(torch.from_numpy(np.sort(rows))) for split, rows in (("train", train), ("test", test))
    }
