"""Everything a trained network is judged on, by the classes it is judged on."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..core.similarity import unit_rows
from . import metrics
from .config import Judging
from .datasets import ImageSet, Task, one_shot_runs
from .episodes import centroid_accuracy, episodes_of, head_accuracy
from .terminal import UserError
from .trainer import Trainer

WAYS = 5  # of an episode, if nothing else is said
VINYALS = "omniglot"  # the data set whose training classes are of all alphabets


def check_judging(task: Task, judging: Judging, dataset: str) -> None:
    """Raise a `UserError` for what cannot be judged on this data set: before the training, which may take hours."""
    unseen = task.validation if task.novel is None else task.novel
    if unseen is None:
        _refuse(
            judging,
            ("ways", "shots", "queries", "all_ways"),
            f"{dataset} has no novel classes for episodes (classes leaves some out)",
        )
    elif judging.ways is not None and max(judging.ways) > len(unseen.class_names):
        raise UserError(
            f"ways: expected at most the {len(unseen.class_names)} novel classes of {dataset}, got {max(judging.ways)}"
        )
    if task.held_out is None:
        _refuse(judging, ("neighbours", "knc_clusters"), f"{dataset} has no held-out images (held_out keeps some)")
    for images in (task.validation, task.novel):
        if images is not None:
            check_shots(images, judging, dataset)
    channels = task.training.shape[0]
    if judging.official_runs:
        if channels != 1:
            raise UserError(f"official_runs: expected images of one channel as these drawings have, got {channels}")
        if dataset == VINYALS:
            raise UserError(
                f"official_runs: the training classes of {dataset} are of the runs' own alphabets, too; train on "
                "omniglot-background"
            )
        one_shot_runs(task.training.shape[1])  # or they are not there, which it says


def check_shots(images: ImageSet, judging: Judging, dataset: str) -> None:
    """Raise a `UserError` where a class is too small for episodes."""
    sizes = images.labels.bincount(minlength=len(images.class_names))
    smallest, name, shots = int(sizes.min()), images.class_names[int(sizes.argmin())], max(judging.shots)
    if shots >= smallest:
        raise UserError(
            f"shots: expected fewer than the {smallest} images of class {name} of {dataset}, got {shots}; leave out "
            "those with fewer (of features by fused-margins embed --without NAME)"
        )


def _refuse(judging: Judging, names: Sequence[str], reason: str) -> None:
    """Raise a `UserError` where one of these is set to what nothing would come of."""
    for name in names:
        if getattr(judging, name) != Judging.model_fields[name].default:
            raise UserError(f"{name}: {reason}")


def evaluate(trainer: Trainer, task: Task, judging: Judging) -> dict[str, float]:
    """Figures of held-out images of the training classes and of novel classes, as far as the task has them.

    By the fastest kernels at hand, whatever the training took: a comparison of backends judges all of them alike.

    Args:
        trainer: holds the network; it trained on `task.training`.
        task: what to judge on; by fine labels, but for accuracy and kNC error, which ask for the training labels.
        judging: episodes, ways, shots, neighbours, and the seed that gives every network the same ones.

    Returns:
        Fractions in [0, 1], but for `discriminability` and `modes`. `validation_...` and `novel_...` are of classes
        that the training never saw (`validation_...` of other images, where a data set is split by image);
        `..._interval` is half a 95% interval over episodes as the few-shot papers take it (1.96 standard deviations
        with ddof 0, over the root of their number), `..._student` by Student's t; of a recall it is over the images
        that ask.
    """
    figures: dict[str, float] = {}
    if task.held_out is not None:
        figures |= _judge_held_out(trainer, task.training, task.held_out, judging)
    for name, images in (("validation", task.validation), ("novel", task.novel)):
        if images is not None:
            judged = _judge_unseen(trainer, images, judging)
            figures |= {f"{name}_{figure}": value for figure, value in judged.items()}
    if judging.official_runs:
        accuracy, interval = official_runs_accuracy(trainer.embed_pixels, trainer.images.shape[1])
        figures |= {"official_runs": accuracy, "official_runs_student": interval}
    return figures


def _judge_held_out(trainer: Trainer, training: ImageSet, held_out: ImageSet, judging: Judging) -> dict[str, float]:
    config = trainer.config
    embeddings = trainer.embed(held_out)
    labels, targets = held_out.labels, held_out.targets(config.labels).to(embeddings.device)
    figures = {
        **_judge_retrieval(embeddings, held_out, judging.judging_seed),
        "discriminability": metrics.discriminability(embeddings, labels),
    }
    errors = metrics.knc_errors(
        trainer.embed(training),
        training.targets(config.labels),
        embeddings,
        targets,
        judging.neighbours,
        judging.knc_clusters,
        seed=judging.judging_seed,
    )
    figures |= {f"knc_error@{l}": error for l, error in errors.items()}
    if len(held_out.coarse_names) < len(held_out.class_names):
        kept, _ = metrics.modes_kept(embeddings, labels, held_out.coarse_labels, judging.judging_seed)
        figures["modes"] = float(kept.mean())
    classifier = trainer.objective.classifier()
    if classifier is not None:
        with torch.no_grad():
            predicted = classifier.predictions(embeddings).argmax(dim=1)
        figures["accuracy"] = float((predicted == targets).float().mean())
    return figures


def _judge_retrieval(embeddings: Tensor, images: ImageSet, seed: int) -> dict[str, float]:
    labels = images.labels
    recalls = metrics.recall_at_k(embeddings, labels, groups=images.groups)
    return {
        **recalls,
        **{f"{name}_interval": metrics.interval_of_share(value, len(labels)) for name, value in recalls.items()},
        "map@r": metrics.mean_average_precision_at_r(embeddings, labels, groups=images.groups),
        **metrics.cluster_agreement(embeddings, labels, seed=seed),
    }


def _judge_unseen(trainer: Trainer, images: ImageSet, judging: Judging) -> dict[str, float]:
    embeddings = trainer.embed(images)
    generator = torch.Generator().manual_seed(judging.judging_seed)
    figures: dict[str, float] = {}
    classes = len(images.class_names)
    ways = {min(WAYS, classes)} - {1} if judging.ways is None else {n for n in judging.ways if n <= classes}
    for n_way in sorted(ways):
        for k_shot in judging.shots:
            episodes = episodes_of(images.labels, n_way, k_shot, judging, generator)
            for kind, accuracy in (
                ("", head_accuracy(embeddings, episodes, generator)),
                ("_centroid", centroid_accuracy(embeddings, episodes)),
            ):
                figures |= _of_episodes(f"{n_way}way_{k_shot}shot{kind}", accuracy)
    if judging.all_ways:
        episodes = episodes_of(images.labels, classes, 1, judging, generator)
        figures |= _of_episodes("all_ways_1shot", centroid_accuracy(embeddings, episodes))
    figures |= _judge_retrieval(embeddings, images, judging.judging_seed)
    figures["discriminability"] = metrics.discriminability(embeddings, images.labels)
    return figures


def _of_episodes(name: str, accuracy: Tensor) -> dict[str, float]:
    mean, interval = metrics.mean_and_interval(accuracy)
    student = metrics.mean_and_student_interval(accuracy)[1]
    return {name: mean, f"{name}_interval": interval, f"{name}_student": student}


def official_runs_accuracy(embed: Callable[[Tensor], Tensor], image_size: int) -> tuple[float, float]:
    """Mean accuracy of the 20 official one-shot runs of Omniglot, and half its 95% interval over runs (Student's t).

    Each run is 20-way within an alphabet: a test image goes to the training image of the most similar embedding.

    Args:
        embed: (20, 1, image_size, image_size) -> (20, D).
        image_size: in pixels.
    """
    runs = one_shot_runs(image_size)
    accuracies = []
    for training, test, answers in zip(runs.training, runs.test, runs.answers):
        similarity = unit_rows(embed(test)) @ unit_rows(embed(training)).T
        accuracies.append(float((similarity.argmax(dim=1).cpu() == answers).float().mean()))
    return metrics.mean_and_student_interval(accuracies)
