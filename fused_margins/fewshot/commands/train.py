"""`fused-margins train` and `fused-margins evaluate`."""

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from ..config import Judging, TrainConfig, contradictions
from ..presets import preset
from ..runs import Run
from ..terminal import INTERRUPTED, UserError, console, progress, say
from . import POSITIONAL, Command, Given, build

if TYPE_CHECKING:
    from typing_extensions import Self

    from ..datasets import Task
    from ..trainer import Trainer


class Training(Command):
    """What every command takes that trains as settings say."""

    preset: str | None = None
    """Settings of a paper on a data set, neg-cosine-omniglot for instance; every other option overrides them, and a
    study of several losses has its own."""
    output: Path | None = None
    """Folder to write to; by default runs/PRESET-seedSEED, runs/DATASET-LOSS-seedSEED, or of a study
    runs/COMMAND-DATASET."""
    dry_run: bool = False
    """Say what would be trained, and how long it would take, and do nothing."""
    features: Path | None = None
    """Train on these features of images instead of a data set: what `fused-margins embed` writes, or .npy, .npz."""
    config: TrainConfig = TrainConfig()

    often: ClassVar[tuple[str, ...]] = ("dataset", "epochs", "batch_size", "learning_rate", "seed", "backbone")

    @classmethod
    def read(cls, given: Given) -> "Self":
        """With the settings of a preset, where one is named, and what is given over them."""
        name = given.get("preset")
        return build(cls, given) if name is None else build(cls, given, config=preset(name))

    def settings(self) -> TrainConfig:
        return on_features(self.config, self.features)


def on_features(config: TrainConfig, file: Path | None) -> TrainConfig:
    """`config` for a file of features, where there is one: a linear map takes the place of the default network."""
    from ..datasets import is_of_features

    if file is not None:
        config = config.but(dataset=f"features:{file}")
    if is_of_features(config.dataset) and config.backbone.name == "convnet":
        config = config.but(backbone=config.backbone.but(name="linear"))
    return config


def as_file_name(dataset: str) -> str:
    """A data set's name without what separates folders.

    >>> as_file_name("folder:/data/birds")
    'folder-data-birds'
    """
    return re.sub("[/:]+", "-", dataset)


class Train(Training):
    """Train a network, evaluate it, and keep everything in a run folder. Ctrl-C stops it so that --resume can go on."""

    has_loss: ClassVar[bool] = True
    often: ClassVar[tuple[str, ...]] = (*Training.often, "loss", "margin", "scale")
    example: ClassVar[str] = "--dataset digits --loss margin-softmax --margin -0.1"

    resume: bool = False
    """Continue the run in its folder where it stopped, with its stored settings, to the numbers it would have had."""
    judging: Judging = Judging()

    @classmethod
    def read(cls, given: Given) -> "Self":
        """With the settings of a run that is resumed; others would lead to other numbers and are refused."""
        if not given.get("resume"):
            return super().read(given)
        if given.get("dry_run"):
            raise UserError("dry_run: it describes a training that has not begun; leave out --resume")
        run = Run(Path(given["output"]) if given.get("output") else super().read(given).folder())
        stored = run.config()
        resumed = build(cls, {**given, "output": run.folder}, config=stored, judging=run.judging())
        # Another preset than the run began with says every setting, as options say some.
        asked = (resumed if resumed.preset in (None, run.preset()) else super().read(given)).settings()
        if asked.threads is None:  # those that the run found
            asked = asked.but(threads=stored.threads)
        changed = contradictions(stored, asked)
        if changed:
            raise UserError(f"resume: the run has {', '.join(changed)}; leave out what is to stay as it was")
        return resumed

    def folder(self) -> Path:
        if self.output is not None:
            return self.output
        config = self.settings()
        name = self.preset or f"{as_file_name(config.dataset)}-{config.loss.name}"
        return Path("runs") / f"{name}-seed{config.seed}"

    def main(self) -> int:
        from ..process import joined

        with joined(self.config.device):
            return self._main()

    def _main(self) -> int:
        from ...core.ranks import own_rank
        from ..evaluation import check_judging
        from ..plan import estimate, plan_table
        from ..process import set_threads
        from ..trainer import Trainer, read, resume
        from ..trials import task_of

        config, folder = self.settings(), self.folder()
        # Stored with the run, because a resumed run has the same numbers only with as many threads.
        config = config.but(threads=set_threads(config.threads))
        task = task_of(config)
        check_judging(task, self.judging, config.dataset)
        if self.dry_run:
            trainer = Trainer(config, task.training)
            console.print(plan_table(trainer, task, folder, estimate(trainer)).rich())
            return 0
        # What may fail comes first, and then leaves no folder.
        new = None if self.resume else Trainer(config, task.training, task.for_validation)
        if own_rank() > 0:
            return self._follow(new or read(Run(folder), task.training, task.for_validation))
        with Run(folder).locked() as run:
            if new is not None:
                Run.create(folder, config, self.preset)
            return self._carry_out(run, new or resume(run, task.training, task.for_validation), task)

    def _follow(self, trainer: "Trainer") -> int:
        """Take part in the training of the first rank, which alone writes and judges."""
        from .. import trials

        with trials.stop_on_interrupt() as stop:
            return 0 if trainer.train(stop=stop) else INTERRUPTED

    def _carry_out(self, run: Run, trainer: "Trainer", task: "Task") -> int:
        from .. import trials

        run.save_judging(self.judging)
        resume_command = shlex.join(["fused-margins", "train", "--resume", "--output", str(run.folder)])
        name = f"{trainer.config.loss.name} on {trainer.config.dataset}"
        with (
            progress(name, trainer.total_steps, "steps", completed=trainer.steps_done) as advance,
            trials.stop_on_interrupt() as stop,
        ):
            trained = trials.train(run, trainer, stop, advance)
        if not trained or stop():  # or somebody asked to stop in the last step
            say(f"stopped in epoch {trainer.epoch}; continue with: {resume_command}")
            return INTERRUPTED
        try:
            _judge_and_report(run, trainer, task, self.judging)
        except KeyboardInterrupt:
            say(f"stopped while judging; continue with: {resume_command}")
            raise
        return 0


class Evaluate(Command):
    """Evaluate a run's latest checkpoint and write its report; what is not said is as it was at its last judgement."""

    run: Annotated[Path, POSITIONAL]
    """Run folder."""
    judging: Judging = Judging()

    often: ClassVar[tuple[str, ...]] = ("episodes", "ways", "shots", "all_ways")

    @classmethod
    def read(cls, given: Given) -> "Self":
        return build(cls, given, judging=Run(Path(given["run"])).judging())

    def main(self) -> int:
        from ..evaluation import check_judging
        from ..process import set_threads
        from ..trainer import Trainer
        from ..trials import task_of

        run = Run(self.run)
        config = run.config()
        set_threads(config.threads)
        with run.locked():
            task = task_of(config)
            check_judging(task, self.judging, config.dataset)
            trainer = Trainer(config, task.training)
            run.load_checkpoint(trainer.load_state_dict)
            if not trainer.finished:
                say(f"not finished: {trainer.epoch} of {trainer.config.epochs} epochs")
            _judge_and_report(run, trainer, task, self.judging)
        return 0


def _judge_and_report(run: Run, trainer: "Trainer", task: "Task", judging: Judging) -> None:
    from ..report import answer_of, write_run_report
    from ..trials import judge

    figures = judge(run, trainer, task, judging)
    table = write_run_report(run, trainer, task, figures)
    console.print(table.rich())
    say(answer_of(table))
    say(f"report: {run.folder / 'report.html'}")
