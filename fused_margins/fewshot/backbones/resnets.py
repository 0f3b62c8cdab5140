"""ResNet-12 and ResNet-18 as the few-shot papers have them, with dropped features, averaged over all places."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Backbone
from ..errors import UserError
from .drop import Drop, DropBlock

SMALL_IMAGE = 64  # pixels; ResNet-18 has the stem for small images below


class ResNet(nn.Module):
    """A stem, blocks with a drop after each, and the mean over all places: (B, C, H, W) -> (B, num_features)."""

    num_features: int

    def __init__(self, stem: nn.Module, blocks: Sequence[nn.Module], drops: Sequence[nn.Module], num_features: int):
        super().__init__()
        self.stem, self.num_features = stem, num_features
        self.blocks, self.drops = nn.ModuleList(blocks), nn.ModuleList(drops)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        features = self.stem(images)
        for block, drop in zip(self.blocks, self.drops):
            features = drop(block(features), generator)
        return features.mean(dim=(2, 3))


class Block12(nn.Module):
    """Three convolutions with batch norm, LeakyReLU 0.1 between them, beside a 1 x 1 convolution; pooled by two.

    Pooled before the last LeakyReLU, which keeps the order of numbers and so may come after.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv_norm(in_channels, out_channels, 3)
        self.conv2, self.norm2 = _conv_norm(out_channels, out_channels, 3)
        self.conv3, self.norm3 = _conv_norm(out_channels, out_channels, 3)
        self.shortcut = nn.Sequential(*_conv_norm(in_channels, out_channels, 1))

    def forward(self, images: Tensor) -> Tensor:
        features = F.leaky_relu(self.norm1(self.conv1(images)), 0.1)
        features = F.leaky_relu(self.norm2(self.conv2(features)), 0.1)
        features = self.norm3(self.conv3(features)) + self.shortcut(images)
        return F.leaky_relu(F.max_pool2d(features, 2), 0.1)


class Block18(nn.Module):
    """Two convolutions with batch norm and ReLU, beside the input, or a 1 x 1 convolution of it where shapes differ."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv_norm(in_channels, out_channels, 3, stride)
        self.conv2, self.norm2 = _conv_norm(out_channels, out_channels, 3)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = nn.Sequential(*_conv_norm(in_channels, out_channels, 1, stride))

    def forward(self, images: Tensor) -> Tensor:
        features = F.relu(self.norm1(self.conv1(images)))
        return F.relu(self.norm2(self.conv2(features)) + self.shortcut(images))


def _conv_norm(in_channels: int, out_channels: int, size: int, stride: int = 1) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    conv = nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2, bias=False)
    return conv, nn.BatchNorm2d(out_channels)


def resnet12(in_channels: int, image_size: tuple[int, int], settings: Backbone) -> ResNet:
    """Four stages of one block, 64-160-320-640 channels; dropout after the first two, DropBlock after the last two.

    `settings.channels` (64) is the width of the first stage; the others keep their proportion to it.

    Source: Lee et al., Meta-Learning with Differentiable Convex Optimization, 2019, and their code; as in the code of
    Liu et al., Negative Margin Matters, 2020.
    """
    first = settings.channels or 64
    widths = [in_channels, first, first * 5 // 2, first * 5, first * 10]
    blocks = [Block12(a, b) for a, b in pairwise(widths)]
    halved = [[size >> stage for size in image_size] for stage in (3, 4)]
    blocks_dropped = [_drop_block(settings, min(sizes), image_size) for sizes in halved]
    drops = [Drop(settings.drop_rate), Drop(settings.drop_rate), *blocks_dropped]
    return ResNet(nn.Identity(), blocks, drops, widths[-1])


def resnet18(in_channels: int, image_size: tuple[int, int], settings: Backbone) -> ResNet:
    """Four stages of two blocks, 64-128-256-512 channels; dropout in the first two, DropBlock in the last two.

    The stem is the official 7 x 7 convolution of stride 2 and max-pool 3 of stride 2, made for 224 x 224 images. It
    would leave 1 x 1 of images of 32 x 32; below 64 pixels it is a 3 x 3 convolution of stride 1 without pooling, as
    is usual for CIFAR. `settings.channels` (64) is the width of the first stage; the others double it.

    Source: He et al., Deep Residual Learning for Image Recognition, 2016; as in the code of Chen et al., A Closer Look
    at Few-shot Classification, 2019, and of Liu et al., Negative Margin Matters, 2020.
    """
    first = settings.channels or 64
    if min(image_size) < SMALL_IMAGE:
        stem = nn.Sequential(*_conv_norm(in_channels, first, 3), nn.ReLU())
        smallest = min(image_size)
    else:
        stem = nn.Sequential(*_conv_norm(in_channels, first, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1))
        smallest = -(-min(image_size) // 4)
    blocks: list[nn.Module] = []
    drops: list[nn.Module] = []
    width = first
    for stage in range(4):
        smallest = smallest if stage == 0 else -(-smallest // 2)
        for stride in (1 if stage == 0 else 2, 1):
            blocks.append(Block18(width, first << stage, stride))
            drops.append(Drop(settings.drop_rate) if stage < 2 else _drop_block(settings, smallest, image_size))
            width = first << stage
    return ResNet(stem, blocks, drops, width)


def _drop_block(settings: Backbone, smallest: int, image_size: tuple[int, int]) -> DropBlock:
    """For features of which the shorter side is `smallest`."""
    size = settings.dropblock_size
    if settings.drop_rate > 0 and size > smallest:
        raise UserError(
            f"dropblock_size: squares of {size} x {size} do not fit the features that {settings.name} makes of "
            f"{image_size[0]} x {image_size[1]} images, at most {smallest} x {smallest} do"
        )
    return DropBlock(settings.drop_rate, size, settings.dropblock_steps)
