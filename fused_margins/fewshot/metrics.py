"""How good embeddings are: figures in [0, 1] unless said otherwise."""

import math
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from scipy.stats import t as student_t
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix
from torch import Tensor

from .. import MagnetIndex
from ..ops.nearest import nearest


def recall_at_k(
    embeddings: Tensor, labels: Tensor, ks: Sequence[int] = (1, 2, 4, 8), backend: str = "auto"
) -> dict[str, float]:
    """Fraction of samples (N, D) with one of their label (N,) among their k nearest others, by cosine, for each k.

    >>> embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 0.9]])
    >>> recall_at_k(embeddings, torch.tensor([0, 0, 1, 0]), ks=(1, 3))
    {'recall@1': 0.5, 'recall@3': 0.75}
    """
    labels = labels.to(embeddings.device)
    itself = torch.arange(len(labels), device=labels.device)
    _, nearest_others = nearest(
        embeddings, embeddings, labels, labels, relation="any", k=max(ks), self_index=itself, backend=backend
    )
    hits = (labels[nearest_others] == labels[:, None]) & (nearest_others >= 0)  # -1: fewer than k others
    return {f"recall@{k}": float(hits[:, :k].any(dim=1).double().mean()) for k in ks}


def purity(labels: Tensor, clusters: Tensor) -> float:
    """Fraction of samples whose label is the most frequent one of their cluster.

    >>> purity(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 0, 1]))
    0.75
    """
    table = contingency_matrix(labels.numpy(), clusters.numpy())
    return float(table.max(axis=0).sum() / table.sum())


def cluster_agreement(embeddings: Tensor, labels: Tensor, seed: int = 0) -> dict[str, float]:
    """NMI and purity of k-means clusters, as many as there are classes, against the labels."""
    num_classes = len(torch.unique(labels))
    with warnings.catch_warnings():
        # Collapsed embeddings have fewer distinct points than clusters: a poor score, and no fault of k-means.
        warnings.simplefilter("ignore", ConvergenceWarning)
        clusters = KMeans(num_classes, n_init=10, random_state=seed).fit_predict(embeddings.cpu().numpy())
    truth = labels.cpu()
    return {
        "nmi": float(normalized_mutual_info_score(truth.numpy(), clusters)),
        "purity": purity(truth, torch.from_numpy(clusters)),
    }


def knc_error(
    train_embeddings: Tensor,
    train_labels: Tensor,
    embeddings: Tensor,
    labels: Tensor,
    clusters_per_class: int = 5,
    num_neighbours: int = 10,
    seed: int = 0,
    backend: str = "auto",
) -> float:
    """Error of the k-nearest-clusters classifier whose clusters are fitted to the training embeddings."""
    index = MagnetIndex(clusters_per_class, generator=torch.Generator().manual_seed(seed), backend=backend)
    index.fit(train_embeddings, train_labels.to(train_embeddings.device))
    predicted = index.knc_predict(embeddings, num_neighbours=num_neighbours)
    return float((predicted != labels.to(predicted.device)).float().mean())


def discriminability(embeddings: Tensor, labels: Tensor) -> float:
    """phi = D_inter / D_intra of unit-length embeddings: squared distances between class centres and within classes.

    Source: Liu et al., Negative margin matters: understanding margin in few-shot classification, 2020, analysis of
    discriminability.
    """
    unit, labels = F.normalize(embeddings), labels.to(embeddings.device)
    classes = torch.unique(labels)
    centres = torch.stack([unit[labels == c].mean(0) for c in classes])
    within = torch.stack([(unit[labels == c] - m).square().sum(1).mean() for c, m in zip(classes, centres)])
    between = torch.cdist(centres, centres).square().sum() / (len(classes) * (len(classes) - 1))
    return float(between / within.mean())


def mean_and_interval(values: Sequence[float] | Tensor) -> tuple[float, float]:
    """Mean, and half the width of its 95% interval: 1.96 std / sqrt(n), std with ddof 0 as the few-shot papers take it.

    >>> mean_and_interval([1.0, 3.0])
    (2.0, 1.3859292911256331)
    """
    x = torch.as_tensor(values, dtype=torch.float64)
    return float(x.mean()), float(1.96 * x.std(correction=0) / math.sqrt(len(x)))


def mean_and_student_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95% interval by Student's t, for few seeds (0 for a single one).

    >>> mean, interval = mean_and_student_interval([1.0, 3.0])
    >>> mean, round(interval, 3)
    (2.0, 12.706)
    """
    x = torch.as_tensor(values, dtype=torch.float64)
    if len(x) < 2:
        return float(x.mean()), 0.0
    return float(x.mean()), float(student_t.ppf(0.975, len(x) - 1) * x.std() / math.sqrt(len(x)))
