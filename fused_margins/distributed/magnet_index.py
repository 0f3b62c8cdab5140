"""The magnet index of a training set whose embeddings are spread over ranks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from ..clustering.kmeans import at_least_1, checked_embeddings, exponential
from ..clustering.magnet_index import MagnetBatch, MagnetIndex
from ..core import checks
from ..core.enums import Similarity
from ..core.ranks import own_rank, settings, together
from ..core.reductions import sum_by
from ..ops.nearest.op import Nearest, nearest
from .collectives import gather_rows

__all__ = ["ShardedMagnetIndex"]


class ShardedMagnetIndex(MagnetIndex):
    """`MagnetIndex` of a set whose samples are spread over the ranks of a process group; the index is the same on all.

    Samples are numbered in the order of the ranks. The embeddings stay where they are: k-means++ seeds are drawn by
    all-reduced minima, centroids move by all-reduced sums, so that a fit has the centroids of one process that has all
    samples and the same generator, to rounding. Centroids, losses and the cluster of every sample are on every rank.

    Args:
        clusters_per_class, options: as for `MagnetIndex`, the same on all ranks; generators in the same state on all.
        group: the process group, None for all ranks.

    Call: `fit(embeddings (n_r, D), labels (n_r,))` with the samples of each rank, of any number and maybe none. Every
    other method as in `MagnetIndex`: `sample_batch` gives the same batch on every rank, with indices among the samples
    of all ranks, and `own` says which of them are where here; `update_losses` takes the losses of the whole batch.

    Attributes:
        assignments: (n,) of all samples; the others as in `MagnetIndex`.

    A state dict is that of a `MagnetIndex`, whole on each rank.

    Raises:
        As `MagnetIndex`, on all ranks, with the number of the first rank that has the error; ValueError for generators
        that are not in the same state.

    Gradients: none.

    Source: Rippel et al., Metric learning with adaptive density discrimination, 2015, section 3.

    >>> import torch
    >>> from fused_margins.distributed import ShardedMagnetIndex
    >>> index = ShardedMagnetIndex(clusters_per_class=2, generator=torch.Generator().manual_seed(0))
    >>> batch = index.fit(torch.randn(60, 8), torch.arange(60) % 3).sample_batch(4, 5)  # no process group
    >>> places, rows = index.own(batch)
    >>> places.shape, torch.equal(rows, batch.indices)
    (torch.Size([20]), True)
    """

    def __init__(self, clusters_per_class: int = 5, *, group: dist.ProcessGroup | None = None, **options: Any) -> None:
        self.group = group
        with together("ShardedMagnetIndex", group) as own:
            super().__init__(clusters_per_class, **options)
            own.same = settings(MagnetIndex.__init__, {"clusters_per_class": clusters_per_class} | options)
            own.same = {name: value for name, value in own.same.items() if name not in ("generator", "backend")}

    def reset_parameters(self) -> None:
        """Forget the fit."""
        super().reset_parameters()
        self._samples: range | None = None  # those of this rank

    @torch.no_grad()
    def fit(self, embeddings: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> MagnetIndex:
        """Cluster the embeddings (n_r, D) of each rank by their labels (n_r,); forgets the losses. Returns itself."""
        generator = self.generator if generator is None else generator
        with together("fit", self.group) as own:
            checks.generator(generator)
            x = checked_embeddings(embeddings)
            checks.labels("labels", labels, x.shape[0], x)
            own.rows, own.same = len(x), {"dtype": embeddings.dtype, "width": x.shape[1]}
            own.same["the state of the generator"] = _state(generator, x.device)
        counts = own.counts
        if not sum(counts):
            raise ValueError("embeddings: expected at least one sample, got none on any rank")
        rank = own_rank(self.group)
        self._samples = here = range(sum(counts[:rank]), sum(counts[: rank + 1]))
        if len(counts) == 1:
            return super().fit(embeddings, labels, generator)
        every_label = gather_rows(labels.long(), counts, self.group)
        fit = _KMeans(x, every_label, counts, self.clusters_per_class, self.group).best(
            self.num_iterations, self.num_restarts, generator, self.backend
        )
        filled = torch.bincount(fit.assignments, minlength=len(fit.centroids)) > 0
        self.centroids, self.centroid_labels = fit.centroids[filled], fit.slot_labels[filled]
        self.assignments = (filled.cumsum(0) - 1)[fit.assignments]
        squared = (x - self.centroids[self.assignments[here.start : here.stop]]).square().sum(1)
        return self._fitted(_sum(squared.sum(dtype=torch.float64), self.group))

    @torch.no_grad()
    def sample_batch(
        self, num_clusters: int = 6, samples_per_cluster: int = 8, generator: torch.Generator | None = None
    ) -> MagnetBatch:
        """As `MagnetIndex.sample_batch`, the same on every rank."""
        generator = self.generator if generator is None else generator
        with together("sample_batch", self.group) as own:
            checks.generator(generator)
            self._require_fit()
            own.same = {"num_clusters": num_clusters, "samples_per_cluster": samples_per_cluster}
            at_least_1(**own.same)
            own.same["the state of the generator"] = _state(generator, self.centroids.device)
        return super().sample_batch(num_clusters, samples_per_cluster, generator)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._samples = None

    def own(self, batch: MagnetBatch) -> tuple[Tensor, Tensor]:
        """Of the samples of this rank in a batch the places (m,) there, and the rows (m,) in what this rank fitted."""
        if self._samples is None:
            raise RuntimeError("own: expected an index that was fitted here, got none; a state dict has no ranks")
        places = ((batch.indices >= self._samples.start) & (batch.indices < self._samples.stop)).nonzero()[:, 0]
        return places, batch.indices[places] - self._samples.start


class _Fit(NamedTuple):
    """centroids: (K, D), slot_labels: (K,) and the samples' clusters (n,) in [0, K), all the same on every rank."""

    centroids: Tensor
    slot_labels: Tensor
    assignments: Tensor


class _KMeans:
    """`fused_margins.ops.kmeans` in its passes, of samples that are spread over ranks.

    x: (n_r, D) of this rank. What has one entry a sample of any rank is on all of them.
    """

    def __init__(
        self, x: Tensor, labels: Tensor, counts: tuple[int, ...], per_class: int, group: dist.ProcessGroup | None
    ) -> None:
        self.x, self.counts, self.group = x, counts, group
        first = sum(counts[: own_rank(group)])
        self.here = slice(first, first + len(x))
        self.labels, self.sample_class = torch.unique(labels, return_inverse=True)  # (C,), (n,)
        self.slots = torch.bincount(self.sample_class).clamp(max=per_class)  # (C,)
        self.slot_class = torch.arange(len(self.labels), device=x.device).repeat_interleave(self.slots)  # (K,)
        self.own_class = self.sample_class[self.here]

    def best(self, num_iterations: int, num_restarts: int, generator: torch.Generator | None, backend: str) -> _Fit:
        """Of each class the best of several runs."""
        shape = int(self.slots.max()), len(self.sample_class)
        least = torch.full(self.slots.shape, torch.inf, dtype=torch.float64, device=self.x.device)
        for restart in range(num_restarts):
            seeds = self.seeds(exponential(shape, generator, self.x.device)[:, self.here])
            found = self.lloyd(seeds, num_iterations, backend)
            if restart == 0:
                centroids, own, _ = found
            if num_restarts > 1:
                squared = _sum(sum_by(self.own_class, found[2][:, None].double(), len(self.slots)), self.group)[:, 0]
                better = squared < least
                centroids = torch.where(better[self.slot_class, None], found[0], centroids)
                own = torch.where(better[self.own_class], found[1], own)
                least = torch.where(better, squared, least)
        return _Fit(centroids, self.labels[self.slot_class], gather_rows(own, self.counts, self.group))

    def seeds(self, waiting: Tensor) -> Tensor:
        """k-means++ (K, D), of waiting times (slots, n_r): the race of all samples is won by the winner of winners."""
        classes, first_slot = len(self.slots), self.slots.cumsum(0) - self.slots
        seeds = self.x.new_zeros(len(self.slot_class), self.x.shape[1])
        squared = self.x.new_ones(len(self.x))
        for taken in range(len(waiting)):
            time = torch.where(squared > 0, waiting[taken] / squared, torch.inf)
            best = _least(
                time.new_full((classes,), torch.inf).scatter_reduce(0, self.own_class, time, "amin"), self.group
            )
            place = torch.arange(self.here.start, self.here.stop, device=self.x.device)
            place = torch.where(time == best[self.own_class], place, len(self.sample_class))
            drawn = place.new_full((classes,), len(self.sample_class))
            drawn = _least(drawn.scatter_reduce(0, self.own_class, place, "amin"), self.group)
            rows = self.rows(drawn)
            open_classes = self.slots > taken
            seeds[first_slot[open_classes] + taken] = rows[open_classes]
            distance = (self.x - rows[self.own_class]).square().sum(1)
            squared = distance if taken == 0 else torch.minimum(squared, distance)
        return seeds

    def lloyd(self, centroids: Tensor, num_iterations: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
        """Centroids (K, D); of the samples of this rank clusters (n_r,) and squared distances (n_r,)."""
        own, squared = self.assign(centroids, backend)
        for _ in range(num_iterations):
            # Means of differences from the old centroid, of sums in float64: the order of the ranks leaves no trace.
            shift = sum_by(own, (self.x - centroids[own]).double(), len(centroids))
            number = torch.bincount(own, minlength=len(centroids))[:, None]
            shift, counts = _sum(torch.cat([shift, number], dim=1), self.group).split([shift.shape[1], 1], dim=1)
            centroids = centroids + (shift / counts.clamp(min=1)).to(centroids.dtype)
            empty = counts[:, 0] == 0
            if bool(empty.any()):
                centroids = self.reseeded(centroids, empty, squared)
            previous = own
            own, squared = self.assign(centroids, backend)
            if not int(_sum((previous != own).sum(), self.group)):
                break
        return centroids, own, squared

    def assign(self, centroids: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        search = Nearest(self.x, centroids, self.own_class, self.slot_class)
        search = search._replace(similarity=Similarity.NEGATIVE_SQUARED_EUCLIDEAN)
        u, index = nearest.run(search, backend, valid=False)
        return index[:, 0], -u[:, 0]

    def reseeded(self, centroids: Tensor, empty: Tensor, squared: Tensor) -> Tensor:
        """The r-th empty cluster of a class moves to its r-th farthest sample."""
        farthest = gather_rows(squared, self.counts, self.group).argsort(descending=True, stable=True)
        farthest = farthest[self.sample_class[farthest].argsort(stable=True)]  # grouped by class, farthest first
        sizes = torch.bincount(self.sample_class)
        slot = empty.nonzero()[:, 0]
        of_class = self.slot_class[slot]  # ascending
        rank = torch.arange(len(slot), device=slot.device) - torch.searchsorted(of_class, of_class)
        return centroids.index_copy(0, slot, self.rows(farthest[(sizes.cumsum(0) - sizes)[of_class] + rank]))

    def rows(self, index: Tensor) -> Tensor:
        """Embeddings (k, D) of samples (k,) of any rank; one rank has each, and the others add zeros."""
        own = (index >= self.here.start) & (index < self.here.stop)
        rows = self.x.new_zeros(len(index), self.x.shape[1])
        rows[own] = self.x[index[own] - self.here.start]
        return _sum(rows, self.group)


def _sum(t: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    dist.all_reduce(t, group=group)
    return t


def _least(t: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    dist.all_reduce(t, dist.ReduceOp.MIN, group=group)
    return t


def _state(generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Of what draws: equal where the next numbers are."""
    if generator is not None:
        return generator.get_state()
    state = torch.get_rng_state()
    return torch.cat([state, torch.cuda.get_rng_state(device)]) if device.type == "cuda" else state
