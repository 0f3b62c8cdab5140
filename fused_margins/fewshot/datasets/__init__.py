"""Data sets by name: `load` decodes the user's files once, keeps them memory-mapped, and returns a set of each split.

Splits may share their classes (digits) or have classes of their own (the usual few-shot sets); `make_task` sorts out
which is which. sources finds files, cache keeps what was decoded, images holds the result; each data set has a module.
"""

from . import cifar, cub, digits, features, folders, omniglot  # register their loaders
from .images import ImageSet, Task, concatenate, make_task
from .omniglot import OneShotRuns, one_shot_runs
from .registry import DATA_ROOT_VARIABLE, LOADERS, Loader, data_root, is_of_features, load, register

__all__ = [
    "DATA_ROOT_VARIABLE",
    "LOADERS",
    "ImageSet",
    "Loader",
    "OneShotRuns",
    "Task",
    "cifar",
    "concatenate",
    "cub",
    "data_root",
    "digits",
    "features",
    "folders",
    "is_of_features",
    "load",
    "make_task",
    "omniglot",
    "one_shot_runs",
    "register",
]
