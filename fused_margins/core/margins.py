"""psi: what a margin does to the similarity of a row with its own class. Plain PyTorch over vectors of length B."""

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks
from .enums import BeyondPi, MarginType, Similarity
from .similarity import take_rows

MARGIN_GRADIENTS = ("exact", "straight_through")


class Pieces(NamedTuple):
    """psi(u) = cos(theta + angle), u = cos(theta), as what a kernel needs of it. With s = sin(theta) = sqrt(1 - u^2):

    psi(u) = cosine u - sine s     or, where side u > bound,     slope u + bend s + rest.
    """

    cosine: float
    sine: float
    side: float
    bound: float
    slope: float
    bend: float
    rest: float


@functools.lru_cache(maxsize=256)
def pieces(angle_rad: float, beyond_pi: BeyondPi) -> Pieces:
    """Those of `apply_margin`, margin type "angular", for an angle that is a number."""
    cosine, sine = math.cos(angle_rad), math.sin(angle_rad)
    if angle_rad == 0:
        return Pieces(1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0)
    if angle_rad < 0:  # below angle 0: a line of slope 1 that meets the cosine where it is 1
        return Pieces(cosine, sine, 1.0, cosine, 1.0, 0.0, 1 - cosine)
    if beyond_pi == BeyondPi.EASY:  # u as it is where u <= 0: the bound is next to 0, and no processor takes it for 0
        return Pieces(cosine, sine, -1.0, -(2.0**-126), 1.0, 0.0, 0.0)
    if beyond_pi == BeyondPi.STANDARD:  # beyond angle pi: ArcFace's line
        return Pieces(cosine, sine, -1.0, cosine, 1.0, 0.0, -angle_rad * sine)
    return Pieces(cosine, sine, -1.0, cosine, -cosine, sine, -2.0)  # the cosine, mirrored at -1, falls on


class Margin(NamedTuple):
    """All that psi depends on, checked: numbers, 0-d tensors or one value a row."""

    type: MarginType
    margin: float | Tensor
    angle_rad: float | Tensor
    multiplier: float
    beyond_pi: BeyondPi
    straight_through: bool
    similarity: Similarity = Similarity.COSINE  # that it belongs to

    @property
    def is_a_number(self) -> bool:
        """Whether the angle is a number and theta is not multiplied: what the kernels of `contrast` do themselves."""
        return self.multiplier == 1 and not isinstance(self.angle_rad, Tensor)

    def psi(self, u: Tensor) -> Tensor:
        """psi(u) (B,) of the similarities of rows with their own class."""
        if self.type == MarginType.ADDITIVE:
            return u - self.margin
        at = u.detach() if self.straight_through else u
        value = _angular(at, self.angle_rad, self.multiplier, self.beyond_pi)
        if self.type == MarginType.COMBINED:
            value = value - self.margin
        return value + (u - at) if self.straight_through else value


def check_margin(labels: Tensor, weight: Tensor, *options: Any) -> Margin:
    """The options of a margin, those of `check_margin_options`, with one value a row where there is one a class."""
    _, margin, _, angular_margin_rad, *_ = options
    if isinstance(margin, Tensor) or isinstance(angular_margin_rad, Tensor):
        checked = check_margin_options(*options)
        of_row = row_margin("margin", margin, labels, weight)
        if checked.type == MarginType.ANGULAR:
            return checked._replace(angle_rad=of_row)
        angle_rad = row_margin("angular_margin_rad", angular_margin_rad, labels, weight)
        return checked._replace(margin=of_row, angle_rad=angle_rad)
    if torch.compiler.is_compiling():
        return check_margin_options(*options)
    try:
        return _check_once(*options)
    except TypeError:  # of a value without a hash: the check has a better word for it
        return check_margin_options(*options)


def check_margin_options(
    similarity: str | Similarity,
    margin: float | Tensor,
    margin_type: str,
    angular_margin_rad: float | Tensor,
    angular_multiplier: float,
    beyond_pi: str,
    margin_gradient: str,
) -> Margin:
    """The options of a margin, each of a known kind and all together of a kind that exists; no value of a tensor."""
    kind = checks.choice("margin_type", margin_type, MarginType)
    continuation = checks.choice("beyond_pi", beyond_pi, BeyondPi)
    checks.one_of("margin_gradient", margin_gradient, MARGIN_GRADIENTS)
    measure = checks.choice("similarity", similarity, Similarity)
    if kind != MarginType.ADDITIVE and measure != Similarity.COSINE:
        raise ValueError(f"similarity: expected 'cosine' for margin_type {margin_type!r}, got {measure.name.lower()!r}")
    multiplier = checks.number("angular_multiplier", angular_multiplier)
    if not multiplier > 0:
        raise ValueError(f"angular_multiplier: expected a positive number, got {angular_multiplier}")
    numbers = [margin, angular_margin_rad]
    for i, name in enumerate(("margin", "angular_margin_rad")):
        value = numbers[i]
        if isinstance(value, Tensor):
            continue
        numbers[i] = value = checks.number(name, value, "a number or a tensor")
        if (name != "margin" or kind == MarginType.ANGULAR) and not abs(value) <= math.pi:
            raise ValueError(
                f"{name}: expected radians within [-pi, pi], got {value}; degrees become radians by math.radians"
            )
    angular = multiplier != 1 or isinstance(angular_margin_rad, Tensor) or angular_margin_rad != 0
    if angular and kind != MarginType.COMBINED:
        raise ValueError(
            f"angular_margin_rad, angular_multiplier: expected with margin_type 'combined' alone, got {margin_type!r}"
        )
    additive, angle = (0.0, numbers[0]) if kind == MarginType.ANGULAR else numbers
    return Margin(kind, additive, angle, multiplier, continuation, margin_gradient == "straight_through", measure)


_check_once = functools.lru_cache(maxsize=256, typed=True)(check_margin_options)


def row_margin(argument: str, margin: float | Tensor, labels: Tensor, weight: Tensor) -> float | Tensor:
    """A number, 0-d, (C,) or (B, 1) margin as a number, a 0-d or a (B,) tensor; weight (C, D) gives its dtype."""
    if not isinstance(margin, Tensor):
        return checks.number(argument, margin, "a number or a tensor")
    checks.dense(argument, margin)
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
    kind = checks.choice("margin_type", margin_type, MarginType)
    angle = margin if kind == MarginType.ANGULAR else angular_margin_rad
    continuation = checks.choice("beyond_pi", beyond_pi, BeyondPi)
    return Margin(kind, margin, angle, angular_multiplier, continuation, gradient == "straight_through").psi(u)


def _angular(u: Tensor, margin_rad: float | Tensor, multiplier: float, beyond_pi: BeyondPi) -> Tensor:
    """cos(multiplier theta + margin) with a monotone continuation where that angle leaves [0, pi]."""
    if multiplier == 1.0 and not isinstance(margin_rad, Tensor):
        return _shifted_by_a_number(u, float(margin_rad), beyond_pi)
    margin = torch.as_tensor(margin_rad, dtype=u.dtype, device=u.device)
    if multiplier == 1.0:
        shifted = u * torch.cos(margin) - _sine(u) * torch.sin(margin)
        past_pi, before_zero = u < -torch.cos(margin), u > torch.cos(margin)
        past_pi, before_zero = past_pi & (margin > 0), before_zero & (margin < 0)
        beyond = -2 - shifted
        if beyond_pi == BeyondPi.STANDARD:
            beyond = u - margin * torch.sin(margin)
        elif beyond_pi == BeyondPi.EASY:
            beyond, past_pi = u, (u <= 0) & (margin > 0)
    else:
        # |u| = 1 is kept out of acos, whose derivative is infinite there: the gradient is 0 at and beyond it.
        edge = 1 - torch.finfo(u.dtype).eps
        angle = multiplier * torch.acos(u.clamp(-edge, edge)) + margin
        turns = torch.floor(angle / math.pi).detach()  # 0 inside [0, pi)
        shifted = torch.cos(angle)
        past_pi, before_zero = turns > 0, angle < 0
        beyond = torch.where(turns % 2 == 0, shifted, -shifted) - 2 * turns
    # Below 0 the cosine would turn back: a line of slope 1 that meets it at angle 0, theta = -margin / multiplier.
    before = u + 1 - torch.cos(margin / multiplier)
    return torch.where(past_pi, beyond, torch.where(before_zero, before, shifted))


def _shifted_by_a_number(u: Tensor, margin: float, beyond_pi: BeyondPi) -> Tensor:
    """`_angular` of multiplier 1: only one end of [0, pi] can be left, and a small batch is spared half the calls."""
    if margin == 0:
        return u
    cosine, sine = math.cos(margin), math.sin(margin)
    shifted = u * cosine - _sine(u) * sine
    if margin < 0:
        return torch.where(u > cosine, u + (1 - cosine), shifted)
    if beyond_pi == BeyondPi.EASY:
        return torch.where(u <= 0, u, shifted)
    return torch.where(u < -cosine, u - margin * sine if beyond_pi == BeyondPi.STANDARD else -2 - shifted, shifted)


def _sine(u: Tensor) -> Tensor:
    """sin(theta) from u = cos(theta), with gradient 0 at and (by rounding) beyond |u| = 1 instead of infinity."""
    # A number so small is 0 to whatever it is added to, and what is clamped has the gradient 0.
    return ((1 - u) * (1 + u)).clamp(min=torch.finfo(u.dtype).tiny).sqrt()
