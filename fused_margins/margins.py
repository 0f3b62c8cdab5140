"""psi: what a margin does to the similarity of a row with its own class. Plain PyTorch over vectors of length B."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .ops import checks
from .ops.similarity import take_rows

MARGIN_TYPES = ("additive", "angular", "combined")
BEYOND_PI = ("standard", "continuous", "easy")
MARGIN_GRADIENTS = ("exact", "straight_through")


def row_margin(argument: str, margin: float | Tensor, labels: Tensor, weight: Tensor) -> float | Tensor:
    """A number, 0-d, (C,) or (B, 1) margin as a number, a 0-d or a (B,) tensor; weight (C, D) gives its dtype."""
    if not isinstance(margin, Tensor):
        checks.number(argument, margin, "a number or a tensor")
        return margin
    margin, num_classes = checks.floating(argument, margin, weight), weight.shape[0]
    if margin.dim() == 0:
        return margin
    if margin.dim() == 1 and margin.shape[0] == num_classes:
        return take_rows(margin, labels)
    if tuple(margin.shape) == (labels.shape[0], 1):
        return margin[:, 0]
    raise ValueError(
        f"{argument}: expected a number, a 0-d tensor, one a class ({num_classes},) or one a sample "
        f"({labels.shape[0]}, 1), got shape {tuple(margin.shape)}"
    )


def row_scale(scale: float | Tensor, embeddings: Tensor) -> Tensor:
    """A number, 0-d or (B, 1) scale as the ops take it: 0-d or (B,), in the accumulation dtype."""
    if isinstance(scale, Tensor) and tuple(scale.shape) == (embeddings.shape[0], 1):
        scale = scale[:, 0]
    elif isinstance(scale, Tensor) and scale.dim() != 0:
        raise ValueError(
            f"scale: expected a number, a 0-d tensor or shape ({embeddings.shape[0]}, 1), got {tuple(scale.shape)}"
        )
    return checks.row_factor("scale", scale, embeddings, positive=True)


def check_options(
    margin: float | Tensor,
    similarity: str,
    margin_type: str,
    angular_margin_rad: float | Tensor,
    angular_multiplier: float,
    beyond_pi: str,
    gradient: str,
) -> None:
    """ValueError where they are unknown or do not go together."""
    checks.similarity(similarity)
    checks.choice("beyond_pi", beyond_pi, BEYOND_PI)
    checks.choice("margin_gradient", gradient, MARGIN_GRADIENTS)
    if margin_type != "additive" and similarity != "cosine":
        raise ValueError(f"similarity: expected 'cosine' for margin_type {margin_type!r}, got {similarity!r}")
    checks.number("angular_multiplier", angular_multiplier)
    if not angular_multiplier > 0:
        raise ValueError(f"angular_multiplier: expected a positive number, got {angular_multiplier}")
    for name, value in (("margin", margin), ("angular_margin_rad", angular_margin_rad)):
        if isinstance(value, Tensor):
            continue
        checks.number(name, value, "a number or a tensor")
        if (name != "margin" or margin_type == "angular") and not abs(value) <= math.pi:
            raise ValueError(f"{name}: expected radians within [-pi, pi], got {value}")
    angular = angular_multiplier != 1 or isinstance(angular_margin_rad, Tensor) or angular_margin_rad != 0
    if angular and margin_type != "combined":
        raise ValueError(
            f"angular_margin_rad, angular_multiplier: expected with margin_type 'combined' alone, got {margin_type!r}"
        )


def margin_function(
    margin: float | Tensor,
    labels: Tensor,
    weight: Tensor,
    similarity: str,
    margin_type: str,
    angular_margin_rad: float | Tensor,
    angular_multiplier: float,
    beyond_pi: str,
    gradient: str,
) -> Callable[[Tensor], Tensor]:
    """psi as a function of the positive similarities alone, all its options checked."""
    check_options(margin, similarity, margin_type, angular_margin_rad, angular_multiplier, beyond_pi, gradient)
    of_row = row_margin("margin", margin, labels, weight)
    angle_of_row = row_margin("angular_margin_rad", angular_margin_rad, labels, weight)
    return lambda u: apply_margin(u, of_row, margin_type, angle_of_row, angular_multiplier, beyond_pi, gradient)


def apply_margin(
    u: Tensor,
    margin: float | Tensor,
    margin_type: str,
    angular_margin_rad: float | Tensor = 0.0,
    angular_multiplier: float = 1.0,
    beyond_pi: str = "standard",
    gradient: str = "exact",
) -> Tensor:
    """psi(u) (B,): u - m, cos(theta + m), or cos(m1 theta + m2) - m with u = cos(theta).

    Source: additive, Wang et al., CosFace, 2018, eq. 4, and Liu et al., Negative Margin Matters, 2020; angular,
    Deng et al., ArcFace, 2019, eq. 3; combined, ibid. eq. 4.
    """
    if margin_type == "additive":
        return u - margin
    at = u.detach() if gradient == "straight_through" else u
    if margin_type == "angular":
        value = _angular(at, margin, 1.0, beyond_pi)
    else:
        value = _angular(at, angular_margin_rad, angular_multiplier, beyond_pi) - margin
    return value + (u - at) if gradient == "straight_through" else value


def _angular(u: Tensor, margin_rad: float | Tensor, multiplier: float, beyond_pi: str) -> Tensor:
    """cos(multiplier theta + margin) with a monotone continuation where that angle leaves [0, pi]."""
    if multiplier == 1.0 and not isinstance(margin_rad, Tensor):
        return _shifted_by_a_number(u, float(margin_rad), beyond_pi)
    margin = torch.as_tensor(margin_rad, dtype=u.dtype, device=u.device)
    if multiplier == 1.0:
        shifted = u * torch.cos(margin) - _sine(u) * torch.sin(margin)
        past_pi, before_zero = u < -torch.cos(margin), u > torch.cos(margin)
        past_pi, before_zero = past_pi & (margin > 0), before_zero & (margin < 0)
        beyond = -2 - shifted
        if beyond_pi == "standard":
            beyond = u - margin * torch.sin(margin)
        elif beyond_pi == "easy":
            beyond, past_pi = u, (u <= 0) & (margin > 0)
    else:
        # |u| = 1 is kept out of acos, whose derivative is infinite there: the gradient is 0 at and beyond it.
        edge = 1 - torch.finfo(u.dtype).eps
        angle = multiplier * torch.acos(u.clamp(-edge, edge)) + margin
        turns = torch.floor(angle / math.pi).detach()  # 0 inside [0, pi)
        shifted = torch.cos(angle)
        past_pi, before_zero = turns > 0, angle < 0
        beyond = torch.where(turns % 2 == 0, shifted, -shifted) - 2 * turns
    # Below 0 the cosine would turn back: a line of slope 1 that meets it at angle 0, theta = -margin /
    # multiplier.
    before = u + 1 - torch.cos(margin / multiplier)
    return torch.where(past_pi, beyond, torch.where(before_zero, before, shifted))


def _shifted_by_a_number(u: Tensor, margin: float, beyond_pi: str) -> Tensor:
    """`_angular` of multiplier 1: only one end of [0, pi] can be left, and a small batch is spared half the calls."""
    if margin == 0:
        return u
    cosine, sine = math.cos(margin), math.sin(margin)
    shifted = u * cosine - _sine(u) * sine
    if margin < 0:
        return torch.where(u > cosine, u + (1 - cosine), shifted)
    if beyond_pi == "easy":
        return torch.where(u <= 0, u, shifted)
    return torch.where(u < -cosine, u - margin * sine if beyond_pi == "standard" else -2 - shifted, shifted)


def _sine(u: Tensor) -> Tensor:
    """sin(theta) from u = cos(theta), with gradient 0 at and (by rounding) beyond |u| = 1 instead of infinity."""
    # A number so small is 0 to whatever it is added to, and what is clamped has the gradient 0.
    return ((1 - u) * (1 + u)).clamp(min=torch.finfo(u.dtype).tiny).sqrt()
