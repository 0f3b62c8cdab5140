"""Loss, learning rate and figures of a run for TensorBoard, below `<run>/tensorboard`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from .errors import UserError


class TensorboardLog:
    """Writes scalars of a run; a resumed run replaces the points from its first step on, so that none is there twice.

    Args:
        folder: of the run; events go into its subfolder `tensorboard`.
        steps_done: steps that the run has behind it, 0 for a new one.

    Raises:
        UserError: the package `tensorboard` is not installed.
    """

    def __init__(self, folder: Path, steps_done: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(f"tensorboard: {error}; install it with: pip install tensorboard") from None
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=steps_done)

    def step(self, step: int, loss: float, learning_rate: float) -> None:
        """The loss of step 0, 1, ... and the learning rate that it was taken with."""
        self._writer.add_scalar("train/loss", loss, step)
        self._writer.add_scalar("train/learning_rate", learning_rate, step)

    def figures(self, step: int, figures: Mapping[str, float | None]) -> None:
        """What the evaluation found after so many steps; figures without a value are left out."""
        for name, value in figures.items():
            if value is not None:
                self._writer.add_scalar(f"evaluation/{name}", value, step)

    def close(self) -> None:
        """Write what is left; a log that is not closed may lose its last two minutes."""
        self._writer.close()


@contextmanager
def tensorboard_log(folder: Path, steps_done: int = 0) -> Iterator[TensorboardLog]:
    """A `TensorboardLog` that is closed at the end of the block, whatever ended it."""
    log = TensorboardLog(folder, steps_done)
    try:
        yield log
    finally:
        log.close()
