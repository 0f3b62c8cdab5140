"""The convolutional network of the few-shot papers, arranged for speed on a CPU."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Backbone
from .errors import UserError


class ConvBlock(nn.Module):
    """conv 3 x 3 -> max-pool 2 -> batch norm -> ReLU: pooled first, so that the rest sees a quarter of the pixels."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        # No bias: the mean that the batch norm subtracts would take it away again.
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, images: Tensor) -> Tensor:
        return F.relu(self.norm(F.max_pool2d(self.conv(images), kernel_size=2)))


class ConvNet(nn.Module):
    """`blocks` ConvBlocks (four of them are the papers' Conv4) and a linear embedding head, in channels_last.

    Args:
        in_channels: channels of the images.
        image_size: (height, width) in pixels; each block halves both.
        settings: number of blocks, channels, embedding size, and whether embeddings get unit length.

    Example:
        >>> network = ConvNet(3, (84, 84), Backbone(blocks=4, channels=64, embedding_size=128))
        >>> network(torch.zeros(2, 3, 84, 84)).shape
        torch.Size([2, 128])
    """

    def __init__(self, in_channels: int, image_size: tuple[int, int], settings: Backbone) -> None:
        super().__init__()
        height, width = (size >> settings.blocks for size in image_size)
        if min(height, width) < 1:
            raise UserError(
                f"blocks: {settings.blocks} blocks halve {image_size[0]} x {image_size[1]} images to nothing, "
                f"at most {min(image_size).bit_length() - 1} fit"
            )
        widths = [in_channels] + [settings.channels] * settings.blocks
        self.blocks = nn.Sequential(*(ConvBlock(a, b) for a, b in pairwise(widths)))
        self.head = nn.Linear(settings.channels * height * width, settings.embedding_size)
        self.normalize = settings.normalize
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        """(B, channels, height, width) -> (B, embedding_size)."""
        features = self.blocks(images)  # channels_last from the first convolution on, as its weights are
        embeddings = self.head(features.flatten(1))
        return F.normalize(embeddings) if self.normalize else embeddings
