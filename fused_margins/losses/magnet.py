"""The magnet loss as a module; `fused_margins.MagnetIndex` makes its batches."""

import torch
from torch import Tensor, nn

from ..backends import registry
from ..core import checks
from ..core.enums import Reduction
from ..functional import magnet_loss


class MagnetLoss(nn.Module):
    """Pull each sample to its own cluster's mean, away from the clusters of other classes, on the scale of their
    variance.

        loss_i = relu(alpha + |r_i - mu_own|^2 / 2 sigma^2 + log sum_m exp(-|r_i - mu_m|^2 / 2 sigma^2))

    with m over the clusters of other classes; means and variance are those of the batch.

    Args:
        alpha: the desired gap, in units of log odds.
        variance_floor: least sigma^2, positive, in squared units of the embeddings.
        reduction: "mean", "sum" or "none" (what `MagnetIndex.update_losses` takes).
        backend: "auto", or the name of one; see `fused_margins.explain`.

    Call: loss(embeddings (B, D), clusters (B,) in [0, M), cluster_labels (M,)) gives a scalar, or (B,) for "none";
    float32, float64 for float64. loss(embeddings, labels) takes every class of the batch for one cluster; the labels
    may be any integers. This form counts the classes, which makes a GPU wait; the form with clusters does not.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, unknown names, a variance floor that is not positive; on a
            CPU, a cluster without members. IndexError: on a CPU, a cluster out of range.

    Gradients: embeddings, also through the means and the variance.

    Source: Rippel et al., Metric learning with adaptive density discrimination, 2015, loss of a minibatch.

    >>> import torch
    >>> from fused_margins import MagnetLoss
    >>> loss = MagnetLoss(alpha=40.0)
    >>> embeddings = torch.tensor([[0.0], [0.2], [1.0], [1.2]])
    >>> loss(embeddings, clusters=torch.tensor([0, 0, 1, 1]), cluster_labels=torch.tensor([7, 8]))
    tensor(5.0000)
    >>> loss(embeddings, torch.tensor([7, 7, 8, 8]))
    tensor(5.0000)
    """

    def __init__(
        self, alpha: float = 1.0, variance_floor: float = 1e-4, reduction: str = "mean", backend: str = "auto"
    ) -> None:
        super().__init__()
        checks.choice("reduction", reduction, Reduction)
        self.alpha = checks.finite_number("alpha", alpha)
        self.variance_floor = checks.positive_number("variance_floor", variance_floor)
        self.reduction, self.backend = reduction, registry.known(backend)

    def forward(self, embeddings: Tensor, clusters: Tensor, cluster_labels: Tensor | None = None) -> Tensor:
        if cluster_labels is None:
            checks.matrices(embeddings, embeddings, ("embeddings", "embeddings"))
            checks.labels("labels", clusters, embeddings.shape[0], embeddings)
            cluster_labels, clusters = torch.unique(clusters, return_inverse=True)
        return magnet_loss(
            embeddings,
            clusters,
            cluster_labels,
            alpha=self.alpha,
            variance_floor=self.variance_floor,
            reduction=self.reduction,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"alpha={self.alpha:g}, variance_floor={self.variance_floor:g}, reduction={self.reduction!r}, "
            f"backend={self.backend!r}"
        )
