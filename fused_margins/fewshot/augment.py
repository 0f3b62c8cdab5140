"""Random affine maps of a whole batch in one `grid_sample`, reproducible from a generator."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import Augmentation


def affine(images: Tensor, angle_rad: Tensor, zoom: Tensor, shift: Tensor) -> Tensor:
    """Each image turned counter-clockwise about its centre, made `zoom` times as large, then shifted.

    Args:
        images: (B, channels, height, width), floating.
        angle_rad: (B,), radians.
        zoom: (B,), above 0.
        shift: (B, 2), to the right and down, as fractions of width and height.

    Returns:
        Images of the same shape, bilinear, black where nothing was.

    Example:
        >>> image = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
        >>> affine(image, torch.tensor([0.0]), torch.tensor([1.0]), torch.tensor([[0.5, 0.0]]))
        tensor([[[[0., 1.],
                  [0., 0.]]]])
    """
    height, width = images.shape[-2:]
    # The sampling grid asks for the inverse: where in the source does a pixel of the result lie?
    # Coordinates run from -1 to 1 on either axis, hence the aspect ratios.
    cos, sin = torch.cos(angle_rad) / zoom, torch.sin(angle_rad) / zoom
    linear = torch.stack(
        [
            torch.stack([cos, -sin * (height / width)], dim=1),
            torch.stack([sin * (width / height), cos], dim=1),
        ],
        dim=1,
    )  # (B, 2, 2)
    offset = -linear @ (2 * shift)[:, :, None]  # (B, 2, 1)
    grid = F.affine_grid(torch.cat([linear, offset], dim=2), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def random_affine(images: Tensor, settings: Augmentation, generator: torch.Generator) -> Tensor:
    """Each image under a map of its own, drawn uniformly within `settings` by a CPU generator."""
    if settings.rotation_deg == settings.shift == settings.zoom == 0:
        return images
    draw = (torch.rand(images.shape[0], 4, generator=generator) * 2 - 1).to(images.device)
    angle_rad = torch.deg2rad(settings.rotation_deg * draw[:, 0])
    return affine(images, angle_rad, 1 + settings.zoom * draw[:, 1], settings.shift * draw[:, 2:])
