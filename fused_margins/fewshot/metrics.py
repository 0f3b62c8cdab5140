"""How good embeddings are: figures in [0, 1] unless said otherwise."""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from scipy.stats import t as student_t
from sklearn.metrics import mutual_info_score, normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix, expected_mutual_information
from torch import Tensor

from .. import MagnetIndex, kmeans_per_class
from ..core.reductions import sum_by
from ..ops.nearest import nearest

FEW_NEIGHBOURS = 200  # from here on a product and torch's top-k are faster than a search that keeps the k best sorted
NUMBERS_AT_ONCE = 1 << 22  # of a block of rows: similarities, or neighbours


def recall_at_k(
    embeddings: Tensor,
    labels: Tensor,
    ks: Sequence[int] = (1, 2, 4, 8),
    groups: Tensor | None = None,
) -> dict[str, float]:
    """Fraction of samples (N, D) with one of their label (N,) among their k nearest others, by cosine, for each k.

    Others are those of other `groups` (N,), where samples come in groups (frames of one thing): it would be too easy.

    >>> embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 0.9]])
    >>> recall_at_k(embeddings, torch.tensor([0, 0, 1, 0]), ks=(1, 3))
    {'recall@1': 0.5, 'recall@3': 0.75}
    """
    labels = labels.to(embeddings.device)
    index = nearest_others(embeddings, max(ks), groups)
    hits = (labels[index] == labels[:, None]) & (index >= 0)  # -1: fewer than k others
    return {f"recall@{k}": float(hits[:, :k].any(dim=1).double().mean()) for k in ks}


def mean_average_precision_at_r(embeddings: Tensor, labels: Tensor, groups: Tensor | None = None) -> float:
    """MAP@R: how early the R others of its class come among the R nearest others of a sample, by cosine.

        MAP@R = mean over samples of  1/R sum_{k <= R, k-th is of the class} (how many of the first k are) / k

    Samples without others of their class are left out; 0 where all are. `groups` as above. Neighbours are searched in
    blocks of rows, of about 4 million similarities or neighbours at once.

    Source: Musgrave et al., A metric learning reality check, 2020, section 3.2.

    >>> embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 0.9]])
    >>> mean_average_precision_at_r(embeddings, torch.tensor([0, 0, 1, 0]))  # 1, 1 and, of the last one, 1/4
    0.75
    """
    labels = labels.to(embeddings.device)
    own = torch.arange(len(labels)) if groups is None else groups
    mates = _sizes(labels) - _sizes(torch.stack([labels, own.to(labels.device)]))  # (N,) R of each sample
    most = int(mates.max())
    if most == 0:
        return 0.0
    rank = torch.arange(1, most + 1, device=labels.device)
    total = 0.0
    for rows, index in _neighbours(embeddings, most, groups):
        hits = (labels[index] == labels[rows, None]) & (rank <= mates[rows, None]) & (index >= 0)
        precision = (hits.cumsum(1) / rank.double()) * hits
        total += float((precision.sum(1) / mates[rows].clamp(min=1)).sum())
    return total / int((mates > 0).sum())


def _sizes(keys: Tensor) -> Tensor:
    """(N,) how many of the keys (..., N) equal each one."""
    _, place, count = torch.unique(keys, dim=-1, return_inverse=True, return_counts=True)
    return count[place]


def nearest_others(embeddings: Tensor, k: int, groups: Tensor | None = None) -> Tensor:
    """Index (N, k) of the k nearest other samples of each one, by cosine, nearest first; -1 where there are fewer.

    With `groups` (N,) the nearest of other groups.

    >>> nearest_others(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]), k=2)
    tensor([[1, 2],
            [0, 2],
            [1, 0]])
    """
    return torch.cat([index for _, index in _neighbours(embeddings, k, groups)])


def _neighbours(embeddings: Tensor, k: int, groups: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows, and their k nearest others."""
    size, unit = len(embeddings), F.normalize(embeddings.float())
    group = torch.arange(size) if groups is None else groups
    group = group.to(unit.device)  # each a group of its own: all but itself are others
    few = k < FEW_NEIGHBOURS
    step = max(1, NUMBERS_AT_ONCE // max(1, k if few else size))
    for start in range(0, size, step):
        rows = slice(start, start + step)
        if few:
            yield rows, nearest(unit[rows], unit, group[rows], group, relation="different", k=k)[1]
            continue
        similarity = (unit[rows] @ unit.T).masked_fill_(group[rows, None] == group, -torch.inf)
        nearest_first = similarity.topk(min(k, size - 1), dim=1)
        index = nearest_first.indices.masked_fill(nearest_first.values == -torch.inf, -1)
        yield rows, F.pad(index, (0, k - index.shape[1]), value=-1)


def purity(labels: Tensor, clusters: Tensor) -> float:
    """Fraction of samples whose label is the most frequent one of their cluster.

    >>> purity(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 0, 1]))
    0.75
    """
    table = contingency_matrix(labels.numpy(), clusters.numpy())
    return float(table.max(axis=0).sum() / table.sum())


def cluster_agreement(embeddings: Tensor, labels: Tensor, seed: int = 0) -> dict[str, float]:
    """NMI and purity of k-means clusters against the labels; as many clusters as there are classes.

    >>> cluster_agreement(torch.tensor([[0.0], [0.1], [5.0], [5.1]]), torch.tensor([0, 0, 1, 1]))
    {'nmi': 1.0, 'purity': 1.0}
    """
    truth = labels.cpu()
    clusters = _clusters(embeddings, len(torch.unique(truth)), seed)
    return {
        "nmi": float(normalized_mutual_info_score(truth.numpy(), clusters.numpy())),
        "purity": purity(truth, clusters),
    }


def _clusters(embeddings: Tensor, num_clusters: int, seed: int) -> Tensor:
    """(N,) the best k-means of ten restarts; of fewer where N x clusters is large: one at 20,000 x 1,000."""
    restarts = max(1, min(10, 20_000_000 // (len(embeddings) * num_clusters)))
    one_class = torch.zeros(len(embeddings), dtype=torch.int64, device=embeddings.device)
    generator = torch.Generator().manual_seed(seed)
    return kmeans_per_class(
        embeddings, one_class, num_clusters, num_iterations=100, num_restarts=restarts, generator=generator
    )[2].cpu()


def modes_kept(embeddings: Tensor, labels: Tensor, coarse_labels: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """How many of its fine classes each coarse class keeps apart, and how many it has: effective numbers, (C,) each.

        kept = exp( H (I - E) / (H - E) ),   present = exp(H)

    I is the mutual information between the fine labels of the coarse class and k-means clusters of its samples, as many
    as it has fine classes; H the entropy of the fine labels; E the information that such clusters have by chance.
    exp(I) is the number of equally frequent classes that the clusters tell apart: 2 where four classes lie in two
    places, whatever k-means makes of each place, and `present` where every class is a cluster. The correction is that
    of adjusted mutual information: without it 26 classes of 20 samples, all in one place, would seem to be 2 modes. It
    is right at both ends and takes too much between them: of two places 1.9 for 5 classes of 40, 1.6 for 26 of 20. 1
    where the clusters tell nothing, and where there is nothing to tell: one fine class, or no two samples of any.

    Args:
        embeddings: (N, D). labels, coarse_labels: (N,) integers.

    Returns:
        kept and present (C,), float64, in ascending order of the coarse labels.

    Source: the effective number of a distribution, Hill, Diversity and evenness, 1973; the correction for chance, Vinh
    et al., Information theoretic measures for clusterings comparison, 2010.

    >>> embeddings = torch.tensor([[0.0], [0.1], [0.0], [0.1], [5.0], [5.1], [9.0], [9.1]])
    >>> kept, present = modes_kept(embeddings, torch.arange(8) // 2, torch.arange(8) // 4)
    >>> kept.round(decimals=2), present.round(decimals=2)
    (tensor([1., 2.], dtype=torch.float64), tensor([2., 2.], dtype=torch.float64))
    """
    labels, coarse_labels = labels.cpu(), coarse_labels.cpu()
    kept, present = [], []
    for c in torch.unique(coarse_labels):
        members = (coarse_labels == c).nonzero()[:, 0]
        fine = labels[members]
        clusters = _clusters(embeddings[members.to(embeddings.device)], len(torch.unique(fine)), seed)
        table = contingency_matrix(fine.numpy(), clusters.numpy())
        most = float(mutual_info_score(fine.numpy(), fine.numpy()))  # the entropy
        chance = float(expected_mutual_information(table, len(fine)))
        share = 0.0
        if most - chance > 1e-9:
            share = max(0.0, (float(mutual_info_score(None, None, contingency=table)) - chance) / (most - chance))
        kept.append(math.exp(most * share))
        present.append(math.exp(most))
    return torch.tensor(kept, dtype=torch.float64), torch.tensor(present, dtype=torch.float64)


def knc_errors(
    train_embeddings: Tensor,
    train_labels: Tensor,
    embeddings: Tensor,
    labels: Tensor,
    num_neighbours: Sequence[int],
    clusters_per_class: int = 5,
    seed: int = 0,
) -> dict[int, float]:
    """Error of the k-nearest-clusters classifier for each number L of clusters that vote.

    The clusters are fitted once to the training embeddings, and searched once; where there are fewer than L, all vote.

    Source: Rippel et al., Metric learning with adaptive density discrimination, 2015, section 3.3.

    >>> train, labels = torch.tensor([[0.0], [1.0], [5.0], [6.0]]), torch.tensor([0, 0, 1, 1])
    >>> knc_errors(train, labels, train, labels, num_neighbours=[1, 4], clusters_per_class=2)
    {1: 0.0, 4: 0.0}
    """
    index = MagnetIndex(clusters_per_class, generator=torch.Generator().manual_seed(seed))
    index.fit(train_embeddings, train_labels.to(train_embeddings.device))
    predicted = index.knc_predictions(embeddings, num_neighbours)  # (len(num_neighbours), N)
    errors = (predicted != labels.to(predicted.device)).double().mean(1)
    return dict(zip(num_neighbours, errors.tolist()))


def discriminability(embeddings: Tensor, labels: Tensor) -> float:
    """phi = D_inter / D_intra of unit-length embeddings: squared distances between class centres and within classes.

        D_inter = mean over pairs of classes of |m_c - m_d|^2,   D_intra = mean over classes of mean_i |x_i - m_c|^2

    NaN where nothing is wide: no class wider than rounding, as where all embeddings are the same, or a single class.

    Source: Liu et al., Negative margin matters: understanding margin in few-shot classification, 2020, analysis of
    discriminability.

    >>> embeddings = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [0.6, 0.8]])
    >>> round(discriminability(embeddings, torch.tensor([0, 0, 1, 1])), 3)  # 0.72 between, 0.1 within
    7.2
    """
    unit = F.normalize(embeddings.double())
    _, label, size = torch.unique(labels.to(unit.device), return_inverse=True, return_counts=True)
    classes = len(size)
    centres = sum_by(label, unit, classes) / size[:, None]
    squared = (unit - centres[label]).square().sum(1, keepdim=True)
    within = (sum_by(label, squared, classes)[:, 0] / size).mean()
    # The mean over pairs is twice the variance of the centres, with one degree of freedom less: no C x C matrix.
    between = 2 * (centres - centres.mean(0)).square().sum() / (classes - 1)
    if within <= (4 * torch.finfo(embeddings.dtype).eps) ** 2:
        return math.nan  # a ratio of what rounding left
    return float(between / within)


def mean_and_interval(values: Sequence[float] | Tensor) -> tuple[float, float]:
    """Mean, and half the width of its 95% interval: 1.96 std / sqrt(n), std with ddof 0 as the few-shot papers take it.

    >>> mean_and_interval([1.0, 3.0])
    (2.0, 1.3859292911256331)
    """
    x = torch.as_tensor(values, dtype=torch.float64)
    return float(x.mean()), float(1.96 * x.std(correction=0) / math.sqrt(len(x)))


def interval_of_share(share: float, count: int) -> float:
    """Half the 95% interval of the share of `count` cases that were right: 1.96 sqrt(share (1 - share) / count).

    >>> round(interval_of_share(0.5, 100), 3)
    0.098
    """
    return 1.96 * math.sqrt(share * (1 - share) / count)


def mean_and_student_interval(values: Sequence[float] | Tensor) -> tuple[float, float]:
    """Mean, and half the width of its 95% interval by Student's t, for few seeds (0 for a single one).

    >>> mean, interval = mean_and_student_interval([1.0, 3.0])
    >>> mean, round(interval, 3)
    (2.0, 12.706)
    """
    x = torch.as_tensor(values, dtype=torch.float64)
    if len(x) < 2:
        return float(x.mean()), 0.0
    return float(x.mean()), float(student_t.ppf(0.975, len(x) - 1) * x.std() / math.sqrt(len(x)))
