"""The networks of the few-shot papers: `Backbone` names one and its settings.

From images to embeddings: pixels made comparable, features, a linear head if asked for, unit length if asked for. There
are plain stacks of convolutions, a small one arranged for speed on a CPU and the papers' Conv4; ResNet-12 and ResNet-18
as the few-shot papers have them, with dropped features, averaged over all places; and for features of another network a
linear map alone, or one after a hidden layer.

What is dropped is set to zero at random in training; what is kept grows, so that the sum keeps its expectation. The
generator that draws is on the features' device; torch's own where there is none.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Backbone
from .terminal import UserError

OF_FEATURES = ("linear", "mlp")
SMALL_IMAGE = 64  # pixels; ResNet-18 has the stem for small images below


class ConvNet(nn.Module):
    """Blocks that halve the image, and the features of all `places` left side by side: (B, C, H, W) -> (B, D)."""

    num_features: int

    def __init__(
        self, widths: Sequence[int], make_block: Callable[[int, int], nn.Module], places: tuple[int, int]
    ) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(make_block(a, b) for a, b in pairwise(widths)))
        self.num_features = widths[-1] * places[0] * places[1]

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.blocks(images).flatten(1)


class StridedBlock(nn.Module):
    """conv 3 x 3 of stride 2 -> batch norm -> ReLU: a quarter of the work of a convolution that is pooled after it.

    On scikit-learn's digits, 32 channels: half of the time of a softmax training, and with four losses, six seeds each,
    a Recall@1 that differs by -0.3 to +3.0 points.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.strided, self.norm = _conv_norm(in_channels, out_channels, 3, stride=2)

    def forward(self, images: Tensor) -> Tensor:
        return F.relu(self.norm(self.strided(images)))


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
    """`blocks` (3) strided blocks of `channels` (32): 32 features of 8 x 8 images, 512 of 32 x 32."""
    num_blocks, height, width = settings.blocks or 3, *image_size
    if min(image_size) >> num_blocks < 1:
        raise UserError(
            f"blocks: {num_blocks} blocks halve {height} x {width} images to less than a pixel, "
            f"at most {min(image_size).bit_length() - 1} fit"
        )
    places = (-(-height >> num_blocks), -(-width >> num_blocks))  # half a pixel counts as one
    return ConvNet([in_channels] + [settings.channels or 32] * num_blocks, StridedBlock, places)


def conv4(in_channels: int, image_size: tuple[int, int], settings: Backbone) -> ConvNet:
    """Four blocks of `channels` (64): 1600 features of 84 x 84 images, 256 of 32 x 32, 64 of 28 x 28.

    Source: Vinyals et al., Matching Networks for One Shot Learning, 2016; as in the code of Chen et al., A Closer Look
    at Few-shot Classification, 2019, and of Liu et al., Negative Margin Matters, 2020.
    """
    places = (image_size[0] >> 4, image_size[1] >> 4)
    return ConvNet([in_channels] + [settings.channels or 64] * 4, Conv4Block, places)


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
    return Flat(in_channels * image_size[0] * image_size[1], settings.channels or 512)


_FEATURES: dict[str, Callable[[int, tuple[int, int], Backbone], ConvNet | ResNet | Flat]] = {
    "convnet": convnet,
    "conv4": conv4,
    "resnet12": resnet12,
    "resnet18": resnet18,
    "linear": linear,
    "mlp": mlp,
}
EMBEDDING_SIZES = {"convnet": 32, "linear": 128, "mlp": 128}


class Network(nn.Module):
    """The network that `settings` name, for images of one size, or for features, which are images of 1 x 1 pixels.

    Args:
        in_channels: channels of the images.
        image_size: (height, width) in pixels.
        settings: see `Backbone`.

    Attributes:
        embedding_size: width of the embeddings, for whoever puts a loss on top.

    Raises:
        UserError: the images are too small for the network, or for its blocks of dropped features.

    Example:
        >>> network = Network(3, (84, 84), Backbone(name="conv4"))
        >>> network.embedding_size, network(torch.zeros(2, 3, 84, 84)).shape
        (1600, torch.Size([2, 1600]))
    """

    embedding_size: int
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, in_channels: int, image_size: tuple[int, int], settings: Backbone) -> None:
        super().__init__()
        if image_size == (1, 1) and settings.name not in OF_FEATURES:
            raise UserError(f"backbone: {settings.name} takes images; features take {' or '.join(OF_FEATURES)}")
        if settings.name in ("conv4", "resnet12") and min(image_size) < 16:
            height, width = image_size
            raise UserError(f"backbone: {settings.name} halves images four times, {height} x {width} are too small")
        self.features = _FEATURES[settings.name](in_channels, image_size, settings)
        head_size = settings.embedding_size or EMBEDDING_SIZES.get(settings.name)
        self.head = nn.Identity() if head_size is None else nn.Linear(self.features.num_features, head_size)
        self.embedding_size = head_size or self.features.num_features
        self.standardize, self.normalize = settings.standardize, settings.normalize
        self.register_buffer("pixel_mean", torch.zeros(in_channels, 1, 1))
        self.register_buffer("pixel_std", torch.ones(in_channels, 1, 1))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def set_pixel_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Mean and standard deviation (channels,) of the pixels that `standardize` makes 0 and 1."""
        self.pixel_mean.copy_(mean[:, None, None])
        self.pixel_std.copy_(std[:, None, None])

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(B, channels, height, width) in [0, 1] -> (B, embedding_size).

        `generator`, on the device of the images, draws which features a ResNet drops in training (`drop_rate`).
        """
        if self.standardize:
            images = (images - self.pixel_mean) / self.pixel_std
        features = self.features(images.contiguous(memory_format=torch.channels_last), generator)
        embeddings = self.head(features)
        return F.normalize(embeddings) if self.normalize else embeddings
