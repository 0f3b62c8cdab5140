"""The magnet index: clusters within classes, the batches that they make, and classification by the nearest of them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends import registry
from ..core import checks
from ..core.enums import Relation, Similarity
from ..core.modules import keeps_values
from ..ops.nearest import nearest
from .kmeans import at_least_1, checked_embeddings, draw, kmeans_per_class, ordered_sum, sum_by

SAVED = ("centroids", "centroid_labels", "assignments", "variance", "cluster_losses", "losses_seen")
DERIVED = ("members", "sizes")


class MagnetBatch(NamedTuple):
    """Samples of M clusters, D each, grouped by cluster; the first cluster is the seed.

    indices: (M D,) int64 into the fitted set. clusters: (M D,) int64 in [0, M). cluster_labels: (M,) int64, their
        classes.
    """

    indices: Tensor
    clusters: Tensor
    cluster_labels: Tensor


class MagnetIndex(nn.Module):
    """Clusters of a whole training set: batches for the magnet loss, and classification by the nearest clusters.

    `fit` clusters each class by k-means. `sample_batch` draws a seed cluster in proportion to its mean loss and adds
    the nearest clusters of other classes, its impostors. Fit again from time to time: clusters age as the embeddings
    move.

    Args:
        clusters_per_class: K, at least 1.
        num_iterations, num_restarts: of k-means; see `kmeans_per_class`.
        variance_floor: least variance, positive, so that collapsed clusters do not divide by 0.
        generator: draws seeds and samples where a call gets none of its own; None for torch's global one.
        backend: "auto", or the name of one; see `fused_margins.explain`.

    Attributes:
        centroids: (M, D) float32 or float64. centroid_labels: (M,) int64, grouped in ascending order. classes: (C,)
            int64.
        assignments: (n,) int64, the cluster of each sample.
        variance: 0-d, sum_i |x_i - mu_own|^2 / (n - 1), at least the floor.
        cluster_losses: (M,) mean of the losses seen since the fit, 0 where none was.

    They move with the module, and a state dict restores a fitted index, also into a fresh one. They are no buffers,
    since only a fit says how large they are: copies of averaged weights keep the index that they were made with, and
    DistributedDataParallel leaves each process its own, which a fit on the same embeddings makes the same.

    Raises:
        ValueError, TypeError: shapes, dtypes, sizes below 1, embeddings that are not finite. RuntimeError: not fitted.

    Gradients: none.

    Source: Rippel et al., Metric learning with adaptive density discrimination, 2015, section 3.

    >>> import torch
    >>> from fused_margins import MagnetIndex, MagnetLoss
    >>> index = MagnetIndex(clusters_per_class=2, generator=torch.Generator().manual_seed(0))
    >>> embeddings, labels = torch.randn(60, 8), torch.arange(60) % 3
    >>> batch = index.fit(embeddings, labels).sample_batch(num_clusters=4, samples_per_cluster=5)
    >>> losses = MagnetLoss(reduction="none")(embeddings[batch.indices], batch.clusters, batch.cluster_labels)
    >>> index.update_losses(batch, losses)
    >>> index.knc_predict(embeddings).shape
    torch.Size([60])
    """

    centroids: Tensor
    centroid_labels: Tensor
    assignments: Tensor
    variance: Tensor
    cluster_losses: Tensor
    losses_seen: Tensor
    members: Tensor
    sizes: Tensor

    def __init__(
        self,
        clusters_per_class: int = 5,
        *,
        num_iterations: int = 20,
        num_restarts: int = 1,
        variance_floor: float = 1e-4,
        generator: torch.Generator | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        at_least_1(clusters_per_class=clusters_per_class, num_iterations=num_iterations, num_restarts=num_restarts)
        self.clusters_per_class = clusters_per_class
        self.variance_floor = checks.positive_number("variance_floor", variance_floor)
        self.num_iterations, self.num_restarts = num_iterations, num_restarts
        self.generator, self.backend = checks.generator(generator), registry.known(backend)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Forget the fit."""
        device = self.centroids.device if "centroids" in self.__dict__ else None
        none = torch.empty(0, dtype=torch.int64, device=device)
        self.centroids, self.centroid_labels = torch.empty(0, 0, device=device), none
        self.assignments, self.variance = none, torch.tensor(self.variance_floor, device=device)
        self.cluster_losses, self.losses_seen = torch.empty(0, device=device), none  # (M,) of how many each mean is
        # Derived from the assignments: the samples grouped by cluster, and the number in each.
        self.members = self.sizes = none

    @property
    def classes(self) -> Tensor:
        """(C,) int64, ascending: the labels of the fitted set, and the columns of `knc_scores`."""
        return torch.unique_consecutive(self.centroid_labels)

    @torch.no_grad()
    def fit(self, embeddings: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> "MagnetIndex":
        """Cluster the embeddings (n, D) of each label (n,); forgets the losses. Returns itself."""
        self.centroids, self.centroid_labels, self.assignments = kmeans_per_class(
            embeddings,
            labels,
            self.clusters_per_class,
            num_iterations=self.num_iterations,
            num_restarts=self.num_restarts,
            generator=self.generator if generator is None else generator,
            backend=self.backend,
        )
        squared = (embeddings - self.centroids[self.assignments]).square().sum(1)
        return self._fitted(ordered_sum(squared))

    def _fitted(self, squared: Tensor) -> "MagnetIndex":
        """What follows from centroids, assignments and the sum of squared distances; the losses are forgotten."""
        variance = squared / max(len(self.assignments) - 1, 1)
        self.variance = variance.to(self.centroids.dtype).clamp(min=self.variance_floor)
        self.cluster_losses = torch.zeros_like(self.centroids[:, 0])
        self.losses_seen = torch.zeros_like(self.centroid_labels)
        self._group_members()
        return self

    @torch.no_grad()
    def sample_batch(
        self, num_clusters: int = 6, samples_per_cluster: int = 8, generator: torch.Generator | None = None
    ) -> MagnetBatch:
        """A seed cluster, drawn in proportion to its mean loss, its nearest clusters of other classes, and samples of
        each.

        A cluster whose losses were never seen counts with the mean of the others; all alike where no loss is
        positive. Samples are drawn without replacement, from a cluster smaller than `samples_per_cluster` with
        replacement. With fewer clusters of other classes than `num_clusters` - 1, the batch has fewer.
        """
        self._require_fit()
        at_least_1(num_clusters=num_clusters, samples_per_cluster=samples_per_cluster)
        generator = self.generator if generator is None else checks.generator(generator)
        seed = draw(self._seed_weights(), torch.zeros_like(self.sizes), 1, generator)  # (1,)
        with torch.autocast(self.centroids.device.type, enabled=False):
            _, impostors = nearest(
                self.centroids[seed],
                self.centroids,
                self.centroid_labels[seed],
                self.centroid_labels,
                similarity=Similarity.NEGATIVE_SQUARED_EUCLIDEAN,
                relation=Relation.DIFFERENT,
                k=max(num_clusters - 1, 1),
                backend=self.backend,
            )
        chosen = torch.cat([seed, impostors[0, : num_clusters - 1]])
        chosen = chosen[chosen >= 0]
        first = (self.sizes.cumsum(0) - self.sizes)[chosen]
        drawn = [
            start + _draw_members(size, samples_per_cluster, generator)
            for start, size in zip(first.tolist(), self.sizes[chosen].tolist())
        ]
        places = torch.cat(drawn).to(self.members.device)
        clusters = torch.arange(len(chosen), device=chosen.device).repeat_interleave(samples_per_cluster)
        return MagnetBatch(self.members[places], clusters, self.centroid_labels[chosen])

    @torch.no_grad()
    def update_losses(self, batch: MagnetBatch, losses: Tensor) -> None:
        """Take the losses (M D,) of a batch into the mean of each cluster; those that are not finite are left out."""
        self._require_fit()
        if losses.shape != batch.indices.shape:
            expected = tuple(batch.indices.shape)
            raise ValueError(
                f'losses: expected one a sample, shape {expected} (MagnetLoss with reduction="none"), '
                f"got {tuple(losses.shape)}"
            )
        losses = losses.to(self.cluster_losses)
        finite = losses.isfinite()
        cluster = self.assignments[batch.indices.to(self.assignments.device)]
        seen = torch.bincount(cluster[finite], minlength=len(self.sizes))
        sum_of_losses = sum_by(cluster, torch.where(finite, losses, 0.0)[:, None], len(self.sizes))[:, 0]
        self.losses_seen = self.losses_seen + seen
        step = (sum_of_losses - seen * self.cluster_losses) / self.losses_seen.clamp(min=1)
        self.cluster_losses = self.cluster_losses + step

    @torch.no_grad()
    def knc_scores(self, embeddings: Tensor, num_neighbours: int = 128) -> Tensor:
        """Probability of each class (B, C), by the L nearest clusters; columns as in `classes`.

        p_ic = sum_{l: class(l) = c} exp(-|x_i - mu_l|^2 / 2 sigma^2) / sum_l exp(-|x_i - mu_l|^2 / 2 sigma^2)

        Args: embeddings (B, D), finite. num_neighbours: L; all clusters where there are fewer.
        """
        weight, column = self._votes(embeddings, num_neighbours)
        scores = weight.new_zeros(len(weight), len(self.classes))
        for l in range(
            weight.shape[1]
        ):  # one neighbour at a time: in a step no two addends meet, so their order is fixed
            scores.scatter_add_(1, column[:, l : l + 1], weight[:, l : l + 1])
        return scores

    def knc_predict(self, embeddings: Tensor, num_neighbours: int = 128) -> Tensor:
        """Label (B,) of the class with the highest score; see `knc_scores`."""
        return self.knc_predictions(embeddings, [num_neighbours])[0]

    @torch.no_grad()
    def knc_predictions(self, embeddings: Tensor, num_neighbours: Sequence[int]) -> Tensor:
        """Labels (len(num_neighbours), B) as of `knc_predict` for each number of neighbours, by a single search."""
        at_least_1(num_neighbours=min(num_neighbours))
        weight, column = self._votes(embeddings, max(num_neighbours))
        scores, winners = weight.new_zeros(len(weight), len(self.classes)), []
        for l in range(weight.shape[1]):
            scores.scatter_add_(1, column[:, l : l + 1], weight[:, l : l + 1])
            winners.append(scores.argmax(1) if l + 1 in (*num_neighbours, weight.shape[1]) else None)
        return torch.stack([self.classes[winners[min(l, len(winners)) - 1]] for l in num_neighbours])

    def _votes(self, embeddings: Tensor, num_neighbours: int) -> tuple[Tensor, Tensor]:
        """Weights (B, L) of the L nearest clusters, of sum 1, nearest first, and the columns of their classes."""
        self._require_fit()
        at_least_1(num_neighbours=num_neighbours)
        x = checked_embeddings(embeddings).to(self.centroids.dtype)
        if x.device != self.centroids.device or x.shape[1] != self.centroids.shape[1]:
            expected = f"width {self.centroids.shape[1]} on {self.centroids.device}, as they were fitted"
            raise ValueError(f"embeddings: expected {expected}, got width {x.shape[1]} on {x.device}")
        row_labels = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        with torch.autocast(x.device.type, enabled=False):
            u, index = nearest(
                x,
                self.centroids,
                row_labels,
                self.centroid_labels,
                similarity=Similarity.NEGATIVE_SQUARED_EUCLIDEAN,
                relation=Relation.ANY,
                k=min(num_neighbours, len(self.sizes)),
                backend=self.backend,
            )  # (B, L)
        weight = torch.softmax(u / (2 * self.variance), dim=1)  # shifts by the nearest: never 0 / 0
        return weight, torch.searchsorted(self.classes, self.centroid_labels)[index]

    def extra_repr(self) -> str:
        fitted = "not fitted"
        if len(self.sizes):
            fitted = f"{len(self.sizes)} clusters of {len(self.classes)} classes, {len(self.assignments)} samples"
        return (
            f"clusters_per_class={self.clusters_per_class}, num_iterations={self.num_iterations}, "
            f"variance_floor={self.variance_floor:g}, backend={self.backend!r}: {fitted}"
        )

    def _require_fit(self) -> None:
        if not len(self.sizes):
            raise RuntimeError("MagnetIndex is not fitted: call fit(embeddings, labels) first")

    def _seed_weights(self) -> Tensor:
        """(M,) mean losses; the mean over the others where none was seen, ones where no loss is positive."""
        seen = self.losses_seen > 0
        mean = ordered_sum(self.cluster_losses) / seen.sum().clamp(min=1)
        weights = torch.where(seen, self.cluster_losses, mean).clamp(min=0)
        return torch.where(weights.sum() > 0, weights, torch.ones_like(weights))

    def _group_members(self) -> None:
        self.members = self.assignments.argsort(stable=True)
        self.sizes = torch.bincount(self.assignments, minlength=len(self.centroid_labels))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MagnetIndex":
        for name in (*SAVED, *DERIVED):
            setattr(self, name, fn(getattr(self, name)))
        if not keeps_values(fn):
            self.reset_parameters()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: getattr(self, name) for name in SAVED})

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        given = {name: state_dict.pop(prefix + name) for name in SAVED if prefix + name in state_dict}
        rest = local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        super()._load_from_state_dict(state_dict, prefix, *rest)
        missing_keys += [prefix + name for name in SAVED if name not in given]
        if len(given) == len(SAVED):
            for name, saved in given.items():
                setattr(self, name, saved.detach().to(getattr(self, name).device, copy=True))
            self._group_members()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name in (*SAVED, *DERIVED):  # an earlier version pickled buffers
            if name in self._buffers:
                setattr(self, name, self._buffers.pop(name))
        self._non_persistent_buffers_set.clear()


def _draw_members(size: int, count: int, generator: torch.Generator | None) -> Tensor:
    """(count,) numbers in [0, size), without repeats where there are enough."""
    device = "cpu" if generator is None else generator.device
    if size < count:
        return torch.randint(size, (count,), generator=generator, device=device)
    return torch.randperm(size, generator=generator, device=device)[:count]
