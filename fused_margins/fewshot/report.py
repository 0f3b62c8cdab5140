"""What is left of a run for a reader: report.md, report.html and the plots; and runs side by side.

Of several runs: the settings they differ in, their figures, and paired differences where their seeds match.
"""

import json
import math
import reprlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..doctor import versions
from .config import flat_settings
from .datasets import ImageSet, Task
from .metrics import nearest_others
from .plots import embedding_maps, map_sample, neighbour_strips, plane, training_curves
from .reports import Picture, Report, Section, Table, figure_text
from .runs import Run, write_json, write_text
from .studies import Grouped
from .terminal import UserError
from .trainer import Trainer

TOLD = ("way 1shot", "accuracy", "recall@1", "nmi")  # ends of the names of the figures at a report's head
QUERIES, NEIGHBOURS = 8, 8  # rows and columns of image strips


def figures_table(figures: Mapping[str, float | None]) -> Table:
    """Every figure with its interval, where it has one."""
    rows = []
    for name, value in figures.items():
        if name.endswith(("_interval", "_student")):
            continue
        student = figures.get(f"{name}_student")
        text = figure_text(name, value, figures.get(f"{name}_interval"))
        rows.append([name.replace("_", " "), text, "-" if student is None else f"± {100 * student:.2f}"])
    return Table(
        "Evaluation (percent, ± half of the 95% interval; discriminability is a ratio, modes a number)",
        ["figure", "value ± normal, ddof 0", "Student's t"],
        rows,
    )


def answer_of(table: Table) -> str:
    """What a run found, in a sentence; of its table of figures."""
    told = [f"{name} {value}" for name, value, _ in table.rows if name.endswith(TOLD)]
    return f"In percent: {'; '.join(told)}." if told else ""


def write_run_report(run: Run, trainer: Trainer, task: Task, figures: Mapping[str, float | None]) -> Table:
    """Write report.md, report.html and PNG files into the folder of a run; returns the table of `figures`."""
    config = trainer.config.model_dump(mode="json")
    title = f"{config['loss']['name']} on {config['dataset']}"
    lead = (
        f"{trainer.epoch} of {config['epochs']} epochs, seed {config['seed']}, backend {config['backend']}, "
        f"{len(task.training)} training images."
    )
    table = figures_table(figures)
    answer = answer_of(table)
    rows = [[name, "-" if value is None else str(value)] for name, value in flat_settings(config).items()]
    settings = Table("All settings of the run; they suffice to repeat it", ["setting", "value"], rows, numeric=False)
    made_with = ", ".join(f"{name} {version}" for name, version in versions().items()) + "."
    sections = [
        Section("Evaluation", tables=[table], answer=answer),
        *_draw(run, trainer, task),
        Section("Settings", [made_with], [settings]),
    ]
    Report(title, lead, sections).write(run.folder)
    return table


def _draw(run: Run, trainer: Trainer, task: Task) -> list[Section]:
    """A section for each picture: of the training, and of novel images, or held-out ones where none are novel."""
    loss, history = str(trainer.config.loss.name), trainer.history
    curves = Picture(run.folder / "loss.png", "Loss, averaged over each epoch, and the learning rate at its end.")
    losses, rates = ({loss: [row[column] for row in history]} for column in ("loss", "learning_rate"))
    training_curves(curves.path, losses, rates)
    sections = [Section("Training", pictures=[curves])]
    for heading, picture in unseen_pictures(run.folder, trainer, task).items():
        sections.append(Section(heading, pictures=[picture]))
    return sections


def unseen_pictures(folder: Path, trainer: Trainer, task: Task) -> dict[str, Picture]:
    """Maps and neighbours of the embeddings of images that no training saw, written into a folder, by their headings.

    Novel images are shown, or the held-out ones where there are no novel classes; neighbours of images alone.
    """
    images = task.novel if task.novel is not None else task.held_out
    if images is None:
        return {}
    kind = "novel classes" if task.novel is not None else "held-out images"
    embeddings = trainer.embed(images).cpu()

    shown = map_sample(images.labels)
    points = plane(embeddings[shown])
    maps = {f"{len(images.class_names)} fine labels": (points, images.labels[shown], images.class_names)}
    if images.coarse_names != images.class_names:
        coarse = (points, images.coarse_labels[shown], images.coarse_names)
        maps = {f"{len(images.coarse_names)} coarse labels": coarse} | maps
    in_the_plane = Picture(
        folder / "embeddings.png",
        f"t-SNE of {len(shown)} of {len(images)} embeddings of the {kind}; distances between groups mean little.",
    )
    embedding_maps(in_the_plane.path, maps)
    if images.are_features:
        return {"Embeddings": in_the_plane}

    neighbours = nearest_others(embeddings, min(NEIGHBOURS, len(images) - 1))
    queries = _queries(images)
    used, place = torch.unique(torch.cat([queries[:, None], neighbours[queries]], dim=1), return_inverse=True)
    strips = Picture(
        folder / "neighbours.png",
        f"Images of the {kind} drawn at random, one of a class, and those nearest to them by cosine: "
        "framed green where they are of the same class, orange where not.",
        photographs=True,
    )
    neighbour_strips(
        strips.path, images.pixels(used), images.labels[used], place[:, 0], place[:, 1:], images.class_names
    )
    return {"Embeddings": in_the_plane, "Nearest neighbours": strips}


def _queries(images: ImageSet) -> Tensor:
    """Indices of an image each of up to QUERIES classes, the same for every run on these images."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    first = np.unique(images.labels[order].numpy(), return_index=True)[1]  # where in the order each class begins
    queries = order[np.sort(first)[:QUERIES]]
    return queries[images.labels[queries].argsort()]


SUFFIXES = (".html", ".md", ".json")
NO_VALUE = "-"
CURVES = ("loss", "learning_rate")  # of each epoch
COSTS: dict[str, Callable[[float], str]] = {  # entries of report.json beside its figures, where they were measured
    "seconds": lambda value: f"{value:.1f} s",
    "peak_mib": lambda value: f"{value:.0f} MiB",
}


@dataclass(frozen=True)
class StoredRun:
    """What a finished run left in its folder."""

    folder: Path
    settings: dict[str, Any]  # under dotted names, without the seed
    seed: int
    figures: dict[str, float]
    costs: dict[str, float]
    history: list[dict[str, Any]]
    stopped_early: str | None  # why a training has not converged; "" of one that has, None where nothing asked


def read_run(folder: Path) -> StoredRun:
    """The run in `folder`; a `UserError` says what is missing where there is none, or none that was completed."""
    run = Run(folder)
    config = run.config()
    history, path = run.read_metrics(), folder / "report.json"
    if len(history) < config.epochs:
        raise UserError(
            f"{folder}: not finished, {len(history)} of {config.epochs} epochs; "
            f"continue with: fused-margins train --resume --output {folder}"
        )
    for number, row in enumerate(history, start=1):
        try:
            usable = all(math.isfinite(row[column]) for column in CURVES)
        except (KeyError, TypeError, OverflowError):
            usable = False
        if not usable:
            expected = f"expected an object with the numbers {' and '.join(CURVES)}"
            raise UserError(f"{run.metrics_path}: line {number}: {expected}, got {reprlib.repr(row)}")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        figures = {name: float(value) for name, value in report["figures"].items() if value is not None}
        costs = {name: float(report[name]) for name in COSTS if report.get(name) is not None}
        judging = flat_settings(report.get("judging", {}), "judging.")
        early = report["stopped_early"] or "" if "stopped_early" in report else None
    except FileNotFoundError:
        raise UserError(f"{folder}: no report.json; write it with: fused-margins evaluate {folder}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path}: not a report of a run ({type(error).__name__}: {error})") from None
    settings = flat_settings(config.model_dump(mode="json")) | judging
    seed = settings.pop("seed")
    return StoredRun(folder, settings, seed, figures, costs, history, early)


def read_runs(places: Sequence[Path]) -> tuple[list[StoredRun], list[str]]:
    """The runs in these folders, and what was left out and why.

    A place is the folder of a run or one with runs below it, as a study has; what a shell's `*` adds to them, pictures
    and reports, is left out. Below a folder, so are runs that are not finished, or the same again.
    """
    runs: list[StoredRun] = []
    left_out: list[str] = []
    for place in places:
        if place.is_file():
            left_out.append(f"{place}: not a folder")
            continue
        below = [] if Run(place).config_path.exists() else sorted(p.parent for p in place.rglob("config.json"))
        if not below:
            runs.append(read_run(place))
        for folder in below:
            try:
                run = read_run(folder)
            except UserError as error:
                left_out.append(str(error))
                continue
            same = next((r.folder for r in runs if (r.settings, r.seed) == (run.settings, run.seed)), None)
            if same is None:
                runs.append(run)
            else:
                left_out.append(f"{folder}: the same settings and seed as {same}")
    return runs, left_out


class Comparison(Grouped):
    """Stored runs, grouped; groups stand in the order in which their first runs were given.

    Raises:
        UserError: fewer than two runs, or two of the same settings and seed.
    """

    def __init__(self, runs: Sequence[StoredRun]) -> None:
        if len(runs) < 2:
            raise UserError(f"runs: expected two or more, got {len(runs)}")
        grouped: dict[str, list[StoredRun]] = {}
        for run in runs:
            alike = grouped.setdefault(json.dumps(run.settings, sort_keys=True), [])
            for other in alike:
                if other.seed == run.seed:
                    raise UserError(f"runs: {other.folder} and {run.folder} have the same settings and seed {run.seed}")
            alike.append(run)
        by_seed = [sorted(alike, key=lambda run: run.seed) for alike in grouped.values()]
        self.differing = _differing([group[0].settings for group in by_seed])
        self.runs = dict(zip(_names(by_seed, self.differing), by_seed))
        super().__init__((name, r.seed, r.figures | r.costs) for name, group in self.runs.items() for r in group)
        self.figures = list(
            dict.fromkeys(name for run in runs for name in run.figures if not name.endswith(("_interval", "_student")))
        )

    def settings_table(self) -> Table:
        groups = self.runs.values()
        rows = [
            [name, *(_setting_text(group[0].settings.get(name, NO_VALUE)) for group in groups)]
            for name in self.differing
        ]
        rows.append(["seeds", *(", ".join(str(run.seed) for run in group) for group in groups)])
        rows.append(["first folder", *(str(group[0].folder) for group in groups)])
        return Table("Settings that differ", ["setting", *self.groups], rows, numeric=False)

    def figures_table(self) -> Table:
        rows = self._rows([self.texts(group, self.figures) for group in self.groups])
        for name, text in COSTS.items():
            means = [self.mean(group, name)[0] for group in self.groups]
            if not all(map(math.isnan, means)):
                title = name.removesuffix("_mib").replace("_", " ")
                rows.append([title, *(NO_VALUE if math.isnan(mean) else text(mean) for mean in means)])
        asked = {name: [run for run in group if run.stopped_early is not None] for name, group in self.runs.items()}
        if any(asked.values()):
            counts = ((sum(not run.stopped_early for run in group), len(group)) for group in asked.values())
            rows.append(["converged", *(f"{converged} of {all_}" if all_ else NO_VALUE for converged, all_ in counts)])
        title = "Figures: percent, ratios, counts; ± 95% over seeds (Student's t), of one run over episodes or queries"
        return Table(title, ["figure", *self.groups], rows)

    def difference_table(self) -> Table | None:
        """Paired differences to the first group; None where no seed is shared."""
        first, *others = self.groups
        pairs = {group: self.num_seeds(group, first) for group in others}
        if not any(pairs.values()):
            return None
        rows = self._rows([self.texts(group, self.figures, minus=first) for group in others])
        title = f"Minus {first}, paired by seed: mean of the differences ± 95% (Student's t); percentage points"
        return Table(title, ["figure", *(f"{name} (pairs: {count})" for name, count in pairs.items())], rows)

    def _rows(self, columns: Sequence[Sequence[str]]) -> list[list[str]]:
        """A row a figure, of a column a group."""
        return [[name.replace("_", " "), *cells] for name, *cells in zip(self.figures, *columns)]

    def tables(self) -> list[Table]:
        tables = [self.settings_table(), self.figures_table(), self.difference_table()]
        return [table for table in tables if table is not None]

    def write(self, path: Path) -> None:
        """The comparison as HTML, Markdown or JSON, by the file's suffix (one of SUFFIXES)."""
        if path.suffix == ".json":
            self._write_json(path)
            return
        headings = ("Settings", "Figures", "Paired differences")
        sections = [Section(heading, tables=[table]) for heading, table in zip(headings, self.tables())]
        lead = f"{sum(map(len, self.runs.values()))} runs in {len(self.runs)} groups."
        if path.suffix == ".md":
            write_text(path, Report("Runs compared", lead, sections).markdown(path.parent))
            return
        losses, rates = (
            {name: [row[column] for row in group[0].history] for name, group in self.runs.items()} for column in CURVES
        )
        with tempfile.TemporaryDirectory() as folder:
            caption = "The first seed of each group; losses of different kinds do not compare."
            picture = Picture(Path(folder) / "loss.png", caption)
            training_curves(picture.path, losses, rates)
            write_text(path, Report("Runs compared", lead, [*sections, Section("Training", pictures=[picture])]).html())

    def _write_json(self, path: Path) -> None:
        first = self.groups[0]
        groups = [
            {
                "name": name,
                "settings": {setting: group[0].settings.get(setting) for setting in self.differing},
                "seeds": [run.seed for run in group],
                "folders": [str(run.folder) for run in group],
                "figures": {figure: list(self.values(name, figure).values()) for figure in (*self.figures, *COSTS)},
                "minus_first": {figure: self.differences(name, first, figure) for figure in self.figures}
                if name != first
                else {},
            }
            for name, group in self.runs.items()
        ]
        write_json(path, {"groups": groups})


def _differing(settings: Sequence[dict[str, Any]]) -> list[str]:
    """Names of settings that are not the same, or not there, in all."""
    names = dict.fromkeys(name for one in settings for name in one)
    return [
        name for name in names if any(one.get(name, NO_VALUE) != settings[0].get(name, NO_VALUE) for one in settings)
    ]


def _names(groups: Sequence[Sequence[StoredRun]], differing: Sequence[str]) -> list[str]:
    """A short name each: the one setting that tells all groups apart, or else the folder of the first run."""
    for setting in differing:
        if any(setting not in group[0].settings for group in groups):
            continue  # one loss's margin says nothing of another loss
        values = [_setting_text(group[0].settings.get(setting, NO_VALUE)) for group in groups]
        if len(set(values)) == len(values):
            leaf = setting.split(".")[-1]
            return values if leaf == "name" else [f"{leaf} {value}" for value in values]
    if len(groups) == 1:
        return [groups[0][0].folder.name]
    return [f"{number}: {group[0].folder.name}" for number, group in enumerate(groups, start=1)]


def _setting_text(value: Any) -> str:
    return NO_VALUE if value is None else str(value)
