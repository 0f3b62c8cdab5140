"""A margin on the angle, as what a kernel needs of it: psi(u) = cos(theta + angle), u = cos(theta), in two pieces."""

import functools
import math
from typing import NamedTuple

from ...margins import BEYOND_PI
from .. import checks


class Pieces(NamedTuple):
    """With s = sin(theta) = sqrt(1 - u^2):

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
def pieces(angle_rad: float, beyond_pi: str) -> Pieces:
    """Those of `fused_margins.margins.apply_margin`, margin type "angular"."""
    cosine, sine = math.cos(angle_rad), math.sin(angle_rad)
    if angle_rad == 0:
        return Pieces(1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0)
    if angle_rad < 0:  # below angle 0: a line of slope 1 that meets the cosine where it is 1
        return Pieces(cosine, sine, 1.0, cosine, 1.0, 0.0, 1 - cosine)
    if beyond_pi == "easy":  # u as it is where u <= 0: the bound is a number next to 0 that no processor takes for 0
        return Pieces(cosine, sine, -1.0, -(2.0**-126), 1.0, 0.0, 0.0)
    if beyond_pi == "standard":  # beyond angle pi: ArcFace's line
        return Pieces(cosine, sine, -1.0, cosine, 1.0, 0.0, -angle_rad * sine)
    return Pieces(cosine, sine, -1.0, cosine, -cosine, sine, -2.0)  # the cosine, mirrored at -1, falls on


def check_angle(angle_rad: float, beyond_pi: str, straight_through: bool, similarity: str) -> None:
    """The angle is a number; one of cosines."""
    if not isinstance(straight_through, bool):
        raise TypeError(f"straight_through: expected True or False, got {straight_through!r}")
    checks.number("angle_rad", angle_rad)
    checks.choice("beyond_pi", beyond_pi, BEYOND_PI)
    if not abs(angle_rad) <= math.pi:
        raise ValueError(f"angle_rad: expected radians within [-pi, pi], got {angle_rad}")
    if angle_rad != 0 and similarity != "cosine":
        raise ValueError(f"similarity: expected 'cosine' with an angle_rad, got {similarity!r}")
