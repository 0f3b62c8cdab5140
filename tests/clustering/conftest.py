"""Samples to cluster."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from .checks import seeded

BACKENDS = ("reference", "cpu")


@pytest.fixture(params=BACKENDS)
def backend(request, device_for) -> str:
    device_for("nearest", request.param)  # or skip, with the reason
    return request.param


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images[:600] / 16, dtype=torch.float32), torch.tensor(labels[:600])


@pytest.fixture
def blobs() -> tuple[Tensor, Tensor]:
    """Classes -3, 4 and 8 of 20, 3 and 7 samples, shuffled."""
    labels = torch.tensor([-3] * 20 + [4] * 3 + [8] * 7)[torch.randperm(30, generator=seeded())]
    return torch.randn(30, 2, generator=seeded(1)) + labels[:, None], labels
