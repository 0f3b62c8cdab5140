"""The commands that train many networks, a study each. Called again, a command goes on where it stopped."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import AfterValidator, Field

from ..config import TOLERANCE, AtLeast0, Count, Epochs, Judging, Loss, Magnet, Seed, TrainConfig, changed_loss
from ..presets import preset
from ..terminal import UserError, console, say
from . import OF_LOSS, Command
from .train import Training, as_file_name, on_features

if TYPE_CHECKING:
    from ..studies import Study


def _different(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(seeds)) < len(seeds):
        raise ValueError("expected one or more different numbers")
    return seeds


Seeds = Annotated[tuple[Seed, ...], Field(min_length=1), AfterValidator(_different)]


class _Many(Command):
    """A command that has studies carried out."""

    workers: Count | None = None
    """Trainings, or other jobs, at a time, each on one thread; by default as many as cores."""

    def carry_out(self, studies: "Sequence[Study]", folder: Path, title: str, dry_run: bool = False) -> int:
        from ..plan import suite_table
        from ..process import available_cores
        from ..studies import claims_sentences
        from ..suite import check_all, run_suite, waiting_jobs

        if dry_run:
            check_all(waiting_jobs(studies, folder))
            console.print(suite_table(studies, folder, self.workers or available_cores()).rich())
            return 0
        try:
            run_suite(studies, folder, title, self.workers)
        except KeyboardInterrupt:
            say(f"stopped; the same command goes on from what is in {folder}")
            raise
        results = [(study, study.results(folder)) for study in studies]
        first = [table for study, found in results for table in study.tables(found)[:1]]
        for table in first:
            console.print(table.rich())
        sentences = claims_sentences([verdict for study, found in results for verdict in study.verdicts(found)])
        for sentence in sentences or [finding for table in first for finding in table.findings()]:
            say(sentence)
        say(f"report: {folder / 'report.html'}")
        return 0


class _OneStudy(Training, _Many):
    """What every study takes."""

    seeds: Seeds = (0, 1, 2)
    """Seeds; all methods are compared on the same ones."""
    episodes: Count = 600
    """Few-shot episodes for each number of shots."""

    def base(self) -> TrainConfig:
        """The settings that all trainings share. One thread each: that is fastest for many, and bits depend on it."""
        if self.config.seed != TrainConfig().seed:
            raise UserError(f"seed: a study has several, give --seeds; got {self.config.seed}")
        return self.settings().but(threads=self.config.threads or 1)

    def judging(self) -> Judging:
        return Judging(episodes=self.episodes)

    def folder(self, command: str) -> Path:
        return self.output or Path("runs") / f"{command}-{as_file_name(self.settings().dataset)}"

    def run(self, command: str, studies: "Sequence[Study]") -> int:
        title = f"{command} on {self.settings().data}"
        return self.carry_out(studies, self.folder(command), title, self.dry_run)


class Sweep(_OneStudy):
    """Margin softmax over a range of margins: accuracy on base and novel classes, and discriminability (Liu et al.).

    Base classes are judged by images that no training saw: where a data set has none, --held-out says how many to hold
    out of each class (a tenth, unless it is given).
    """

    margin: tuple[float, ...] = (-0.3, -0.1, 0.0, 0.1, 0.3)
    """Margins, of either sign."""
    scale: float | None = None
    """Scale of the logits; by default that of the preset, or 10."""
    base_classes: Count | None = None
    """Base classes that each seed draws, of data that are split by image (half of the classes if not given)."""
    all_ways: bool = False
    """Also 1-shot episodes of all novel classes at once, by the nearest centroid."""

    def main(self) -> int:
        from ..studies.margins import margin_sweep_study

        config = self.base()
        if self.scale is not None:
            config = config.but(loss=changed_loss(config.loss, scale=self.scale))
        judging = Judging(episodes=self.episodes, all_ways=self.all_ways)
        study = margin_sweep_study(config, self.margin, self.seeds, judging, base_classes=self.base_classes)
        return self.run("sweep", [study])


class Heads(_Many):
    """Nearest centroid, SimpleShot, logistic regression, k-NN and cosine heads on features as they are."""

    features: Path
    """Features of images: what `fused-margins embed` writes, or .npy, .npz."""
    base_classes: Count | None = None
    """Base classes that each seed draws, of data that are split by image (half of the classes if not given)."""
    seeds: Seeds = (0, 1, 2)
    """Seeds of the choice of classes; of data that are split by class there is one choice."""
    episodes: Count = 600
    """Few-shot episodes for each number of shots, and of all novel classes at once."""
    output: Path = Path("runs/heads")
    """Folder of the report."""

    def main(self) -> int:
        from ..datasets import load
        from ..studies.heads import heads_study
        from ..studies.margins import draw_base_classes

        config = on_features(TrainConfig(threads=1), self.features)
        splits = load(config.dataset)
        classes: list[tuple[int, ...] | None] = [None]
        names = splits["train"].class_names
        if names == splits["test"].class_names:
            classes = [draw_base_classes(len(names), seed, self.base_classes) for seed in self.seeds]
        study = heads_study(config, classes, Judging(episodes=self.episodes, all_ways=True))
        return self.carry_out([study], self.output, f"Heads on {self.features}")


class CoarseToFine(_OneStudy):
    """Easy positives against random ones: trained on coarse labels, judged on fine ones (Levi et al.)."""

    grid: bool = False
    """All kinds of positives with all kinds of negatives, for every loss: 52 methods."""
    config: TrainConfig = TrainConfig(labels="coarse")

    def main(self) -> int:
        from ..studies.coarse_to_fine import all_methods, coarse_to_fine_study, few_methods

        methods = all_methods() if self.grid else few_methods()
        return self.run("coarse-to-fine", [coarse_to_fine_study(self.base(), methods, self.seeds, self.judging())])


class MagnetStudy(_OneStudy):
    """The magnet loss beside softmax and triplet: kNC error, and the hierarchy that each recovers (Rippel et al.)."""

    has_loss: ClassVar[bool] = True

    config: TrainConfig = TrainConfig(labels="coarse", loss=Magnet())

    def main(self) -> int:
        from ..studies.magnet import magnet_study

        config = self.base()
        if not isinstance(config.loss, Magnet):
            raise UserError(f"loss: it is magnet that is compared with softmax and triplet, got {config.loss.name}")
        return self.run("magnet", [magnet_study(config, self.seeds, self.judging(), config.loss)])


class OneShot(_OneStudy):
    """Omniglot: 5- and 20-way episodes of the split of Vinyals et al., and the official one-shot runs."""

    has_loss: ClassVar[bool] = True

    config: TrainConfig = preset("cosine-omniglot")

    def main(self) -> int:
        from ..evaluation import VINYALS
        from ..studies.omniglot import official_study, vinyals_study

        config = self.base()
        if config.dataset != VINYALS:
            raise UserError(f"dataset: these protocols are of {VINYALS} alone, got {config.dataset}")
        losses: dict[str, Loss] = {config.loss.name: config.loss}
        studies = [study(config, losses, self.seeds, self.episodes) for study in (vinyals_study, official_study)]
        return self.run("one-shot", studies)


class ParityCommand(_OneStudy):
    """Train with every loss on every backend, compare the first steps at equal weights, and the figures at the end.

    The exit code is 1 where a difference at equal weights exceeds the tolerance.
    """

    has_loss: ClassVar[bool] = True

    seeds: Seeds = (0,)
    """Seed; a single one."""
    backends: tuple[str, ...] | None = None
    """Backends; differences are relative to the first. By default the reference and all that are available."""
    steps: Count = 200
    """Steps to compare at equal weights (fewer if the training is shorter)."""
    tolerance: AtLeast0 = TOLERANCE
    """Largest relative difference of loss and gradients at equal weights."""

    def main(self) -> int:
        from ..objectives import of_all
        from ..studies import parity

        base, one_loss = self.base(), f"{OF_LOSS}name" in self._given
        if len(self.seeds) != 1:
            raise UserError(f"seeds: expected a single one, got {list(self.seeds)}")
        if self.config.backend != TrainConfig().backend:
            raise UserError(f"backend: it is --backends that are compared, got {self.config.backend}")
        if not one_loss and any(option.startswith(OF_LOSS) for option in self._given):
            raise UserError("loss: which one are these options for? Without --loss every loss is compared as it is")
        config = base.but(seed=self.seeds[0])
        losses: dict[str, Loss] = {config.loss.name: config.loss} if one_loss else parity.LOSSES
        backends = self.backends or ("reference", *of_all(config.device, losses.values()))
        if len(backends) == 1:
            raise UserError(f"backends: none beside the reference runs {', '.join(losses)} on {config.device}")
        if len(set(backends)) < 2 or len(set(backends)) < len(backends):
            raise UserError(f"backends: expected two or more different ones, got {list(backends)}")
        study = parity.parity_study(config, losses, backends, self.judging(), self.steps, self.tolerance)
        code = self.run("parity", [study])
        if code or self.dry_run:
            return code
        worst = parity.worst_difference(study, self.folder("parity") / study.name)
        within = worst.largest <= self.tolerance
        say(
            f"{'within' if within else 'BEYOND'} the tolerance of {self.tolerance:g}: {worst.largest:.1e} "
            f"at step {worst.step} ({worst.worst_parameter})"
        )
        return 0 if within else 1


class Demo(_Many):
    """The three papers' losses on real digits, compared in a report with plots: a minute and a half on two cores."""

    output: Path = Path("runs/demo")
    """Folder of the runs and the report."""
    seeds: Seeds = (0, 1, 2, 3, 4, 5)
    """Seeds; all methods are compared on the same ones."""
    epochs: Epochs = 30
    """Epochs of each training; more than 5, since magnet begins with 5 of softmax. On half of the classes, margins take
    a fifth more."""
    episodes: Count = 200
    """Few-shot episodes of each evaluation."""

    def main(self) -> int:
        from ..objectives import of_all
        from ..studies.parity import LOSSES
        from ..studies.reproduce import demo_studies

        warm_epochs = Magnet().warm_epochs
        if self.epochs <= warm_epochs:
            raise UserError(f"epochs: magnet begins with {warm_epochs} of softmax, expected more, got {self.epochs}")
        backends = ("reference", *of_all("cpu", LOSSES.values()))
        if len(backends) == 1:
            say("only the reference backend is available: the parity part is left out")
        studies = demo_studies(self.seeds, self.epochs, self.episodes, backends)
        return self.carry_out(studies, self.output, "The three papers' losses on handwritten digits")


class Reproduce(_Many):
    """A documented subset of the papers' protocols on Omniglot and digits; about 45 minutes on two cores."""

    output: Path | None = None
    """Folder of the runs and the report; by default runs/reproduce, or runs with the name of what is asked instead."""
    parity: bool = False
    """Instead of these, the parity of backends for every loss on the same data: a quarter of an hour more."""
    long: bool = False
    """Instead of these, the margins on CIFAR-FS trained until they converge: hours, in several goes if you like."""
    features: Path | None = None
    """Instead of these, the claims on frozen features: a folder with caltech101.safetensors and gtsrb.safetensors."""
    dry_run: bool = False
    """Say what would be trained, and how long it would take, and do nothing."""

    def main(self) -> int:
        from ..studies import reproduce

        asked = [name for name in ("parity", "long", "features") if getattr(self, name)]
        if len(asked) > 1:
            raise UserError(f"{', '.join(asked)}: expected one of them, each is instead of the others")
        if self.features is not None:
            title, studies = "The three papers on frozen features", reproduce.feature_studies(self.features)
        elif self.parity:
            title, studies = "Parity of backends on few-shot data", reproduce.parity_studies()
        elif self.long:
            title, studies = "Negative margins, trained until they converge", reproduce.long_studies()
        else:
            title, studies = "Few-shot data: cosine softmax, easy positives, magnet", reproduce.reproduce_studies()
        folder = self.output or Path("runs", *asked or ["reproduce"])
        return self.carry_out(studies, folder, title, self.dry_run)
