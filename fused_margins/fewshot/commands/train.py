"""`fused-margins train` and `fused-margins evaluate`."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from .. import ranks
from ..config import Judging, TrainConfig
from ..datasets import Task
from ..errors import UserError
from ..evaluation import check_judging
from ..interrupts import stop_on_interrupt
from ..jobs import set_threads
from ..options import ConfigFlags, JudgingFlags, LossFlags, LossOptions, as_file_name, on_features
from ..plan import estimate, plan_table
from ..report import write_run_report
from ..runs import Run
from ..terminal import INTERRUPTED, console, progress, say
from ..trainer import Trainer, read, resume
from ..trials import judge, task_of, train


@dataclass(frozen=True)
class Train:
    """Train a network, evaluate it, and keep everything in a run folder. Ctrl-C stops it so that --resume can go on."""

    preset: str | None = None
    """Settings of a paper on a data set, neg-cosine-omniglot for instance; every other option overrides them."""
    output: Path | None = None
    """Run folder; by default runs/DATASET-LOSS-seedSEED, or runs/PRESET-seedSEED."""
    resume: bool = False
    """Continue the run in its folder where it stopped, with its stored settings, to the numbers it would have had."""
    dry_run: bool = False
    """Say what would be trained, and how long it would take, and do nothing."""
    features: Path | None = None
    """Train on these features of images instead of a data set: what `fused-margins embed` writes, or .npy, .npz."""
    loss: LossFlags = field(default_factory=LossOptions)
    judging: JudgingFlags = field(default_factory=Judging)
    config: ConfigFlags = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.resume and self.dry_run:
            raise UserError("dry_run: it describes a training that has not begun; leave out --resume")

    def settings(self) -> TrainConfig:
        return on_features(self.loss.apply(self.config), self.features)

    def folder(self) -> Path:
        if self.output is not None:
            return self.output
        config = self.settings()
        name = self.preset or f"{as_file_name(config.dataset)}-{config.loss.name}"
        return Path("runs") / f"{name}-seed{config.seed}"

    def main(self) -> int:
        with ranks.joined(self.config.device):
            return self._main()

    def _main(self) -> int:
        config, folder = self.settings(), self.folder()
        # Stored with the run, because a resumed run has the same numbers only with as many threads.
        config = config.model_copy(update={"threads": set_threads(config.threads)})
        task = task_of(config)
        check_judging(task, self.judging, config.dataset)
        if self.dry_run:
            trainer = Trainer(config, task.training)
            console.print(plan_table(trainer, task, folder, estimate(trainer)).rich())
            return 0
        # What may fail comes first, and then leaves no folder.
        new = None if self.resume else Trainer(config, task.training, task.for_validation)
        if ranks.own_rank() > 0:
            return self._follow(new or read(Run(folder), task.training, task.for_validation))
        with Run(folder).locked() as run:
            return self._carry_out(run, new or resume(run, task.training, task.for_validation), task)

    def _follow(self, trainer: Trainer) -> int:
        """Take part in the training of the first rank, which alone writes and judges."""
        with stop_on_interrupt() as stop:
            return 0 if trainer.train(stop=stop) else INTERRUPTED

    def _carry_out(self, run: Run, trainer: Trainer, task: Task) -> int:
        folder = run.folder
        if not self.resume:
            Run.create(folder, trainer.config, self.preset)
        run.save_judging(self.judging)
        resume_command = shlex.join(["fused-margins", "train", "--resume", "--output", str(folder)])
        if not self._train(run, trainer):
            say(f"stopped in epoch {trainer.epoch}; continue with: {resume_command}")
            return INTERRUPTED
        try:
            _judge_and_report(run, trainer, task, self.judging)
        except KeyboardInterrupt:
            say(f"stopped while judging; continue with: {resume_command}")
            raise
        return 0

    def _train(self, run: Run, trainer: Trainer) -> bool:
        """Whether it may go on to the judgement: trained to the end, and nobody asked to stop in the last step."""
        name = f"{trainer.config.loss.name} on {trainer.config.dataset}"
        with (
            progress(name, trainer.total_steps, "steps", completed=trainer.steps_done) as advance,
            stop_on_interrupt() as stop,
        ):
            return train(run, trainer, stop, advance) and not stop()


@dataclass(frozen=True)
class Evaluate:
    """Evaluate a run's latest checkpoint and write its report; what is not said is as it was at its last judgement."""

    run: tyro.conf.Positional[Path]
    """Run folder."""
    judging: JudgingFlags = field(default_factory=Judging)

    def main(self) -> int:
        run = Run(self.run)
        set_threads(run.config().threads)
        with run.locked():
            return self._carry_out(run)

    def _carry_out(self, run: Run) -> int:
        config = run.config()
        task = task_of(config)
        check_judging(task, self.judging, config.dataset)
        trainer = Trainer(config, task.training)
        run.load_checkpoint(trainer.load_state_dict)
        if not trainer.finished:
            say(f"not finished: {trainer.epoch} of {trainer.config.epochs} epochs")
        _judge_and_report(run, trainer, task, self.judging)
        return 0


def _judge_and_report(run: Run, trainer: Trainer, task: Task, judging: Judging) -> None:
    figures = judge(run, trainer, task, judging)
    console.print(write_run_report(run, trainer, task, figures).rich())
    say(f"report: {run.folder / 'report.html'}")
