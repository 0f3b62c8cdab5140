"""ResNet-12 and ResNet-18 as the few-shot papers have them, with dropped features, averaged over all places.

What is dropped is set to zero at random in training; what is kept grows, so that the sum keeps its expectation. The
generator that draws is on the features' device; torch's own where there is none.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Backbone
from ..errors import UserError

SMALL_IMAGE = 64  # pixels; ResNet-18 has the stem for small images below


class Drop(nn.Module):
    """Each feature on its own, with probability `rate` (Srivastava et al., Dropout, 2014)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, features: Tensor, generator: torch.Generator | None = None) -> Tensor:
        if not self.training or self.rate == 0:
            return features
        kept = torch.empty_like(features).bernoulli_(1 - self.rate, generator=generator)
        return features * kept.div_(1 - self.rate)


class DropBlock(nn.Module):
    """Squares of `block_size` features at a time, in each channel on its own.

    The rate rises in proportion to the steps trained, from 0 to `rate` after `ramp_steps`. A square begins at each
    place where it fits with probability gamma = rate / block_size^2 * (height * width) / (number of such places), so
    that about `rate` of all features fall. In MetaOptNet's code, and Liu et al.'s after it, some of a square's features
    survive where the number of squares in a batch shares a factor with block_size^2; here all of them fall.

    Source: Ghiasi et al., DropBlock: A regularization method for convolutional networks, 2018; the schedule is that of
    Lee et al., Meta-Learning with Differentiable Convex Optimization, 2019.
    """

    steps: Tensor

    def __init__(self, rate: float, block_size: int, ramp_steps: int) -> None:
        super().__init__()
        self.rate, self.block_size, self.ramp_steps = rate, block_size, ramp_steps
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, features: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)"""
        if not self.training or self.rate == 0:
            return features
        batch, channels, height, width = features.shape
        size = self.block_size
        places = (height - size + 1, width - size + 1)
        # A tensor, because a number would make a GPU wait for it.
        rate = self.rate * (self.steps / self.ramp_steps).clamp(max=1)
        gamma = rate / size**2 * (height * width) / (places[0] * places[1])
        self.steps += 1
        corners = torch.rand(batch, channels, *places, generator=generator, device=features.device) < gamma
        padded = F.pad(corners.to(features.dtype), (size - 1,) * 4)
        kept = 1 - F.max_pool2d(padded, size, stride=1)  # (B, C, H, W): 0 where some square covers the feature
        return features * kept * (kept.numel() / kept.sum().clamp(min=1))


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
            self.shortcut = nn.Sequential(*_conv_norm(in_channels, out_channels, 1))
        self.stride = stride

    def forward(self, images: Tensor) -> Tensor:
        features = F.relu(self.norm1(self.conv1(images)))
        # Thinned out by hand: with a stride of its own, oneDNN's 1 x 1 convolution writes beyond its workspace in the
        # backward where there are fewer channels than a vector has places (uxlfoundation/oneDNN issue 6035).
        thinned = images[:, :, :: self.stride, :: self.stride]
        return F.relu(self.norm2(self.conv2(features)) + self.shortcut(thinned))


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
    return ResNet(nn.Identity(), blocks, _drops(settings, 1, image_size, min(image_size) // 16), widths[-1])


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
        stem, shrinks = nn.Sequential(*_conv_norm(in_channels, first, 3), nn.ReLU()), 8
    else:
        stem = nn.Sequential(*_conv_norm(in_channels, first, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1))
        shrinks = 32
    widths = [first << stage for stage in (0, 0, 1, 1, 2, 2, 3, 3)]
    strides = (1, 1, 2, 1, 2, 1, 2, 1)
    blocks = [Block18(a, b, stride) for (a, b), stride in zip(pairwise([first, *widths]), strides)]
    return ResNet(stem, blocks, _drops(settings, 2, image_size, -(-min(image_size) // shrinks)), widths[-1])


def _drops(settings: Backbone, blocks: int, image_size: tuple[int, int], smallest: int) -> list[nn.Module]:
    """One after each of the `blocks` of each stage; the last stage's features are `smallest` on their shorter side."""
    rate, size = settings.drop_rate, settings.dropblock_size
    if rate > 0 and size > smallest:
        raise UserError(
            f"dropblock_size: squares of {size} x {size} do not fit the last features that {settings.name} makes of "
            f"{image_size[0]} x {image_size[1]} images, at most {smallest} x {smallest} do"
        )
    squares = [DropBlock(rate, size, settings.dropblock_steps) for _ in range(2 * blocks)]
    return [*(Drop(rate) for _ in range(2 * blocks)), *squares]
