"""The subcommands, a file a kind: their options as fields, what they do as `main`, which returns the exit code."""

from .compare import Compare
from .data import Data
from .doctor import Doctor
from .embed import Embed
from .studies import CoarseToFine, Demo, Heads, MagnetStudy, OneShot, ParityCommand, Reproduce, Sweep
from .train import Evaluate, Train

__all__ = [
    "CoarseToFine",
    "Compare",
    "Data",
    "Demo",
    "Doctor",
    "Embed",
    "Heads",
    "Evaluate",
    "MagnetStudy",
    "OneShot",
    "ParityCommand",
    "Reproduce",
    "Sweep",
    "Train",
]
