"""Features set to zero at random in training; what is kept grows, so that their sum keeps its expectation.

Both take the generator that draws, on the features' device; torch's own where there is none.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
