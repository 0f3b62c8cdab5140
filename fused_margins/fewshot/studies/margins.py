"""Negative margins: accuracy on base and on novel classes, and discriminability, against the margin.

Source: Liu et al., Negative margin matters: understanding margin in few-shot classification, 2020.
"""

import math
from collections.abc import Sequence

import torch

from ..config import Judging, MarginSoftmax, TrainConfig
from ..datasets import load
from ..errors import UserError
from ..plots import sweep
from ..study import Claim, Picture, Results, Study
from ..trials import Trial

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
HELD_OUT = 0.1  # of each base class, where the data are split by class and the settings hold nothing out


PANELS = {
    "novel classes, %": {
        "1-shot": "novel_5way_1shot",
        "5-shot": "novel_5way_5shot",
        "1-shot, centroid": "novel_5way_1shot_centroid",
    },
    "base classes, %": {"accuracy": "accuracy"},
    "discriminability φ": {"novel": "novel_discriminability", "base": "discriminability"},
}


def group(margin: float) -> str:
    return f"m = {margin + 0.0:g}"  # -0.0 is 0


def half_of_the_classes(num_classes: int, seed: int) -> tuple[int, ...]:
    """Base classes where a data set has no split by class: another half for each seed, so that no lucky split decides.

    >>> half_of_the_classes(10, seed=0)
    (1, 3, 4, 5, 7)
    """
    order = torch.randperm(num_classes, generator=torch.Generator().manual_seed(seed))
    return tuple(sorted(order[: num_classes // 2].tolist()))


def margin_sweep_study(
    config: TrainConfig, margins: Sequence[float], seeds: Sequence[int], judging: Judging, name: str = "margins"
) -> Study:
    """The same training at every margin and seed; `config` says the rest, but some base images are always held out."""
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

    if by_image:
        num_novel -= num_classes // 2 if config.classes is None else len(config.classes)
    elif config.held_out == 0:
        config = config.model_copy(update={"held_out": HELD_OUT})
    if num_novel < 5:
        raise UserError(f"dataset: a sweep asks for 5-way episodes, {config.dataset} has {num_novel} novel classes")

    def trial(margin: float, seed: int) -> Trial:
        changes = {"loss": loss.model_copy(update={"margin": margin}), "seed": seed}
        if by_image and config.classes is None:
            changes["classes"] = half_of_the_classes(num_classes, seed)
        return Trial(group(margin), config.model_copy(update=changes), judging)

    trials = [trial(margin, seed) for seed in seeds for margin in margins]
    columns = COLUMNS | (VALIDATION if num_validation >= 5 else {})

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
        f"Margin softmax on {config.dataset}, {config.backbone.title}, scale {loss.scale:g}, {loss.similarity}",
        f"Each network is trained for {config.epochs} epochs on base classes; {judging.episodes} episodes ask for "
        "novel ones, with a cosine head fine-tuned per episode or the nearest centroid. φ is the mean squared "
        "distance between class centres over that within classes.",
        trials,
        columns,
        group(0.0) if 0.0 in margins else None,
        _claims(config.dataset, margins),
        pictures=pictures,
    )


def _shown(results: Results, margin: float, figure: str) -> list[float]:
    """A value a seed; fractions in percent."""
    factor = 1 if "discriminability" in figure else 100
    return [factor * value for value in results.values(group(margin), figure).values()]


def _claims(dataset: str, margins: Sequence[float]) -> list[Claim]:
    claims = []
    if dataset != "mini-imagenet":
        published = "62.33% (1-shot) and 80.94% (5-shot) on mini-ImageNet with ResNet-18"
        claims.append(Claim(SOURCE, published, reason="needs mini-ImageNet and a GPU"))
    if 0.0 not in margins:
        return claims
    for m in sorted(margins):
        if m < 0:
            claims += [
                Claim(
                    SOURCE,
                    f"a negative margin helps novel classes (m = {m:g}, 1-shot)",
                    group(m),
                    group(0.0),
                    COLUMNS["1-shot"],
                ),
                Claim(
                    SOURCE,
                    f"a negative margin makes novel classes more discriminable (m = {m:g})",
                    group(m),
                    group(0.0),
                    COLUMNS["φ novel"],
                ),
            ]
        elif m > 0:
            claims += [
                Claim(
                    SOURCE,
                    f"a positive margin harms novel classes (m = {m:g}, 1-shot)",
                    group(0.0),
                    group(m),
                    COLUMNS["1-shot"],
                ),
                Claim(
                    SOURCE,
                    f"a positive margin makes base classes more discriminable (m = {m:g})",
                    group(m),
                    group(0.0),
                    COLUMNS["φ base"],
                ),
            ]
    return claims
