"""One training from its settings to its figures, in a folder of its own; a study repeats it."""

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .config import Judging, Loss, TrainConfig, contradictions
from .datasets import Task, load, make_task
from .evaluation import check_judging, evaluate
from .optimization import stopped_early
from .process import PeakMemory, check_threads, set_threads, stop_on_interrupt
from .runs import Run, plain
from .terminal import UserError
from .trainer import Trainer, resume


def task_of(config: TrainConfig) -> Task:
    """What a run with these settings trains on and is judged on."""
    task = make_task(load(config.dataset, image_size=config.image_size), config.classes, config.held_out)
    if config.validation_episodes and task.for_validation is None:
        raise UserError(
            f"validation_episodes: {config.dataset} has neither validation classes nor held-out images (held_out keeps "
            "some)"
        )
    return task


class Job(ABC):
    """What a study has done, in a folder of its own: a training, or another measurement as `config` says."""

    config: TrainConfig

    @property
    @abstractmethod
    def name(self) -> str:
        """Of its folder."""

    @property
    def work(self) -> int:
        """How much there is to do; a training counts its epochs."""
        return 1

    def progress(self, folder: Path) -> int:
        """How much of `work` is done."""
        return self.work if self.finished(folder) else 0

    @abstractmethod
    def finished(self, folder: Path) -> bool:
        """Whether the folder has the results of these very settings."""

    @abstractmethod
    def check(self, folder: Path, task: Task) -> None:
        """Raise what `carry_out` would raise before its first step; nothing is written."""

    @abstractmethod
    def carry_out(self, folder: Path) -> None:
        """Do it, from where the folder has come to; KeyboardInterrupt if a signal stopped it, all saved."""


@dataclass(frozen=True)
class Trial(Job):
    """A training within a study. Trials of one `group` differ in nothing but the seed."""

    group: str
    config: TrainConfig
    judging: Judging = field(default_factory=Judging)

    @property
    def name(self) -> str:
        """
        >>> Trial("margin -0.3, dot", TrainConfig(seed=2)).name
        'margin--0.3-dot-seed2'
        """
        return f"{re.sub(r'[^A-Za-z0-9.+-]+', '-', self.group).strip('-')}-seed{self.config.seed}"

    @property
    def work(self) -> int:
        return self.config.epochs

    def progress(self, folder: Path) -> int:
        return min(self.work, Run(folder).epochs_logged())

    def finished(self, folder: Path) -> bool:
        stored = Run(folder).result()
        wanted = (plain(self.config), plain(self.judging), self.config.epochs)
        return (stored.get("config"), stored.get("judging"), stored.get("epochs")) == wanted

    def check(self, folder: Path, task: Task) -> None:
        run = Run(folder)
        self._check_settings(run, task)
        trainer = Trainer(self.config, task.training, task.for_validation)
        if run.checkpoint_path.exists():
            run.load_checkpoint(trainer.load_state_dict)

    def _check_settings(self, run: Run, task: Task) -> None:
        check_threads(self.config.threads)
        check_judging(task, self.judging, self.config.dataset)
        changed = contradictions(run.config(), self.config) if run.config_path.exists() else []
        if changed:
            raise UserError(f"output: it holds a run of other settings, {', '.join(changed)}: choose another folder")

    def carry_out(self, folder: Path) -> None:
        with Run(folder).locked() as run:
            set_threads(self.config.threads)
            task = task_of(self.config)
            self._check_settings(run, task)
            if run.checkpoint_path.exists():
                trainer = resume(run, task.training, task.for_validation)
            else:
                trainer = Trainer(self.config, task.training, task.for_validation)
                run.save_config(self.config)
            with stop_on_interrupt() as stop:
                train(run, trainer, stop)
            if stop():
                raise KeyboardInterrupt
            judge(run, trainer, task, self.judging)


def trials_of(config: TrainConfig, losses: Mapping[str, Loss], seeds: Sequence[int], judging: Judging) -> list[Trial]:
    """The same training with every loss, a group each, and with every seed."""
    return [Trial(name, config.but(loss=loss, seed=seed), judging) for seed in seeds for name, loss in losses.items()]


def train(run: Run, trainer: Trainer, stop: Callable[[], bool], advance: Callable[[], None] = lambda: None) -> bool:
    """Train to the end or until `stop()`; what it took is added up in the run's folder, over all resumptions."""
    start, before = time.perf_counter(), run.usage()
    memory = PeakMemory(trainer.device)
    try:
        return trainer.train(run, stop, advance)
    finally:
        seconds = before.get("seconds", 0.0) + time.perf_counter() - start
        run.save_usage({"seconds": seconds, "peak_mib": max(before.get("peak_mib", 0.0), memory.mib())})


def judge(run: Run, trainer: Trainer, task: Task, judging: Judging) -> dict[str, float]:
    """Evaluate a trained network and store its figures, and how they were found, with the run."""
    figures = evaluate(trainer, task, judging)
    run.save_judging(judging)
    result: dict[str, Any] = {
        "config": plain(trainer.config),
        "judging": plain(judging),
        "figures": figures,
        "epochs": trainer.epoch,
        **run.usage(),
    }
    if trainer.config.validation_episodes:
        result["stopped_early"] = stopped_early(trainer.history)
    run.save_result(result)
    return figures
