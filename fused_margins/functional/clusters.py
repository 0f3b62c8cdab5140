"""What magnets and their index are made of: the loss of a batch of clusters, and distances to centroids."""

from torch import Tensor

from ..core.enums import Similarity
from ..ops.magnet.op import magnet
from ..ops.scores.op import scores


def magnet_loss(
    embeddings: Tensor,
    clusters: Tensor,
    cluster_labels: Tensor,
    *,
    alpha: float = 1.0,
    variance_floor: float = 1e-4,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Pull each sample to its cluster's mean, away from the clusters of other classes, in units of their variance.

        loss_i = relu(alpha + d_{i,own} / 2 sigma^2 + log sum_{m: class(m) != class(i)} exp(-d_im / 2 sigma^2))
        d_im = |r_i - mu_m|^2,  mu_m the mean of the batch's samples of cluster m,  sigma^2 = sum_i d_{i,own} / (B - 1)

    Args:
        embeddings: (B, D) r, float64, float32, bfloat16 or float16.
        clusters: (B,) integers in [0, M): the cluster of each sample; every cluster needs a member.
        cluster_labels: (M,) integers: the class of each cluster.
        alpha: the desired gap, in units of log odds.
        variance_floor: least sigma^2, so that a batch of equal embeddings does not divide by 0.
        reduction: "mean", "sum" or "none".
        backend: "auto", or the name of one.

    Returns:
        A scalar, or (B,) for "none"; float32, float64 for float64 inputs. A batch of one class has loss 0.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, unknown names; on a CPU, a cluster without members.
        IndexError: on a CPU, a cluster out of range.

    Gradients: embeddings, also through the means and the variance; twice differentiable.

    Source: Rippel et al., Metric Learning with Adaptive Density Discrimination, 2015, loss of a
        minibatch.

    >>> import torch
    >>> from fused_margins.functional import magnet_loss
    >>> embeddings = torch.tensor([[0.0], [0.2], [1.0], [1.2]])
    >>> magnet_loss(embeddings, torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1]), alpha=40.0)
    tensor(5.0000)
    """
    options = {"alpha": alpha, "variance_floor": variance_floor, "reduction": reduction, "backend": backend}
    return magnet(embeddings, clusters, cluster_labels, names={"x": "embeddings"}, **options)  # type: ignore[arg-type]


def cluster_distances(embeddings: Tensor, centroids: Tensor, *, backend: str = "auto") -> Tensor:
    """Squared Euclidean distance of every embedding to every centroid.

        d_ik = |x_i - c_k|^2

    Args:
        embeddings: (B, D), float64, float32, bfloat16 or float16. centroids: (K, D), same dtype.
        backend: "auto", or the name of one.

    Returns:
        (B, K) in the dtype of the embeddings, never negative.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices.

    Gradients: embeddings, centroids; twice differentiable.

    Source: Rippel et al., Metric Learning with Adaptive Density Discrimination, 2015, distances of its loss.

    >>> import torch
    >>> from fused_margins.functional import cluster_distances
    >>> cluster_distances(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 0.0]]))
    tensor([[ 0.],
            [25.]])
    """
    names = {"x": "embeddings", "y": "centroids"}
    measure = Similarity.NEGATIVE_SQUARED_EUCLIDEAN
    return scores(embeddings, centroids, similarity=measure, sign=-1, backend=backend, names=names)
