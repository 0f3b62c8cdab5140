"""Loss, learning rate and figures of a run for TensorBoard, below `<run>/tensorboard`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import UserError


def summary_writer() -> Any:
    """torch's class that writes the events; UserError where the package `tensorboard` is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(f"tensorboard: {error}; install it with: pip install tensorboard") from None
    return SummaryWriter


class TensorboardLog:
    """Writes scalars of a run; a resumed run replaces the points from its first step on, so that none is there twice.

    Args:
        folder: of the run; events go into its subfolder `tensorboard`.
        steps_done: steps that the run has behind it, 0 for a new one.

    Raises:
        UserError: the package `tensorboard` is not installed.
    """

    def __init__(self, folder: Path, steps_done: int = 0) -> None:
        self._events, self._steps_done, self._new_writer = str(folder / "tensorboard"), steps_done, summary_writer()
        self._writer: Any = None

    def step(self, step: int, loss: float, learning_rate: float) -> None:
        """The loss of step 0, 1, ... and the learning rate that it was taken with."""
        self._add("train/loss", loss, step)
        self._add("train/learning_rate", learning_rate, step)

    def figures(self, step: int, figures: Mapping[str, float | None]) -> None:
        """What the evaluation found after so many steps; figures without a value are left out."""
        for name, value in figures.items():
            if value is not None:
                self._add(f"evaluation/{name}", value, step)

    def close(self) -> None:
        """Write what is left; a log that is not closed may lose its last two minutes."""
        if self._writer is not None:
            self._writer.close()

    def _add(self, name: str, value: float, step: int) -> None:
        if self._writer is None:  # not before: a command that is refused must not purge the points of the run there
            self._writer = self._new_writer(self._events, purge_step=self._steps_done)
        self._writer.add_scalar(name, value, step)


@contextmanager
def tensorboard_log(folder: Path, steps_done: int = 0) -> Iterator[TensorboardLog]:
    """A `TensorboardLog` that is closed at the end of the block, whatever ended it."""
    log = TensorboardLog(folder, steps_done)
    try:
        yield log
    finally:
        log.close()
