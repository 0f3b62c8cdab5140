"""What every loss with class weights has: a device that the embeddings must share, and a linear layer to export."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core import checks
from ..core.enums import Similarity
from ..core.similarity import accumulation_dtype, unit_rows


def check_device(embeddings: Tensor, weight: Tensor) -> None:
    """Embeddings where the weight of a loss is: whoever moved the model alone is told what to move."""
    if isinstance(embeddings, Tensor) and embeddings.device != weight.device:
        raise ValueError(
            f"embeddings: expected the device of the loss's weight ({weight.device}), got {embeddings.device}; a loss "
            f"has parameters and moves like a model: loss.to({str(embeddings.device)!r}), before the optimizer is made"
        )


def lengths(embeddings: Tensor) -> Tensor:
    """|x_i| (B, 1) in the accumulation dtype, whatever autocast says; the gradient of that of a zero vector is 0."""
    checks.matrices(embeddings, embeddings, ("embeddings", "embeddings"), autocast=False)
    with torch.autocast(embeddings.device.type, enabled=False):
        return torch.linalg.vector_norm(embeddings.to(accumulation_dtype(embeddings.dtype)), dim=1, keepdim=True)


def check_radians(argument: str, values: Tensor) -> None:
    """Angles whose values are there to be looked at, once, when a module is made."""
    if not values.is_meta and not bool((values.detach().abs() <= math.pi).all()):
        raise ValueError(
            f"{argument}: expected radians within [-pi, pi], got {float(values.detach().abs().max())}; degrees become "
            "radians by torch.deg2rad"
        )


class LinearHead(nn.Module):
    """The predictions of a loss as plain torch: normalise, multiply by a matrix. What `to_linear` of a loss returns.

        z_ij = scale u_ij

    Attributes:
        linear: torch.nn.Linear of weight (C, D), the class weights with normalisation and scale multiplied in, or of
            (C K, D) where a class has K centers, which become one logit. They are copies that do not learn.

    Call: head(embeddings (B, D)) gives the logits (B, C), as `predictions` of the loss.
    """

    centre: Tensor | None

    def __init__(self, weight: Tensor, scale: float, similarity: Similarity, center_temperature: float = 0.0) -> None:
        super().__init__()
        self.similarity, self.scale, self.center_temperature = similarity, scale, center_temperature
        self.num_centers = weight.shape[1] if weight.dim() == 3 else None
        weight = weight.detach().clone().flatten(0, -2)
        bias = centre = None
        if similarity == Similarity.COSINE:
            weight = unit_rows(weight)
        elif similarity == Similarity.NEGATIVE_SQUARED_EUCLIDEAN:
            # -|x - w|^2 = 2 <x, w> - |w|^2 - |x|^2, around the mean of the weights, where the squares cancel least.
            centre = weight.mean(0)
            weight = weight - centre
            bias, weight = -scale * weight.square().sum(1), 2 * weight
        self.linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, weight.device, weight.dtype)
        self.linear.requires_grad_(False)
        self.linear.weight.copy_(scale * weight)
        if bias is not None:
            self.linear.bias.copy_(bias)
        self.register_buffer("centre", centre)

    def forward(self, embeddings: Tensor) -> Tensor:
        z = self._logits(embeddings)
        if self.num_centers is None:
            return z
        z = z.unflatten(-1, (-1, self.num_centers))  # (B, C, K)
        if self.center_temperature == 0:
            return z.amax(-1)
        return ((z / (self.scale * self.center_temperature)).softmax(-1) * z).sum(-1)

    def _logits(self, embeddings: Tensor) -> Tensor:
        if self.similarity == Similarity.COSINE:
            return self.linear(F.normalize(embeddings, dim=-1))
        if self.centre is None:
            return self.linear(embeddings)
        x = embeddings - self.centre
        return self.linear(x) - self.scale * x.square().sum(-1, keepdim=True)

    def extra_repr(self) -> str:
        return f"similarity={self.similarity.name.lower()!r}"


def linear_head(weight: Tensor, scale: float | Tensor, similarity: str, center_temperature: float = 0.0) -> LinearHead:
    """The head of a loss, with its scale as a number."""
    number = float(torch.as_tensor(scale).detach())
    return LinearHead(weight, number, checks.choice("similarity", similarity, Similarity), center_temperature)
