"""Plain stacks of convolutions, a small one arranged for speed on a CPU and the papers' Conv4; and what is trained on
features instead of a network for images: a linear map alone, or one after a hidden layer."""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Backbone
from ..errors import UserError

OF_FEATURES = ("linear", "mlp")
EMBEDDING_SIZE = 128
HIDDEN = 512


class ConvNet(nn.Module):
    """Blocks that halve the image, and their features side by side: (B, C, H, W) -> (B, num_features)."""

    num_features: int

    def __init__(
        self,
        in_channels: int,
        image_size: tuple[int, int],
        num_blocks: int,
        channels: int,
        make_block: Callable[[int, int], nn.Module],
    ) -> None:
        super().__init__()
        height, width = (size >> num_blocks for size in image_size)
        if min(height, width) < 1:
            raise UserError(
                f"blocks: {num_blocks} blocks halve {image_size[0]} x {image_size[1]} images to nothing, "
                f"at most {min(image_size).bit_length() - 1} fit"
            )
        self.blocks = nn.Sequential(*(make_block(a, b) for a, b in pairwise([in_channels] + [channels] * num_blocks)))
        self.num_features = channels * height * width

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.blocks(images).flatten(1)


class PoolFirstBlock(nn.Module):
    """conv 3 x 3 -> max-pool 2 -> batch norm -> ReLU: pooled first, so that the rest sees a quarter of the pixels."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        # No bias: the mean that the batch norm subtracts would take it away again.
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, images: Tensor) -> Tensor:
        return F.relu(self.norm(F.max_pool2d(self.conv(images), kernel_size=2)))


class Conv4Block(nn.Module):
    """conv 3 x 3 -> batch norm -> max-pool 2 -> ReLU: the official batch norm -> ReLU -> max-pool 2, with less work.

    The official convolution has a bias, which the batch norm's mean takes away again: left out, the network computes
    the same, and no parameter is left whose gradient is rounding alone.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        return F.relu(F.max_pool2d(self.norm(self.conv(images)), kernel_size=2))


def convnet(in_channels: int, image_size: tuple[int, int], settings: Backbone) -> ConvNet:
    """`blocks` (3) pool-first blocks of `channels` (32)."""
    return ConvNet(in_channels, image_size, settings.blocks or 3, settings.channels or 32, PoolFirstBlock)


def conv4(in_channels: int, image_size: tuple[int, int], settings: Backbone) -> ConvNet:
    """Four blocks of `channels` (64): 1600 features of 84 x 84 images, 256 of 32 x 32, 64 of 28 x 28.

    Source: Vinyals et al., Matching Networks for One Shot Learning, 2016; as in the code of Chen et al., A Closer Look
    at Few-shot Classification, 2019, and of Liu et al., Negative Margin Matters, 2020.
    """
    return ConvNet(in_channels, image_size, 4, settings.channels or 64, Conv4Block)


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
