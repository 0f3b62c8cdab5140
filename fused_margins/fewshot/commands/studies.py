"""The commands that train many networks, a study each. Called again, a command goes on where it stopped."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..backends import of_all
from ..config import Judging, Loss, Magnet, TrainConfig
from ..datasets import load
from ..errors import UserError
from ..evaluation import VINYALS
from ..jobs import available_cores
from ..options import ConfigFlags, LossFlags, LossOptions, as_file_name, on_features
from ..plan import suite_table
from ..presets import preset
from ..studies import parity
from ..studies.coarse_to_fine import all_methods, coarse_to_fine_study, few_methods
from ..studies.demo import demo_studies
from ..studies.features import feature_studies
from ..studies.heads import heads_study
from ..studies.magnet import magnet_study
from ..studies.margins import draw_base_classes, margin_sweep_study
from ..studies.omniglot import official_study, vinyals_study
from ..studies.reproduce import parity_studies, reproduce_studies
from ..study import Study, claims_sentences
from ..suite import run_suite, waiting_jobs
from ..terminal import console, say


def check_seeds(seeds: tuple[int, ...]) -> None:
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise UserError(f"seeds: expected one or more different numbers of at least 0, got {list(seeds)}")
    for seed in seeds:
        TrainConfig(seed=seed)


@dataclass(frozen=True)
class _StudyOptions:
    """What every study takes."""

    preset: str | None = None
    """Settings of a paper on a data set, neg-cosine-omniglot for instance; every other option overrides them, and a
    study of several losses has its own."""
    output: Path | None = None
    """Folder of the runs and the report; by default runs/COMMAND-DATASET."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds; all methods are compared on the same ones."""
    episodes: int = 600
    """Few-shot episodes for each number of shots."""
    workers: int | None = None
    """Trainings at a time, each on one thread; by default as many as cores."""
    dry_run: bool = False
    """Say what would be trained, and how long it would take, and do nothing."""
    features: Path | None = None
    """Train on these features of images instead of a data set: what `fused-margins embed` writes, or .npy, .npz."""
    config: ConfigFlags = field(default_factory=TrainConfig)

    def base(self) -> TrainConfig:
        """The settings that all trainings share. One thread each: that is fastest for many, and bits depend on it."""
        check_seeds(self.seeds)
        if self.config.seed != TrainConfig().seed:
            raise UserError(f"seed: a study has several, give --seeds; got {self.config.seed}")
        return self._config().model_copy(update={"threads": self.config.threads or 1})

    def _config(self) -> TrainConfig:
        return on_features(self.config, self.features)

    def judging(self) -> Judging:
        return Judging(episodes=self.episodes)

    def folder(self, command: str) -> Path:
        return self.output or Path("runs") / f"{command}-{as_file_name(self._config().dataset)}"

    def run(self, command: str, studies: Sequence[Study]) -> int:
        return _run(studies, self.folder(command), f"{command} on {self._config().dataset}", self.workers, self.dry_run)


def _run(studies: Sequence[Study], folder: Path, title: str, workers: int | None, dry_run: bool) -> int:
    if workers is not None and workers < 1:
        raise UserError(f"workers: expected at least 1, got {workers}")
    if dry_run:
        waiting_jobs(studies, folder)
        console.print(suite_table(studies, folder, workers or available_cores()).rich())
        return 0
    try:
        run_suite(studies, folder, title, workers)
    except KeyboardInterrupt:
        say(f"stopped; the same command goes on from what is in {folder}")
        raise
    results = [(study, study.results(folder)) for study in studies]
    for study, found in results:
        for table in study.tables(found)[:1]:
            console.print(table.rich())
    for sentence in claims_sentences([verdict for study, found in results for verdict in study.verdicts(found)]):
        say(sentence)
    say(f"report: {folder / 'report.html'}")
    return 0


@dataclass(frozen=True)
class Sweep(_StudyOptions):
    """Margin softmax over a range of margins: accuracy on base and novel classes, and discriminability (Liu et al.).

    Base classes are judged by images that no training saw: where a data set has none, --held-out says how many to hold
    out of each class (a tenth, unless it is given).
    """

    margin: tuple[float, ...] = (-0.3, -0.1, 0.0, 0.1, 0.3)
    """Margins, of either sign."""
    scale: float | None = None
    """Scale of the logits; by default that of the preset, or 10."""
    base_classes: int | None = None
    """Base classes that each seed draws, of data that are split by image (half of the classes if not given)."""
    all_ways: bool = False
    """Also 1-shot episodes of all novel classes at once, by the nearest centroid."""

    def main(self) -> int:
        config = LossOptions(scale=self.scale).apply(self.base())
        judging = Judging(episodes=self.episodes, all_ways=self.all_ways)
        study = margin_sweep_study(config, self.margin, self.seeds, judging, base_classes=self.base_classes)
        return self.run("sweep", [study])


@dataclass(frozen=True)
class Heads:
    """Nearest centroid, SimpleShot, logistic regression, k-NN and cosine heads on features as they are."""

    features: Path
    """Features of images: what `fused-margins embed` writes, or .npy, .npz."""
    base_classes: int | None = None
    """Base classes that each seed draws, of data that are split by image (half of the classes if not given)."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the choice of classes; of data that are split by class there is one choice."""
    episodes: int = 600
    """Few-shot episodes for each number of shots, and of all novel classes at once."""
    output: Path = Path("runs/heads")
    """Folder of the report."""
    workers: int | None = None
    """Choices at a time; by default as many as cores."""

    def main(self) -> int:
        check_seeds(self.seeds)
        config = on_features(TrainConfig(threads=1), self.features)
        splits = load(config.dataset)
        classes: list[tuple[int, ...] | None] = [None]
        names = splits["train"].class_names
        if names == splits["test"].class_names:
            classes = [draw_base_classes(len(names), seed, self.base_classes) for seed in self.seeds]
        study = heads_study(config, classes, Judging(episodes=self.episodes, all_ways=True))
        return _run([study], self.output, f"Heads on {self.features}", self.workers, dry_run=False)


@dataclass(frozen=True)
class CoarseToFine(_StudyOptions):
    """Easy positives against random ones: trained on coarse labels, judged on fine ones (Levi et al.)."""

    grid: bool = False
    """All kinds of positives with all kinds of negatives, for every loss: 52 methods."""
    config: ConfigFlags = field(default_factory=lambda: TrainConfig(labels="coarse"))

    def main(self) -> int:
        methods = all_methods() if self.grid else few_methods()
        return self.run("coarse-to-fine", [coarse_to_fine_study(self.base(), methods, self.seeds, self.judging())])


@dataclass(frozen=True)
class MagnetStudy(_StudyOptions):
    """The magnet loss beside softmax and triplet: kNC error, and the hierarchy that each recovers (Rippel et al.)."""

    loss: LossFlags = field(default_factory=LossOptions)
    config: ConfigFlags = field(default_factory=lambda: TrainConfig(labels="coarse", loss=Magnet()))

    def main(self) -> int:
        config = self.loss.apply(self.base())
        if not isinstance(config.loss, Magnet):
            raise UserError(f"loss: it is magnet that is compared with softmax and triplet, got {config.loss.name}")
        return self.run("magnet", [magnet_study(config, self.seeds, self.judging(), config.loss)])


@dataclass(frozen=True)
class OneShot(_StudyOptions):
    """Omniglot: 5- and 20-way episodes of the split of Vinyals et al., and the official one-shot runs."""

    loss: LossFlags = field(default_factory=LossOptions)
    config: ConfigFlags = field(default_factory=lambda: preset("cosine-omniglot"))

    def main(self) -> int:
        config = self.loss.apply(self.base())
        if config.dataset != VINYALS:
            raise UserError(f"dataset: these protocols are of {VINYALS} alone, got {config.dataset}")
        losses: dict[str, Loss] = {config.loss.name: config.loss}
        studies = [study(config, losses, self.seeds, self.episodes) for study in (vinyals_study, official_study)]
        return self.run("one-shot", studies)


@dataclass(frozen=True)
class ParityCommand(_StudyOptions):
    """Train with every loss on every backend, compare the first steps at equal weights, and the figures at the end.

    The exit code is 1 where a difference at equal weights exceeds the tolerance.
    """

    seeds: tuple[int, ...] = (0,)
    """Seed; a single one."""
    backends: tuple[str, ...] | None = None
    """Backends; differences are relative to the first. By default the reference and all that are available."""
    steps: int = 200
    """Steps to compare at equal weights (fewer if the training is shorter)."""
    tolerance: float = parity.TOLERANCE
    """Largest relative difference of loss and gradients at equal weights."""
    loss: LossFlags = field(default_factory=LossOptions)

    def main(self) -> int:
        base = self.base()
        if self.steps < 1:
            raise UserError(f"steps: expected at least 1, got {self.steps}")
        if not self.tolerance >= 0:
            raise UserError(f"tolerance: expected a number of at least 0, got {self.tolerance}")
        if len(self.seeds) != 1:
            raise UserError(f"seeds: expected a single one, got {list(self.seeds)}")
        if self.config.backend != TrainConfig().backend:
            raise UserError(f"backend: it is --backends that are compared, got {self.config.backend}")
        if self.loss.loss is None and self.loss != LossOptions():
            raise UserError("loss: which one are these options for? Without --loss every loss is compared as it is")
        config = self.loss.apply(base).model_copy(update={"seed": self.seeds[0]})
        losses: dict[str, Loss] = parity.LOSSES if self.loss.loss is None else {config.loss.name: config.loss}
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


@dataclass(frozen=True)
class Demo:
    """Train every loss on real digits, compare them, and write a report with plots: some minutes on two cores."""

    output: Path = Path("runs/demo")
    """Folder of the runs and the report."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    """Seeds; all methods are compared on the same ones."""
    epochs: int = 40
    """Epochs of each training."""
    episodes: int = 600
    """Few-shot episodes of each evaluation."""
    workers: int | None = None
    """Trainings at a time; by default as many as cores."""

    def main(self) -> int:
        check_seeds(self.seeds)
        warm_epochs = Magnet().warm_epochs
        if self.epochs <= warm_epochs:
            raise UserError(f"epochs: magnet begins with {warm_epochs} of softmax, expected more, got {self.epochs}")
        backends = ("reference", *of_all("cpu", parity.LOSSES.values()))
        if len(backends) == 1:
            say("only the reference backend is available: the parity part is left out")
        studies = demo_studies(self.seeds, self.epochs, self.episodes, backends)
        return _run(studies, self.output, "The three papers' losses on handwritten digits", self.workers, dry_run=False)


@dataclass(frozen=True)
class Reproduce:
    """A documented subset of the papers' protocols on Omniglot and CIFAR-FS; 45 minutes on two cores."""

    output: Path | None = None
    """Folder of the runs and the report; by default runs/reproduce, or runs/parity."""
    parity: bool = False
    """Instead of these, the parity of backends for every loss on the same data: a quarter of an hour more."""
    features: Path | None = None
    """Instead of these, the claims on frozen features: a folder with caltech101.safetensors and gtsrb.safetensors."""
    workers: int | None = None
    """Trainings at a time; by default as many as cores."""
    dry_run: bool = False
    """Say what would be trained, and how long it would take, and do nothing."""

    def main(self) -> int:
        if self.features is not None:
            studies, folder = feature_studies(self.features), Path("runs/features")
            title = "The three papers on frozen features"
        elif self.parity:
            studies, folder, title = parity_studies(), Path("runs/parity"), "Parity of backends on few-shot data"
        else:
            studies, folder, title = reproduce_studies(), Path("runs/reproduce"), "The three papers on few-shot data"
        return _run(studies, self.output or folder, title, self.workers, self.dry_run)
