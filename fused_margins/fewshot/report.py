"""What is left of a single run for a reader: report.md, report.html and the plots."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..doctor import versions
from .config import flat_settings
from .datasets import ImageSet, Task
from .metrics import nearest_others
from .plots import embedding_maps, map_sample, neighbour_strips, plane, training_curves
from .reports import Picture, Report, Section, Table, figure_text
from .runs import Run
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
