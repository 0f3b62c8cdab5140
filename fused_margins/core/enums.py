"""Options as small integers: a user writes their names, everything below the public door passes the numbers on."""

from enum import IntEnum
from typing import TypeVar

E = TypeVar("E", bound="Option")


class Option(IntEnum):
    """One of a few choices. A user calls it by its name in lower case."""

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """What a user may write."""
        return tuple(member.name.lower() for member in cls)


class Similarity(Option):
    """What an entry of the similarity matrix is; see `fused_margins.core.similarity`."""

    COSINE = 0
    DOT = 1
    NEGATIVE_SQUARED_EUCLIDEAN = 2


class Relation(Option):
    """Which columns a row admits: those whose label is another one, the same one, or any."""

    DIFFERENT = 0
    SAME = 1
    ANY = 2


class Reduction(Option):
    """What becomes of the losses of a batch."""

    MEAN = 0
    SUM = 1
    NONE = 2


class MarginType(Option):
    """What psi does to the similarity of a row with its own class; see `fused_margins.core.margins`."""

    ADDITIVE = 0
    ANGULAR = 1
    COMBINED = 2


class BeyondPi(Option):
    """How psi goes on where angle and margin together exceed pi."""

    STANDARD = 0
    CONTINUOUS = 1
    EASY = 2
