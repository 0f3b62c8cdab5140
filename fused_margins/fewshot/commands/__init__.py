"""The subcommands: their options as fields, what they do as `main`.

Each imports within `main` what is slow to import: no help waits for it.
"""

from .data import Compare, Data, Doctor, Embed
from .studies import CoarseToFine, Demo, Heads, MagnetStudy, OneShot, ParityCommand, Reproduce, Sweep
from .train import Evaluate, Train

__all__ = [
    "CoarseToFine",
    "Compare",
    "Data",
    "Demo",
    "Doctor",
    "Embed",
    "Evaluate",
    "Heads",
    "MagnetStudy",
    "OneShot",
    "ParityCommand",
    "Reproduce",
    "Sweep",
    "Train",
]
