"""Easy positives: trained on coarse labels, judged on fine ones. Does a class keep its modes?

Source: Levi et al., Rethinking preventing class-collapsing in metric learning with margin-based losses, 2020.
"""

from collections.abc import Mapping, Sequence
from typing import get_args

from ..config import InfoNCE, Judging, Loss, MarginLoss, Negatives, Positives, Softmax, TrainConfig, Triplet
from ..terminal import UserError
from ..trials import task_of, trials_of
from . import Claim, Study

SOURCE = "Levi et al. 2020"
EPHN = "EPHN, temperature 0.1"  # Xuan et al., Improved embeddings with easy positive triplet mining, 2020
OF_PAIRS = {"triplet": Triplet, "margin": MarginLoss, "InfoNCE": InfoNCE}
COLUMNS = {
    "Recall@1": "recall@1",
    "Recall@2": "recall@2",
    "Recall@4": "recall@4",
    "Recall@8": "recall@8",
    "MAP@R": "map@r",
    "NMI": "nmi",
    "modes": "modes",
}


def positive_methods(kinds: Sequence[Positives] = get_args(Positives)) -> dict[str, Loss]:
    """These positives for each loss of pairs; beside them softmax, and EPHN: the easiest one, the hardest negative."""
    return {
        "softmax": Softmax(scale=10.0),
        **{f"{name}, {p} positives": pairs(positives=p) for name, pairs in OF_PAIRS.items() for p in kinds},
        EPHN: InfoNCE(negatives="hard", temperature=0.1),
    }


def few_methods() -> dict[str, Loss]:
    """Easy against random positives."""
    return positive_methods(("random", "easy"))


def all_methods() -> dict[str, Loss]:
    """Every positive with every negative, for every loss of pairs."""
    methods: dict[str, Loss] = {}
    for p in get_args(Positives):
        for n in get_args(Negatives):
            for name, pairs in OF_PAIRS.items():
                methods[f"{name}, {p} positives, {n} negatives"] = pairs(positives=p, negatives=n)
        methods[f"InfoNCE, {p} positives, all negatives"] = InfoNCE(positives=p)
    return methods


def check_hierarchy(config: TrainConfig) -> None:
    """Refuse fine labels, and data without coarse ones or without held-out images of the training classes."""
    if config.labels != "coarse":
        raise UserError(f"labels: the training is on coarse labels, the judgement on fine ones: got {config.labels}")
    held_out = task_of(config).held_out
    if held_out is None:
        raise UserError(f"held_out: {config.dataset} has no other images of its training classes: hold some out (0.1)")
    if len(held_out.coarse_names) >= len(held_out.class_names):
        raise UserError(f"dataset: {config.dataset} has no coarse labels (a file of features has them as `coarse`)")


def coarse_to_fine_study(
    config: TrainConfig,
    methods: Mapping[str, Loss],
    seeds: Sequence[int],
    judging: Judging,
    name: str = "coarse-to-fine",
) -> Study:
    """The same training with every loss and seed; `config` says the rest."""
    check_hierarchy(config)
    claims = []
    for method in methods:
        other = method.replace("easy positives", "random positives")
        if other != method and other in methods:
            claims += [
                Claim(
                    SOURCE, f"easy positives keep fine classes apart ({method}, {title})", method, other, COLUMNS[title]
                )
                for title in ("Recall@1", "NMI", "modes")
            ]
    claims.append(
        Claim(SOURCE, "state of the art on CUB, Cars and In-shop", reason="needs their images and ImageNet weights")
    )
    return Study(
        name,
        f"Coarse to fine on {config.data}, {config.backbone.title}, {len(methods)} methods",
        f"Trained for {config.epochs} epochs on coarse labels, judged on the fine labels of held-out images. "
        "Modes: how many fine classes of a coarse one stay apart.",
        trials_of(config, methods, seeds, judging),
        COLUMNS,
        claims=claims,
    )
