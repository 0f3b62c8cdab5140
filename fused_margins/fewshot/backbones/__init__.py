"""The networks of the few-shot papers: `Backbone` names one and its settings.

From images to embeddings: pixels made comparable, features, a linear head if asked for, unit length if asked for.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Backbone
from ..errors import UserError
from . import convnets, resnets

_FEATURES: dict[str, Callable[[int, tuple[int, int], Backbone], convnets.ConvNet | resnets.ResNet | convnets.Flat]] = {
    "convnet": convnets.convnet,
    "conv4": convnets.conv4,
    "resnet12": resnets.resnet12,
    "resnet18": resnets.resnet18,
    "linear": convnets.linear,
    "mlp": convnets.mlp,
}
EMBEDDING_SIZES = {"convnet": 32, **dict.fromkeys(convnets.OF_FEATURES, convnets.EMBEDDING_SIZE)}


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
        if image_size == (1, 1) and settings.name not in convnets.OF_FEATURES:
            raise UserError(
                f"backbone: {settings.name} takes images; features take {' or '.join(convnets.OF_FEATURES)}"
            )
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
