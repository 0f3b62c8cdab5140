"""Negative margins: accuracy on base and on novel classes, and discriminability, against the margin.

Source: Liu et al., Negative margin matters: understanding margin in few-shot classification, 2020.
"""

import math
from collections.abc import Mapping, Sequence

import torch

from ..config import Judging, MarginSoftmax, TrainConfig
from ..datasets import load
from ..plots import sweep
from ..reports import Picture, Table
from ..terminal import UserError
from ..trials import Trial
from . import Claim, Results, Study

SOURCE = "Liu et al. 2020"
COLUMNS = {
    "1-shot": "novel_5way_1shot",
    "5-shot": "novel_5way_5shot",
    "1-shot, centroid": "novel_5way_1shot_centroid",
    "5-shot, centroid": "novel_5way_5shot_centroid",
    "base accuracy": "accuracy",
    "φ novel": "novel_discriminability",
    "φ base": "discriminability",
}
VALIDATION = {"1-shot, validation": "validation_5way_1shot"}
VALIDATION_EPISODES = 600
HELD_OUT = 0.1  # of each base class, where the data are split by class and the settings hold nothing out
PANELS = {
    "novel classes, %": {title: COLUMNS[title] for title in ("1-shot", "5-shot", "1-shot, centroid")},
    "base classes, %": {"accuracy": "accuracy"},
    "discriminability φ": {"novel": "novel_discriminability", "base": "discriminability"},
}


def group(margin: float) -> str:
    return f"m = {margin + 0.0:g}"  # -0.0 is 0


def draw_base_classes(num_classes: int, seed: int, count: int | None = None) -> tuple[int, ...]:
    """Base classes where a data set has no split by class: others for each seed, so that no lucky split decides.

    >>> draw_base_classes(10, seed=0)  # half of them, if no number is given
    (1, 3, 4, 5, 7)
    """
    order = torch.randperm(num_classes, generator=torch.Generator().manual_seed(seed))
    return tuple(sorted(order[: count or num_classes // 2].tolist()))


def margin_sweep_study(
    config: TrainConfig,
    margins: Sequence[float],
    seeds: Sequence[int],
    judging: Judging,
    name: str = "margins",
    base_classes: int | None = None,
) -> Study:
    """The same training at every margin and seed; `config` says the rest, but some base images are always held out.

    Where the data have no split by class, every seed draws `base_classes` (half) of the classes. After each epoch the
    same episodes say whether a training has converged: without that no claim is judged.
    """
    loss = config.loss
    if not isinstance(loss, MarginSoftmax):
        raise UserError(f"loss: a sweep over margins is one of margin-softmax, got {loss.name}")
    if len(set(margins)) < len(margins) or not margins or not all(map(math.isfinite, margins)):
        raise UserError(f"margin: expected one or more different finite numbers, got {list(margins)}")
    if config.labels != "fine":
        raise UserError("labels: a sweep over margins asks for novel fine classes, it cannot train on coarse ones")
    splits = load(config.dataset, image_size=config.image_size)
    num_classes = len(splits["train"].class_names)
    num_novel = len(splits["test"].class_names)
    num_validation = len(splits["val"].class_names) if "val" in splits else 0
    by_image = splits["train"].class_names == splits["test"].class_names

    if base_classes is not None and not (by_image and config.classes is None and 2 <= base_classes < num_classes):
        raise UserError(
            f"base_classes: expected 2 or more of {num_classes} classes that are split by image, got {base_classes}"
        )
    if by_image:
        num_novel -= base_classes or num_classes // 2 if config.classes is None else len(config.classes)
    elif config.held_out == 0:
        config = config.but(held_out=HELD_OUT)
    if num_novel < 5:
        raise UserError(f"dataset: a sweep asks for 5-way episodes, {config.dataset} has {num_novel} novel classes")

    if not config.validation_episodes:
        config = config.but(validation_episodes=VALIDATION_EPISODES)

    def trial(margin: float, seed: int) -> Trial:
        drawn = by_image and config.classes is None
        classes = draw_base_classes(num_classes, seed, base_classes) if drawn else config.classes
        return Trial(group(margin), config.but(loss=loss.but(margin=margin), seed=seed, classes=classes), judging)

    trials = [trial(margin, seed) for seed in seeds for margin in margins]
    columns = COLUMNS | (VALIDATION if num_validation >= 5 else {})
    if judging.all_ways:
        columns = {f"all {num_novel} ways": "novel_all_ways_1shot"} | columns

    def pictures(results: Results) -> list[Picture]:
        panels = {
            panel: {name: [_shown(results, m, f) for m in margins] for name, f in lines.items()}
            for panel, lines in PANELS.items()
        }
        path = results.folder / "margins.png"
        sweep(path, margins, panels)
        return [Picture(path, "Accuracy on base and novel classes, and their discriminability φ, against the margin.")]

    return Study(
        name,
        f"Margin softmax on {config.data}, {config.backbone.title}, scale {loss.scale:g}, {loss.similarity}",
        f"Each network is trained for {config.epochs} epochs on {len(trials[0].config.classes or ()) or num_classes} "
        f"base classes; {judging.episodes} episodes ask for novel ones, with a cosine head fine-tuned per episode or "
        "the nearest centroid. φ is the mean squared distance between class centres over that within classes.",
        trials,
        columns,
        group(0.0) if 0.0 in margins else None,
        _claims(config.dataset, margins, columns),
        more_tables=lambda results: [_convergence_table(results)],
        pictures=pictures,
    )


def _convergence_table(results: Results) -> Table:
    rows = [[g, results.stopped_early(g) or "all converged"] for g in results.groups]
    title = "Converged: the mean of five epochs up by less than half a point over the last fifth of the epochs"
    return Table(f"{title}, ten at least", ["", "trainings that stopped early"], rows, numeric=False)


def _shown(results: Results, margin: float, figure: str) -> list[float]:
    """A value a seed; fractions in percent."""
    factor = 1 if "discriminability" in figure else 100
    return [factor * value for value in results.values(group(margin), figure).values()]


def _claims(dataset: str, margins: Sequence[float], columns: Mapping[str, str]) -> list[Claim]:
    claims = []
    shots = {title: figure for title, figure in columns.items() if title == "1-shot" or title.startswith("all ")}
    if dataset != "mini-imagenet":
        published = "62.33% (1-shot) and 80.94% (5-shot) on mini-ImageNet with ResNet-18"
        claims.append(Claim(SOURCE, published, reason="needs mini-ImageNet and a GPU"))
    if 0.0 not in margins:
        return claims
    for m in sorted(set(margins) - {0.0}):
        kind, effect, base = ("negative", "helps", False) if m < 0 else ("positive", "harms", True)
        pair = (group(0.0), group(m)) if base else (group(m), group(0.0))
        of = "base" if base else "novel"
        claims += [
            Claim(
                SOURCE, f"a {kind} margin {effect} novel classes (m = {m:g}, {title})", *pair, figure, of_converged=True
            )
            for title, figure in shots.items()
        ]
        more = f"a {kind} margin makes {of} classes more discriminable (m = {m:g})"
        claims.append(Claim(SOURCE, more, group(m), group(0.0), COLUMNS[f"φ {of}"], of_converged=True))
    return claims
