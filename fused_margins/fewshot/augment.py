"""Random changes of whole batches, on any device, reproducible from a generator on the CPU.

Flip, crops, rotation, zoom and shift are affine, so all of them together are one map for each image and one
`grid_sample`. A map is kept as a matrix (B, 2, 3) that says where in the source a place of the result lies; coordinates
run from -1 to 1 over the whole width and height.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import Augmentation

CROP_AREA = (0.08, 1.0)  # of the image; area, aspect and attempts as torchvision's RandomResizedCrop has them
CROP_ASPECT = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10
GREY = (0.2989, 0.587, 0.114)  # share of red, green and blue in the brightness (ITU-R BT.601)


def augment(images: Tensor, settings: Augmentation, generator: torch.Generator) -> Tensor:
    """Images (B, channels, height, width), in [0, 1], each changed at random as the settings say."""
    return color_jitter(random_affine(images, settings, generator), settings.color_jitter, generator)


def random_affine(images: Tensor, settings: Augmentation, generator: torch.Generator) -> Tensor:
    """Each image under a map of its own: cropped, then flipped, then turned, zoomed and shifted."""
    count, (height, width) = images.shape[0], images.shape[-2:]
    maps = []
    if settings.resized_crop:
        maps.append(_resized_crop(count, height, width, generator))
    if settings.crop_padding:
        pixels = torch.randint(-settings.crop_padding, settings.crop_padding + 1, (count, 2), generator=generator)
        maps.append(_stretch_shift(torch.ones(count, 2), 2 * pixels / torch.tensor([width, height])))
    if settings.flip:
        signs = torch.randint(0, 2, (count,), generator=generator) * 2.0 - 1
        maps.append(_stretch_shift(torch.stack([signs, torch.ones(count)], dim=1), torch.zeros(count, 2)))
    if settings.rotation_deg or settings.shift or settings.zoom:
        draw = torch.rand(count, 4, generator=generator) * 2 - 1
        angle_rad = torch.deg2rad(settings.rotation_deg * draw[:, 0])
        zoom, shift = 1 + settings.zoom * draw[:, 1], settings.shift * draw[:, 2:]
        maps.append(_turn_zoom_shift(angle_rad, zoom, shift, height / width))
    if not maps:
        return images
    composed = maps[0]
    for later in maps[1:]:  # the result of the first is the source of the later one
        linear = composed[:, :, :2]
        composed = torch.cat([linear @ later[:, :, :2], linear @ later[:, :, 2:] + composed[:, :, 2:]], dim=2)
    # A part of the image alone needs no black, which would show in the half pixel beyond the centres of its edge.
    leaves_the_image = settings.crop_padding or settings.rotation_deg or settings.shift or settings.zoom
    return _sample(images, composed.to(images.device), "zeros" if leaves_the_image else "border")


def color_jitter(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Brightness, then contrast, then saturation, each times a factor of the image's own in 1 ± `strength`.

    Contrast is the distance from the mean grey of the image, saturation that from the grey of the pixel (a grey image
    has none); values stay in [0, 1]. The order is that of the code of Chen et al., A Closer Look at Few-shot
    Classification, 2019, which Liu et al. 2020 train with.

    Args:
        images: (B, 1 or 3, height, width), in [0, 1].
        strength: 0 returns the images as they are.
        generator: on the CPU.

    Example:
        >>> image = torch.full((1, 1, 1, 2), 0.5)
        >>> jittered = color_jitter(image, 0.4, torch.Generator().manual_seed(0))
        >>> bool((jittered - 0.5).abs().max() <= 0.2)
        True
    """
    if strength == 0:
        return images
    factors = 1 + strength * (torch.rand(3, images.shape[0], 1, 1, 1, generator=generator) * 2 - 1)
    brightness, contrast, saturation = factors.to(images.device)
    # In place from here: at 84 pixels new memory costs more than the arithmetic.
    images = (images * brightness).clamp_(0, 1)
    images.lerp_(_grey(images.mean(dim=(2, 3), keepdim=True)), 1 - contrast).clamp_(0, 1)
    if images.shape[1] == 1:
        return images
    return images.lerp_(_grey(images), 1 - saturation).clamp_(0, 1)


def _grey(images: Tensor) -> Tensor:
    """(B, 1, height, width)"""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.split(1, dim=1)
    return (GREY[0] * red).add_(green, alpha=GREY[1]).add_(blue, alpha=GREY[2])


def _turn_zoom_shift(angle_rad: Tensor, zoom: Tensor, shift: Tensor, aspect: float) -> Tensor:
    """Turned counter-clockwise about the centre, made `zoom` times as large, then shifted to the right and down.

    Args:
        angle_rad: (B,), radians.
        zoom: (B,), above 0.
        shift: (B, 2), as fractions of width and height.
        aspect: height / width.
    """
    # The map is the inverse of what is seen: hence the division, the signs and the aspect ratios.
    cos, sin = torch.cos(angle_rad) / zoom, torch.sin(angle_rad) / zoom
    linear = torch.stack(
        [torch.stack([cos, -sin * aspect], dim=1), torch.stack([sin / aspect, cos], dim=1)], dim=1
    )  # (B, 2, 2)
    return torch.cat([linear, -linear @ (2 * shift)[:, :, None]], dim=2)


def _stretch_shift(stretch: Tensor, offset: Tensor) -> Tensor:
    """Along each axis (x, y): source = stretch * place + offset; both (B, 2)."""
    return torch.cat([torch.diag_embed(stretch), offset[:, :, None]], dim=2)


def _resized_crop(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Windows of whole pixels: the first of some attempts that fits, else the largest central one."""
    area, aspect, left, top = torch.rand(4, count, CROP_ATTEMPTS, generator=generator)
    area = height * width * (CROP_AREA[0] + (CROP_AREA[1] - CROP_AREA[0]) * area)
    low, high = math.log(CROP_ASPECT[0]), math.log(CROP_ASPECT[1])
    aspect = torch.exp(low + (high - low) * aspect)
    size = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], dim=2).round()  # (count, attempts, 2)
    whole = torch.tensor([width, height], dtype=torch.float32)
    fits = ((size >= 1) & (size <= whole)).all(dim=2)
    corner = (torch.stack([left, top], dim=2) * (whole - size + 1)).floor()
    first = fits.to(torch.int8).argmax(dim=1)
    size, corner = (t[torch.arange(count), first] for t in (size, corner))
    ratio = min(max(width / height, CROP_ASPECT[0]), CROP_ASPECT[1])
    central = torch.tensor([min(width, round(height * ratio)), min(height, round(width / ratio))], dtype=torch.float32)
    size = torch.where(fits.any(dim=1, keepdim=True), size, central)
    corner = torch.where(fits.any(dim=1, keepdim=True), corner, ((whole - central) / 2).floor())
    return _stretch_shift(size / whole, (2 * corner + size) / whole - 1)


def _sample(images: Tensor, maps: Tensor, outside: str = "zeros") -> Tensor:
    """Images under their maps, bilinear; outside of the source is black, or ("border") the last pixel of its edge."""
    height, width = images.shape[-2:]
    x, y = ((2 * torch.arange(n, device=maps.device) + 1) / n - 1 for n in (width, height))  # centres of the pixels
    # affine_grid multiplies matrices at every pixel, which takes longer than grid_sample; a sum will do.
    columns = x[:, None] * maps[:, None, :, 0]  # (B, width, 2)
    rows = y[:, None] * maps[:, None, :, 1] + maps[:, None, :, 2]  # (B, height, 2)
    grid = rows[:, :, None] + columns[:, None]  # (B, height, width, 2)
    return F.grid_sample(images, grid, padding_mode=outside, align_corners=False)
