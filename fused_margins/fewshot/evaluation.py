"""Everything a trained network is judged on, by the classes it is judged on."""

from typing import Any

import torch

from . import metrics
from .datasets import ImageSet, Task
from .episodes import centroid_accuracy, head_accuracy, sample_episodes
from .trainer import Trainer

SHOTS = (1, 5)


def evaluate(trainer: Trainer, task: Task, *, num_episodes: int = 600, seed: int = 0) -> dict[str, Any]:
    """Figures of the held-out images of the training classes, and of the novel classes, as far as the task has them.

    Args:
        trainer: holds the network; it trained on `task.training`.
        task: what to judge on; by fine labels, but for accuracy and kNC error, which ask for the training labels.
        num_episodes: few-shot episodes for each number of shots.
        seed: of clusters and episodes; the same seed gives the same episodes to every network.
    """
    figures: dict[str, Any] = {}
    if task.held_out is not None:
        figures |= _judge_held_out(trainer, task.training, task.held_out, seed)
    if task.novel is not None:
        figures |= _judge_novel(trainer, task.novel, num_episodes, seed)
    return figures


def _judge_held_out(trainer: Trainer, training: ImageSet, held_out: ImageSet, seed: int) -> dict[str, float]:
    config = trainer.config
    embeddings = trainer.embed(held_out)
    labels, targets = held_out.labels, held_out.targets(config.labels).to(embeddings.device)
    knc_error = metrics.knc_error(
        trainer.embed(training),
        training.targets(config.labels),
        embeddings,
        targets,
        seed=seed,
        backend=config.backend,
    )
    figures = {
        **metrics.recall_at_k(embeddings, labels, backend=config.backend),
        **metrics.cluster_agreement(embeddings, labels, seed=seed),
        "knc_error": knc_error,
        "discriminability": metrics.discriminability(embeddings, labels),
    }
    classifier = trainer.objective.classifier()
    if classifier is not None:
        with torch.no_grad():
            predicted = classifier.predictions(embeddings).argmax(dim=1)
        figures["accuracy"] = float((predicted == targets).float().mean())
    return figures


def _judge_novel(trainer: Trainer, novel: ImageSet, num_episodes: int, seed: int) -> dict[str, float]:
    embeddings = trainer.embed(novel)
    generator = torch.Generator().manual_seed(seed)
    figures = {}
    for k_shot in SHOTS:
        episodes = sample_episodes(
            novel.labels,
            n_way=min(5, len(novel.class_names)),
            k_shot=k_shot,
            num_episodes=num_episodes,
            generator=generator,
        )
        for kind, accuracy in (
            ("", head_accuracy(embeddings, episodes, generator)),
            ("_centroid", centroid_accuracy(embeddings, episodes)),
        ):
            name = f"novel_{k_shot}shot{kind}"
            figures[name], figures[f"{name}_interval"] = metrics.mean_and_interval(accuracy)
    agreement = metrics.cluster_agreement(embeddings, novel.labels, seed=seed)
    figures["novel_nmi"], figures["novel_purity"] = agreement["nmi"], agreement["purity"]
    figures["novel_discriminability"] = metrics.discriminability(embeddings, novel.labels)
    return figures
