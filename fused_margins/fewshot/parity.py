"""Two backends on one training run: what differs at each step, and what that difference grows into."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..doctor import relative_difference
from .config import TrainConfig
from .datasets import ImageSet
from .errors import UserError
from .trainer import Trainer


@dataclass(frozen=True)
class StepDifference:
    """One step. The differences are relative; see `relative_difference`."""

    step: int
    loss: float  # of the first backend
    loss_difference: float  # same weights, same batch
    gradient_difference: float  # same weights, same batch; largest over the parameters
    worst_parameter: str
    own_loss: float  # of the second backend's own model
    drift: float  # between the losses of the two models, each trained on its own backend from the first step

    @property
    def largest(self) -> float:
        return max(self.loss_difference, self.gradient_difference)


class Parity:
    """Models with the same seed, trained side by side on two backends.

    Two questions are kept apart. *Does the kernel compute the same?* At each step the second backend is also given the
    very weights, batch and random state of the first; loss and gradients must then agree. *What becomes of the
    rounding?* The second model trains on its own from the first step; its distance (`drift`) grows as that of any two
    runs whose arithmetic differs in the last bit, and is reported without a limit.

    Args:
        config: the run; its `backend` is not used.
        images: the training set.
        backends: names of the first and the second backend.
    """

    def __init__(self, config: TrainConfig, images: ImageSet, backends: Sequence[str] = ("reference", "cpu")) -> None:
        if len(backends) != 2:
            raise UserError(f"backends: expected two names, got {list(backends)}")
        configs = [config.model_copy(update={"backend": backend}) for backend in backends]
        self.first, self.second = (Trainer(c, images) for c in configs)
        self._probe = Trainer(configs[1], images)

    def steps(self, num_steps: int | None = None) -> Iterator[StepDifference]:
        """Train for `num_steps`, or to the end."""
        total = self.first.total_steps
        for step in range(total if num_steps is None else min(num_steps, total)):
            images, batch = self.first.next_batch()
            self._probe.mirror(self.first)
            loss = self.first.loss_and_gradients(images, batch)
            same = self._probe.loss_and_gradients(images, batch)
            own = self.second.loss_and_gradients(*self.second.next_batch())
            worst, gradient_difference = self._compare_gradients()
            yield StepDifference(
                step,
                float(loss),
                relative_difference(loss, same),
                gradient_difference,
                worst,
                float(own),
                relative_difference(loss, own),
            )
            if loss.isfinite() and not own.isfinite():
                return  # the drift says it: there is nothing to go on with
            self.first.update(loss)
            self.second.update(own)

    def _compare_gradients(self) -> tuple[str, float]:
        """The parameter whose gradients differ most, and by how much."""
        differences = {
            name: relative_difference(a, b)
            for (name, a), (_, b) in zip(_gradients(self.first), _gradients(self._probe))
        }
        worst = max(differences, key=lambda name: differences[name])
        return worst, differences[worst]


def _gradients(trainer: Trainer) -> Iterator[tuple[str, Tensor]]:
    for owner in (trainer.model, trainer.objective):
        for name, parameter in owner.named_parameters():
            yield name, torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
