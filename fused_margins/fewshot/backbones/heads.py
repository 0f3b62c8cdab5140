"""What is trained on features instead of a network for images: a linear map alone, or one after a hidden layer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Backbone

NAMES = ("linear", "mlp")
EMBEDDING_SIZE = 128
HIDDEN = 512


class Flat(nn.Module):
    """All numbers of a sample side by side, after a hidden layer if asked for: (B, C, H, W) -> (B, num_features)."""

    num_features: int

    def __init__(self, width: int, hidden: int | None) -> None:
        super().__init__()
        self.hidden = None if hidden is None else nn.Linear(width, hidden)
        self.num_features = hidden or width

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        flat = images.flatten(1)
        return flat if self.hidden is None else F.relu(self.hidden(flat))


def linear(in_channels: int, image_size: tuple[int, int], settings: Backbone) -> Flat:
    """The numbers as they are: only the linear head of the network learns."""
    return Flat(in_channels * image_size[0] * image_size[1], None)


def mlp(in_channels: int, image_size: tuple[int, int], settings: Backbone) -> Flat:
    """One hidden layer of `channels` (512) with ReLU."""
    return Flat(in_channels * image_size[0] * image_size[1], settings.channels or HIDDEN)
