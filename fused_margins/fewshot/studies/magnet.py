"""The magnet loss beside softmax and triplet, after equally many images: kNC error, and the hierarchy that it recovers.

Source: Rippel et al., Metric learning with adaptive density discrimination, 2015.
"""

from collections.abc import Sequence

import torch

from ... import MagnetIndex
from ..config import Judging, Loss, Magnet, Softmax, TrainConfig, Triplet
from ..plots import cluster_map, map_sample, sweep, variance_curves
from ..reports import Picture, Table
from ..runs import Run
from ..terminal import UserError
from ..trainer import Trainer
from ..trials import task_of, trials_of
from . import Claim, Results, Study
from .coarse_to_fine import check_hierarchy

SHOWN = 600  # samples in a map of clusters
SOURCE = "Rippel et al. 2015"
RECOVERS = "magnet recovers the hierarchy below its labels better than {} (Recall@1)"
NEIGHBOURS = (1, 2, 4, 8, 16, 32, 64, 128)
COLUMNS = {"Recall@1": "recall@1", "MAP@R": "map@r", "NMI": "nmi", "modes": "modes", "kNC error": "knc_error@8"}


def magnet_study(
    config: TrainConfig, seeds: Sequence[int], judging: Judging, magnet: Magnet | None = None, name: str = "magnet"
) -> Study:
    """Magnet, softmax and triplet from the same settings; an epoch shows each about as many images as there are."""
    hierarchy = config.labels == "coarse"
    if hierarchy:
        check_hierarchy(config)
    elif task_of(config).held_out is None:
        raise UserError(f"held_out: {config.dataset} has no other images of its training classes: hold some out (0.1)")
    magnet = magnet or Magnet()
    methods: dict[str, Loss] = {
        "magnet": magnet,
        "softmax": Softmax(scale=magnet.scale),
        "triplet": Triplet(positives="random"),
    }
    judging = judging.but(neighbours=NEIGHBOURS, knc_clusters=magnet.clusters_per_class)

    def knc_table(results: Results) -> list[Table]:
        columns = {f"L = {l}": f"knc_error@{l}" for l in NEIGHBOURS}
        return [results.table("kNC error against the number of nearest clusters L", columns)]

    def pictures(results: Results) -> list[Picture]:
        errors = {
            g: [[100 * e for e in results.values(g, f"knc_error@{l}").values()] for l in NEIGHBOURS]
            for g in results.groups
        }
        path = results.folder / "knc.png"
        sweep(path, NEIGHBOURS, {"kNC error, %": errors}, x_label="nearest clusters L")
        picture = Picture(
            path, "Error of the k-nearest-cluster classifier against the number of clusters that it asks."
        )
        return [picture, *_cluster_pictures(results)]

    return Study(
        name,
        f"Magnet on {config.data}, {config.backbone.title}",
        f"Trained for {config.epochs} epochs on {config.labels} labels: the kNC error is of these, with "
        f"{magnet.clusters_per_class} clusters a class; "
        + ("all else is judged on the fine labels, which no training saw. " if hierarchy else "")
        + "An epoch shows each method about as many images as there are, in batches of its own size.",
        trials_of(config, methods, seeds, judging),
        COLUMNS if hierarchy else {title: figure for title, figure in COLUMNS.items() if title != "modes"},
        baseline="softmax",
        claims=_claims(hierarchy),
        more_tables=knc_table,
        pictures=pictures,
    )


def _claims(hierarchy: bool) -> list[Claim]:
    others, claims = ("softmax", "triplet"), []
    if hierarchy:
        claims += [Claim(SOURCE, RECOVERS.format(other), "magnet", other, "recall@1") for other in others]
    classifies = "magnet classifies better than {} with kNC"
    claims += [Claim(SOURCE, classifies.format(other), other, "magnet", "knc_error@8") for other in others]
    of_pets = "state of the art on Stanford Dogs, Oxford Flowers and Pets"
    return [*claims, Claim(SOURCE, of_pets, reason="needs their images and ImageNet weights")]


def _cluster_pictures(results: Results) -> list[Picture]:
    """Of the first seed: a map of each method's clusters, and how wide they are."""
    pictures, variances = [], {}
    for group in results.groups:
        (trial, _), *_ = results.of(group)
        task = task_of(trial.config)
        trainer = Trainer(trial.config, task.training)
        Run(results.folder / trial.name).load_checkpoint(trainer.load_state_dict)
        embeddings = trainer.embed(task.training).cpu()
        labels = task.training.targets(trial.config.labels)
        names = task.training.class_names if trial.config.labels == "fine" else task.training.coarse_names
        index = MagnetIndex(trial.judging.knc_clusters, generator=torch.Generator().manual_seed(0))
        index.fit(embeddings, labels)
        squared = (embeddings - index.centroids[index.assignments]).square().sum(1)
        variances[group] = [float(squared[labels == c].mean()) for c in labels.unique()]
        shown = map_sample(labels, limit=SHOWN)
        path = results.folder / f"clusters-{group}.png"
        cluster_map(path, embeddings[shown], labels[shown], index.centroids, index.centroid_labels, names)
        pictures.append(Picture(path, f"{group}: training samples and the centroids of their clusters, in the plane."))
    path = results.folder / "variances.png"
    variance_curves(path, variances)
    return [*pictures, Picture(path, "Mean squared distance to the own centroid, class by class.")]
