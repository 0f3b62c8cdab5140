"""The subcommands: their options as fields, what they do as `main`, which returns the exit code."""

import dataclasses
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro

from . import doctor
from .config import TrainConfig
from .datasets import Task, load, make_task
from .demo import run_demo
from .demo_report import DemoReport
from .errors import UserError
from .evaluation import evaluate
from .interrupts import stop_on_interrupt
from .options import ConfigFlags, LossFlags, LossOptions
from .parity import TOLERANCE, Parity, StepDifference
from .plots import difference_curves, loss_curves
from .report import write_run_report
from .runs import Run, replacing
from .tables import Table
from .terminal import console, progress, say
from .trainer import Trainer, resume, usable_device

INTERRUPTED = 130  # what a shell reports for a command that Ctrl-C ended


def _at_least_1(**options: int) -> None:
    for name, value in options.items():
        if value < 1:
            raise UserError(f"{name}: expected at least 1, got {value}")


@dataclass(frozen=True)
class Demo:
    """Train every loss on real digits, compare them, and write a report with plots: about a minute on two cores."""

    output: Path = Path("runs/demo")
    """Folder of the report; what a former demo left there is replaced."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    """Seeds; all methods are compared on the same ones."""
    epochs: int = 40
    """Epochs of each training."""
    episodes: int = 600
    """Few-shot episodes of each evaluation."""
    workers: int | None = None
    """Trainings at a time; by default as many as cores."""

    def main(self) -> int:
        _at_least_1(episodes=self.episodes, epochs=self.epochs)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"seeds: expected one or more different numbers, got {list(self.seeds)}")
        start = time.perf_counter()
        available = doctor.available_backends("cpu")
        if not available:
            say("only the reference backend is available: the parity part is left out")
        backends = ("reference", available[0]) if available else None
        outcomes = run_demo(
            self.seeds,
            epochs=self.epochs,
            num_episodes=self.episodes,
            backends=backends,
            workers=self.workers,
        )
        report = DemoReport(outcomes, time.perf_counter() - start)
        report.write(self.output)
        report.print(console)
        say(f"{time.perf_counter() - start:.0f} s; report: {self.output / 'report.md'}")
        return 0


@dataclass(frozen=True)
class Train:
    """Train a network, evaluate it, and keep everything in a run folder. Ctrl-C stops it so that --resume can go on."""

    output: Path | None = None
    """Run folder; by default runs/DATASET-LOSS-seedSEED."""
    resume: bool = False
    """Continue the run in its folder where it stopped, with its stored settings, to the numbers it would have had."""
    episodes: int = 600
    """Few-shot episodes of the evaluation."""
    loss: LossFlags = field(default_factory=LossOptions)
    config: ConfigFlags = field(default_factory=TrainConfig)

    def settings(self) -> TrainConfig:
        return self.loss.apply(self.config)

    def folder(self) -> Path:
        config = self.settings()
        return self.output or Path("runs") / f"{config.dataset}-{config.loss.name}-seed{config.seed}"

    def main(self) -> int:
        _at_least_1(episodes=self.episodes)
        config, folder = self.settings(), self.folder()
        # Stored with the run, because a resumed run has the same numbers only with as many threads.
        threads = config.threads or torch.get_num_threads()
        config = config.model_copy(update={"threads": threads})
        torch.set_num_threads(threads)
        task = make_task(load(config.dataset), config.classes)
        if self.resume:
            run = Run(folder)
            trainer = resume(run, task.training)
        else:
            trainer = Trainer(config, task.training)
            run = Run.create(folder, config)
        name = f"{config.loss.name} on {config.dataset}"
        with (
            progress(name, trainer.total_steps, "steps", completed=trainer.steps_done) as advance,
            stop_on_interrupt() as stop,
        ):
            complete = trainer.train(run, stop, advance)
        if not complete:
            say(f"stopped in epoch {trainer.epoch}; continue with: fused-margins train --resume --output {folder}")
            return INTERRUPTED
        _evaluate(run, trainer, task, self.episodes, seed=0)
        return 0


@dataclass(frozen=True)
class Evaluate:
    """Evaluate a run's latest checkpoint and write its report."""

    run: tyro.conf.Positional[Path]
    """Run folder."""
    episodes: int = 600
    """Few-shot episodes for each number of shots."""
    seed: int = 0
    """Seed of clusters and episodes."""

    def main(self) -> int:
        _at_least_1(episodes=self.episodes)
        run = Run(self.run)
        config = run.config()
        task = make_task(load(config.dataset), config.classes)
        trainer = Trainer(config, task.training)
        run.load_checkpoint(trainer.load_state_dict)
        _evaluate(run, trainer, task, self.episodes, self.seed)
        return 0


def _evaluate(run: Run, trainer: Trainer, task: Task, num_episodes: int, seed: int) -> None:
    figures = evaluate(trainer, task, num_episodes=num_episodes, seed=seed)
    console.print(write_run_report(run, trainer, task, figures).rich())
    say(f"report: {run.folder / 'report.md'}")


@dataclass(frozen=True)
class ParityCommand:
    """Train the same network on two backends and report how far loss and gradients differ at each step.

    The exit code is 1 where a difference at equal weights exceeds the tolerance.
    """

    backends: tuple[str, str] = ("reference", "cpu")
    """The two backends; differences are relative to the first."""
    steps: int = 200
    """Steps to compare (fewer if the training is shorter)."""
    tolerance: float = TOLERANCE
    """Largest relative difference of loss and gradients at equal weights."""
    output: Path = Path("runs/parity")
    """Folder for parity.jsonl and the plots."""
    loss: LossFlags = field(default_factory=LossOptions)
    config: ConfigFlags = field(default_factory=TrainConfig)

    def main(self) -> int:
        _at_least_1(steps=self.steps)
        config = self.loss.apply(self.config)
        parity = Parity(config, make_task(load(config.dataset), config.classes).training, self.backends)
        num_steps = min(self.steps, parity.first.total_steps)
        differences: list[StepDifference] = []
        with progress(f"{config.loss.name} on {config.dataset}", num_steps, "steps") as advance:
            for difference in parity.steps(num_steps):
                differences.append(difference)
                advance()
        with replacing(self.output / "parity.jsonl") as temporary:
            lines = (json.dumps(dataclasses.asdict(d)) + "\n" for d in differences)
            temporary.write_text("".join(lines), encoding="utf-8")
        curves = {
            "loss": [d.loss_difference for d in differences],
            "gradients": [d.gradient_difference for d in differences],
            "loss of separate runs": [d.drift for d in differences],
        }
        difference_curves(self.output / "parity.png", curves, self.tolerance)
        loss_curves(
            self.output / "loss.png", {config.loss.name: dict(zip(self.backends, parity.losses))}, x_label="step"
        )
        worst = max(differences, key=lambda d: max(d.loss_difference, d.gradient_difference))
        largest = max(worst.loss_difference, worst.gradient_difference)
        rows = [[name, f"{max(values):.1e}", f"{values[-1]:.1e}"] for name, values in curves.items()]
        title = f"{config.loss.name} on {config.dataset}: {' and '.join(self.backends)}, {len(differences)} steps"
        console.print(Table(title, ["relative difference", "largest", "at the last step"], rows).rich())
        verdict = "within" if largest <= self.tolerance else "BEYOND"
        say(
            f"{verdict} the tolerance of {self.tolerance:g}: {largest:.1e} at step {worst.step} "
            f"({worst.worst_parameter}); details: {self.output}{os.sep}"
        )
        return 0 if largest <= self.tolerance else 1


@dataclass(frozen=True)
class Doctor:
    """Show versions, compiler and backends, and check every available backend against the reference (ten seconds)."""

    device: str = "cpu"
    """Device to check: cpu or cuda."""

    def main(self) -> int:
        usable_device(self.device)
        console.print(doctor.environment_table().rich())
        console.print(doctor.backends_table(self.device).rich())
        table, agrees = doctor.self_check(self.device)
        console.print(table.rich())
        return 0 if agrees else 1
