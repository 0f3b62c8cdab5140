"""The index of samples that are spread over ranks against that of one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from fused_margins import MagnetIndex
from fused_margins.distributed import ShardedMagnetIndex
from fused_margins.distributed.magnet_index import _KMeans
from fused_margins.ops.kmeans import reference

from . import ranks

# Samples of each rank, the clusters of a class, restarts, dtype. One has many clusters of few values, so that some stay
# empty; the smallest class has fewer samples than clusters.
CASES: list[tuple[tuple[int, ...], int, int, torch.dtype]] = [
    ((40, 0, 23), 3, 1, torch.float64),
    ((21, 22, 20), 4, 3, torch.float64),
    ((10, 50, 3), 5, 1, torch.float32),
    ((30, 30, 3), 9, 2, torch.bfloat16),
]
BATCHES = 3


def samples(case: int) -> tuple[Tensor, Tensor]:
    counts, *_, dtype = CASES[case]
    draws = torch.Generator().manual_seed(case)
    x = torch.randn(sum(counts), 4, dtype=torch.float64, generator=draws)
    labels = torch.randint(5, (len(x),), generator=draws) * 3
    labels[-2:] = 99
    return (x.round() if dtype == torch.bfloat16 else x).to(dtype), labels


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def used(index: MagnetIndex, x: Tensor, labels: Tensor) -> dict[str, Any]:
    """What a fit and some batches leave."""
    index.fit(x, labels)
    batches = []
    for number in range(BATCHES):
        batch = index.sample_batch(4, 3)
        index.update_losses(batch, torch.linspace(0, number + 1, len(batch.indices)))
        batches.append(batch.indices)
    return {
        "batches": batches,
        "votes": index.knc_scores(samples(0)[0].to(index.centroids.dtype)),
        **index.state_dict(),
    }


def on_ranks(rank: int) -> list[Any]:
    found = []
    for case, (counts, clusters, restarts, _) in enumerate(CASES):
        x, labels = (t.split(counts)[rank] for t in samples(case))
        index = ShardedMagnetIndex(clusters, num_restarts=restarts, generator=seeded())
        found.append(used(index, x, labels))
        batch = index.sample_batch(4, 3)
        places, rows = index.own(batch)
        assert torch.equal(labels[rows], batch.cluster_labels[batch.clusters[places]])
        found[-1]["places"] = places.tolist()
    return [found, disagree(rank), from_one_place(rank)]


def from_one_place(rank: int | None) -> list[Tensor]:
    """Clusters of a class that all begin at its first sample: those that are empty move to samples of any rank."""
    x, labels = samples(0)
    classes = torch.unique(labels, return_inverse=True)[1]
    if rank is None:
        slots = torch.bincount(classes).clamp(max=4)
        slot_class = torch.arange(len(slots)).repeat_interleave(slots)
        first = torch.stack([(classes == c).nonzero()[0, 0] for c in slot_class])
        return list(reference._lloyd(x, classes, x[first], slot_class, 3, "reference"))[:2]
    counts = CASES[0][0]
    means = _KMeans(x.split(counts)[rank], labels, counts, 4, None)
    first = torch.stack([(classes == c).nonzero()[0, 0] for c in means.slot_class])
    centroids, own, _ = means.lloyd(x[first], 3, "auto")
    return [centroids, own]


def disagree(rank: int) -> list[str]:
    """What each mistake of a rank says on all of them."""
    index = ShardedMagnetIndex(2, generator=torch.Generator().manual_seed(rank))
    same = ShardedMagnetIndex(2, generator=seeded())
    x, labels = torch.randn(4, 3), torch.arange(4) % 2
    mistakes = [
        lambda: index.fit(x, labels),
        lambda: same.fit(x * (torch.nan if rank == 2 else 1), labels),
        lambda: same.fit(x[:0], labels[:0]),
        lambda: same.fit(x, labels).sample_batch(generator=torch.Generator().manual_seed(rank)),
        lambda: same.fit(x, labels).sample_batch(4 + (rank == 1), 3),
        lambda: ShardedMagnetIndex(2 + rank),
        lambda: ShardedMagnetIndex(0 if rank == 1 else 2),
        lambda: ShardedMagnetIndex(2).sample_batch(),
        lambda: same.own(None) if same.load_state_dict(same.state_dict()) else None,
    ]
    found = []
    for mistake in mistakes:
        try:
            mistake()
            found.append("nothing")
        except (RuntimeError, ValueError) as error:
            found.append(str(error))
        dist.barrier()
    return found


SAID = [
    "the state of the generator: expected the same on all ranks, got",
    "rank 2: embeddings: expected finite values",
    "embeddings: expected at least one sample, got none on any rank",
    "the state of the generator: expected the same on all ranks, got",
    "num_clusters: expected the same on all ranks, got 4 on ranks 0, 2; 5 on rank 1",
    "clusters_per_class: expected the same on all ranks, got 2 on rank 0; 3 on rank 1; 4 on rank 2",
    "rank 1: clusters_per_class: expected at least 1",
    "rank 0: MagnetIndex is not fitted",
    "own: expected an index that was fitted here",
]


def test_the_index_is_that_of_one_process(tmp_path: Path) -> None:
    found = ranks.run(on_ranks, 3, tmp_path)
    for case, (counts, clusters, restarts, _) in enumerate(CASES):
        expected = used(MagnetIndex(clusters, num_restarts=restarts, generator=seeded()), *samples(case))
        places = [place for of_rank in found for place in of_rank[0][case].pop("places")]
        assert sorted(places) == list(range(12)), counts
        for of_rank in found:
            for name, want in expected.items():
                got = of_rank[0][case][name]
                torch.testing.assert_close(got, want, msg=lambda text, c=case, n=name: f"{n} of case {c}: {text}")
    centroids, assignments = from_one_place(None)
    for rank, (_, said, (moved, own)) in enumerate(found):
        torch.testing.assert_close(moved, centroids)
        assert torch.equal(own, assignments.split(CASES[0][0])[rank])
        for text, got in zip(SAID, said, strict=True):
            assert text in got


def test_without_a_process_group_it_is_the_index(tmp_path: Path) -> None:
    x, labels = samples(0)
    index, plain = (kind(3, generator=seeded()).fit(x, labels) for kind in (ShardedMagnetIndex, MagnetIndex))
    torch.testing.assert_close(index.state_dict(), plain.state_dict(), rtol=0, atol=0)
    batch = index.sample_batch()
    assert torch.equal(index.own(batch)[1], batch.indices)
    with pytest.raises(ValueError, match="embeddings: expected at least one sample"):
        index.fit(x[:0], labels[:0])
