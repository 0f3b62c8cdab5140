"""One training run: a step, an epoch, everything that a checkpoint needs, and the loop that survives an interrupt."""

import math
import os
import textwrap
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..backends import registry
from .augment import augment
from .backbones import Network
from .config import TrainConfig, contradictions
from .datasets import ImageSet
from .objectives import Batch, build_objective, calls_of, problems
from .optimization import Validation, build_optimizer, build_scheduler, check_moments, set_step
from .process import average_statistics, check_share, embed_share, replica, together
from .runs import Run, plain
from .terminal import UserError

EMBEDDED = 128  # images at a time, where nothing is trained
CHECKPOINT_SECONDS = 10.0  # at most this much work is lost to a power cut; an interrupt loses none


class Trainer:
    """Trains a network on `images` as `config` says; the same config and images give the same numbers.

    Where the config asks for it, `validation` is judged after every epoch, which leaves everything else as it is.

    All that is random, batches, augmentation, mining and dropped features, comes from one generator on the CPU; the
    initial weights come from the seed. So two trainers can take turns in one process, and none disturbs its host.
    """

    def __init__(self, config: TrainConfig, images: ImageSet, validation: ImageSet | None = None) -> None:
        self.config, self.device = config, usable_device(config.device)
        self.images = images.to(self.device)
        self.validate = None
        if config.validation_episodes and validation is not None:
            self.validate = Validation(validation, config.validation_episodes)
        self.checksum: int | None = None  # of the images, once it is asked for
        self.generator = torch.Generator().manual_seed(config.seed)
        labels = images.targets(config.labels)
        num_classes = len(images.class_names if config.labels == "fine" else images.coarse_names)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)  # not torch.manual_seed: that would seed GPUs as well
            channels, height, width = images.shape
            _check_augmentation(config, height, width)
            _check_memory(config, images.shape, self.device)
            self.model = Network(channels, (height, width), config.backbone).to(self.device)
            size = self.model.embedding_size
            _check_backend(config, num_classes, size)
            self.objective = build_objective(config, size, labels, num_classes, self.generator).to(self.device)
            with torch.no_grad():
                next(self.model.parameters()).mul_(1 + config.perturbation)
        check_share(config.batch_size)
        self.replica = replica(self.model)
        if config.backbone.standardize:
            self.model.set_pixel_statistics(*_pixel_statistics(images))
        self.optimizer = build_optimizer(config, [*self.model.parameters(), *self.objective.parameters()])
        self.scheduler = build_scheduler(config, self.optimizer, self.objective.steps_before)
        self.total_steps = self.objective.steps_before(config.epochs)
        self.epoch = 0  # epochs completed
        self.losses: list[float] = []  # of the epoch in hand
        self.history: list[dict[str, Any]] = []  # a row for each completed epoch
        self.latest = (math.nan, math.nan)  # loss and learning rate of the step just done

    @property
    def finished(self) -> bool:
        return self.epoch >= self.config.epochs

    @property
    def steps_done(self) -> int:
        return self.objective.steps_before(self.epoch) + len(self.losses)

    def embed(self, images: ImageSet) -> Tensor:
        """Embeddings (N, D) of images as they are, with the network in evaluation mode; `UserError` if not finite."""
        return self._embed(images.pixels(slice(i, i + EMBEDDED)) for i in range(0, len(images), EMBEDDED))

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """Embeddings (N, D) of float images (N, channels, height, width) in [0, 1], in evaluation mode."""
        return self._embed([pixels])

    def _embed(self, parts: Iterable[Tensor]) -> Tensor:
        self.model.eval()
        with torch.no_grad():
            embeddings = torch.cat([self.model(part.to(self.device)) for part in parts])
        self.model.train()
        if not _all_usable(embeddings):
            raise self._diverged("embeddings that are not finite")
        return embeddings

    def next_batch(self) -> tuple[Tensor, Batch]:
        """Augmented images, and what the objective knows of them; begins an epoch where one is due."""
        if not self.losses:
            self.objective.start_epoch(self.epoch, lambda: self.embed(self.images))
        batch = self.objective.next_batch()
        images = self.images.pixels(batch.indices).to(self.device)
        if self.images.are_features:
            return images, batch
        return augment(images, self.config.augmentation, self.generator), batch

    def loss_and_gradients(self, images: Tensor, batch: Batch) -> Tensor:
        """The loss of a batch, NaN where embeddings are not finite; its gradients are left in the parameters."""
        self.optimizer.zero_grad()
        embeddings = embed_share(self.replica, images, self._drop_generator())
        loss = self.objective(embeddings, batch)
        loss.backward()
        average_statistics(self.model)
        # Whatever a loss makes of such embeddings. Told by the loss, which is read anyway: no other wait for a GPU.
        return torch.where(_all_usable(embeddings.detach()), loss.detach(), math.nan)

    def _drop_generator(self) -> torch.Generator | None:
        """For the features that the network drops in this step: where they are, and seeded from the run's generator."""
        if self.config.backbone.drop_rate == 0:
            return None
        seed = torch.randint(2**63 - 1, (), generator=self.generator)
        return torch.Generator(self.device).manual_seed(int(seed))

    def update(self, loss: Tensor) -> float:
        """Apply the gradients that `loss_and_gradients` left; a completed epoch adds its row to `history`."""
        value = float(loss)
        if not math.isfinite(value):
            raise self._diverged(f"loss {value}")
        learning_rate = float(self.scheduler.get_last_lr()[0])
        self.optimizer.step()
        self.scheduler.step()
        self.losses.append(value)
        self.latest = (value, learning_rate)
        if len(self.losses) == self.objective.num_batches(self.epoch):
            self._check_weights()  # running variances overflow unseen by a training step
            mean = sum(self.losses) / len(self.losses)
            row = {"epoch": self.epoch, "loss": mean, "learning_rate": learning_rate}
            if self.validate is not None:
                row["validation"] = self.validate(self.embed)
            self.history.append(row)
            self.epoch, self.losses = self.epoch + 1, []
        return value

    def _diverged(self, what: str) -> UserError:
        return UserError(
            f"training diverged: {what} in epoch {self.epoch}, batch {len(self.losses)}; try a lower learning rate"
        )

    def _check_weights(self) -> None:
        weights = [*self.model.state_dict().values(), *self.objective.parameters()]
        if not torch.stack([weight.isfinite().all() for weight in weights]).all():
            raise self._diverged("weights that are not finite")

    def _save(self, run: Run) -> None:
        """A checkpoint, unless the network is dead: the one before it may not be."""
        self._check_weights()
        run.save_checkpoint(self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on, its settings, and the checksum of the images."""
        if self.checksum is None:
            self.checksum = self.images.checksum()
        return {
            "config": plain(self.config),
            "images": self.checksum,
            "model": self.model.state_dict(),
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "epoch": self.epoch,
            "losses": list(self.losses),
            "history": list(self.history),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state; ValueError where it is not one of a run like this."""
        missing = self.state_dict().keys() - (state.keys() if isinstance(state, dict) else set()) - {"config"}
        if missing:
            raise ValueError(f"it does not hold {', '.join(sorted(missing))}")
        if "config" in state:  # an earlier version left it out
            changed = contradictions(TrainConfig.model_validate(state["config"]), self.config)
            if changed:
                raise UserError(f"it was trained with {', '.join(changed)} as config.json has it now")
        if state["images"] != self.checksum:
            raise UserError(
                f"dataset: {self.config.dataset} holds other images or labels than when this run began; start a new one"
            )
        epoch, history, losses = state["epoch"], state["history"], state["losses"]
        if not (isinstance(epoch, int) and 0 <= epoch <= self.config.epochs and len(history) == epoch):
            raise ValueError(f"expected an epoch up to {self.config.epochs} and a history of as many, got {epoch!r}")
        columns = {"epoch", "loss", "learning_rate", *(["validation"] if self.config.validation_episodes else [])}
        if not all(row.keys() == columns for row in history):
            raise ValueError(f"expected a history of {', '.join(sorted(columns))}")
        numbers = [*losses, *(row[column] for row in history for column in columns - {"epoch"})]
        if not all(isinstance(number, float) and math.isfinite(number) for number in numbers):
            raise ValueError("expected losses and learning rates that are finite numbers")
        if epoch < self.config.epochs and len(losses) >= self.objective.num_batches(epoch):
            raise ValueError(f"expected fewer than the {self.objective.num_batches(epoch)} losses of an epoch")
        for part in ("model", "objective"):
            for name, value in state[part].items():
                if isinstance(value, Tensor) and not value.isfinite().all():
                    raise ValueError(f"{name} holds numbers that are not finite")
        moments = state["optimizer"]["state"]
        check_moments(moments, self.optimizer)
        self.model.load_state_dict(state["model"])
        self.objective.load_state_dict(state["objective"])
        # Its settings are those of the configuration, or follow from the step.
        settings = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": settings})
        self.generator.set_state(state["generator"])
        self.epoch, self.losses, self.history = epoch, list(losses), list(history)
        set_step(self.scheduler, self.steps_done)

    def mirror(self, other: "Trainer") -> None:
        """Take over the weights and the random state of another trainer, so that its batch gives the same loss here."""
        self.generator.set_state(other.generator.get_state())
        self.model.load_state_dict(other.model.state_dict())
        self.objective.load_state_dict(other.objective.state_dict())

    def train(
        self,
        run: Run | None = None,
        stop: Callable[[], bool] = lambda: False,
        on_step: Callable[[], None] = lambda: None,
    ) -> bool:
        """Train to the end, or until `stop()` after a step: True if complete. `run` keeps it resumable throughout."""
        if run is not None:
            self._save(run)  # resumable from the first step on
        saved, stop = time.monotonic(), together(stop, self.device)
        while not self.finished and not stop():
            epoch = self.epoch
            self.update(self.loss_and_gradients(*self.next_batch()))
            on_step()
            if run is not None and self.epoch > epoch:
                run.append_metrics(self.history[-1])
            if run is not None and time.monotonic() - saved > CHECKPOINT_SECONDS:
                self._save(run)
                saved = time.monotonic()
        if run is not None:
            self._save(run)
        return self.finished


def resume(run: Run, images: ImageSet, validation: ImageSet | None = None) -> Trainer:
    """A trainer that goes on where the run stopped; a damaged checkpoint leaves the folder untouched."""
    trainer = read(run, images, validation)
    run.write_metrics(trainer.history)
    return trainer


def read(run: Run, images: ImageSet, validation: ImageSet | None = None) -> Trainer:
    """A trainer in the state of the run's checkpoint; nothing is written."""
    trainer = Trainer(run.config(), images, validation)
    run.load_checkpoint(trainer.load_state_dict)
    return trainer


def usable_device(name: str) -> torch.device:
    """The device of this name, if tensors can live and be read there."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = textwrap.shorten(str(error).splitlines()[0], 200, placeholder="...")
        raise UserError(f"device: {name!r} cannot be used: {reason}") from None
    return device


def _all_usable(embeddings: Tensor) -> Tensor:
    """Whether all embeddings, and their squared distances, are finite: a bool (0-d) on their device."""
    return (4 * embeddings.square().sum(1)).isfinite().all()


def _pixel_statistics(images: ImageSet, at_once: int = 1024) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (channels,) of all pixels."""
    channels, height, width = images.shape
    count = len(images) * height * width
    sums = squares = torch.zeros(channels, dtype=torch.float64)
    for start in range(0, len(images), at_once):
        pixels = images.pixels(slice(start, start + at_once)).double()
        sums, squares = sums + pixels.sum(dim=(0, 2, 3)), squares + pixels.square().sum(dim=(0, 2, 3))
    mean = sums / count
    # A channel of one colour has no deviation: half a grey level keeps it finite.
    std = (squares / count - mean.square()).clamp(min=0).sqrt().clamp(min=0.5 / 255)
    return mean, std


def _check_backend(config: TrainConfig, num_classes: int, width: int) -> None:
    """Refuse an unknown or unavailable backend before anything is trained or written."""
    for problem in problems(calls_of(config.loss), config.device, config.batch_size, num_classes, width):
        try:
            registry.resolve(config.backend, problem)
        except (ValueError, RuntimeError) as error:
            raise UserError(str(error)) from None


def _check_augmentation(config: TrainConfig, height: int, width: int) -> None:
    padding = config.augmentation.crop_padding
    if padding >= min(height, width):
        raise UserError(f"crop_padding: expected fewer than the {min(height, width)} pixels of a side, got {padding}")


def _check_memory(config: TrainConfig, shape: tuple[int, int, int], device: torch.device) -> None:
    """Refuse weights for which this machine has not the memory, before any of it is asked for."""
    channels, height, width = shape
    try:
        with torch.device("meta"):
            network = Network(channels, (height, width), config.backbone)
    except (RuntimeError, OverflowError):  # sizes that no tensor can have
        raise UserError(f"channels: no memory holds a {config.backbone.title}") from None
    numbers = 4 * sum(p.numel() for p in network.parameters())  # weights, gradients, and the two moments of Adam
    numbers += getattr(config.loss, "memory", 0) * network.embedding_size
    there = _memory_bytes(device)
    if 4 * numbers > there:
        raise UserError(
            f"channels, embedding_size, memory: {4 * numbers / 2**30:,.0f} GiB are needed to train these weights, "
            f"{device} has {there / 2**30:,.0f} GiB"
        )


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**63
