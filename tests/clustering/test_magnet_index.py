"""The magnet index against plain loops."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from fused_margins import MagnetIndex, MagnetLoss
from fused_margins.clusters import MagnetBatch

from .checks import assert_clustering_holds, inertia, seeded


def test_same_bits_for_one_and_two_threads():
    generator = seeded()
    x, labels = torch.randn(6000, 16, generator=generator), torch.randint(7, (6000,), generator=generator)
    before, results = torch.get_num_threads(), []
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)  # as users run it
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            index = MagnetIndex(4, num_iterations=5, generator=seeded(1)).fit(x, labels)
            index.update_losses(index.sample_batch(), torch.rand(48, generator=seeded(2)))
            results.append([*index.state_dict().values(), index.sample_batch().indices, index.knc_scores(x, 9)])
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(deterministic)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(blobs, dtype):
    x, labels = blobs[0].to(dtype), blobs[1].int()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # clusters are never formed in half precision
        index = MagnetIndex(2, generator=seeded()).fit(x, labels)
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    assert index.centroids.dtype == index.variance.dtype == accumulated
    assert_clustering_holds(x.to(accumulated), labels, (index.centroids, index.centroid_labels, index.assignments))
    assert index.knc_scores(x).dtype == accumulated


def test_batch_of_the_nearest_impostors(digits, backend):
    x, labels = digits
    index = MagnetIndex(3, generator=seeded(), backend=backend).fit(x, labels)
    for _ in range(20):
        batch = index.sample_batch(num_clusters=5, samples_per_cluster=6)
        assert batch.indices.shape == batch.clusters.shape == (30,)
        assert batch.clusters.tolist() == [m for m in range(5) for _ in range(6)]
        assert torch.equal(labels[batch.indices], batch.cluster_labels[batch.clusters])
        of_sample = index.assignments[batch.indices].view(5, 6)
        assert (of_sample == of_sample[:, :1]).all()
        seed, *impostors = of_sample[:, 0].tolist()
        distance = (index.centroids - index.centroids[seed]).norm(dim=1)
        others = [m for m in range(30) if index.centroid_labels[m] != index.centroid_labels[seed]]
        assert impostors == sorted(others, key=lambda m: float(distance[m]))[:4]
        for m, members in zip(of_sample[:, 0], batch.indices.view(5, 6)):
            assert len(set(members.tolist())) == 6 or index.sizes[m] < 6


def test_small_clusters_repeat_samples_and_few_classes_make_small_batches(backend):
    x, labels = torch.tensor([[0.0], [0.1], [5.0]]), torch.tensor([0, 0, 1])
    index = MagnetIndex(1, generator=seeded(), backend=backend).fit(x, labels)
    batch = index.sample_batch(num_clusters=6, samples_per_cluster=4)
    assert sorted(batch.cluster_labels.tolist()) == [0, 1]
    assert batch.indices.shape == (8,)
    assert set(batch.indices[batch.cluster_labels[batch.clusters] == 1].tolist()) == {2}
    assert set(batch.indices[batch.cluster_labels[batch.clusters] == 0].tolist()) <= {0, 1}
    alone = MagnetIndex(2, generator=seeded(), backend=backend).fit(x, torch.zeros(3).long()).sample_batch(4, 2)
    assert alone.cluster_labels.tolist() == [0]
    assert MagnetLoss(backend=backend)(x[alone.indices], alone.clusters, alone.cluster_labels) == 0
    assert index.sample_batch(num_clusters=1, samples_per_cluster=1).indices.shape == (1,)


def test_members_are_drawn_evenly():
    x, labels = torch.randn(12, 2, generator=seeded()), torch.zeros(12).long()
    index = MagnetIndex(1, generator=seeded(3)).fit(x, labels)
    counts = sum(torch.bincount(index.sample_batch(1, 5).indices, minlength=12) for _ in range(600))
    assert (counts - 250).abs().max() < 4 * math.sqrt(250)


def seed_frequencies(index: MagnetIndex, draws: int = 1000) -> Tensor:
    seeds = [index.assignments[index.sample_batch(1, 1).indices[0]] for _ in range(draws)]
    return torch.bincount(torch.stack(seeds), minlength=len(index.sizes)) / draws


def test_seeds_are_drawn_in_proportion_to_loss():
    x, labels = torch.arange(8.0)[:, None], torch.arange(8) // 2
    index = MagnetIndex(1, generator=seeded()).fit(x, labels)
    torch.testing.assert_close(seed_frequencies(index), torch.full((4,), 0.25), atol=0.06, rtol=0)  # nothing seen

    def batch_of(samples: list[int]) -> MagnetBatch:
        indices = torch.tensor(samples)
        return MagnetBatch(indices, indices, indices)  # only the indices say which clusters the losses are of

    index.update_losses(batch_of([0, 1, 2]), torch.tensor([1.0, 3.0, 6.0]))
    index.update_losses(batch_of([0, 3, 4]), torch.tensor([5.0, math.nan, 0.0]))
    assert index.cluster_losses.tolist() == [3.0, 6.0, 0.0, 0.0]
    assert index.losses_seen.tolist() == [3, 1, 1, 0]
    # Cluster 3 was never seen: it counts with the mean over the others, 3.
    torch.testing.assert_close(seed_frequencies(index), torch.tensor([0.25, 0.5, 0.0, 0.25]), atol=0.06, rtol=0)
    assert seed_frequencies(index)[2] == 0
    index.fit(x, labels)
    assert index.losses_seen.sum() == 0
    index.update_losses(batch_of([0, 2, 4, 6]), torch.zeros(4))
    torch.testing.assert_close(seed_frequencies(index), torch.full((4,), 0.25), atol=0.06, rtol=0)


def test_losses_of_a_sampled_batch(digits):
    x, labels = digits
    index, loss = MagnetIndex(3, generator=seeded()).fit(x, labels), MagnetLoss(1.0, reduction="none")
    seen: dict[int, list[float]] = {}
    for _ in range(15):
        batch = index.sample_batch(4, 5)
        losses = loss(x[batch.indices], batch.clusters, batch.cluster_labels)
        index.update_losses(batch, losses.requires_grad_())
        for i, value in zip(batch.indices.tolist(), losses.tolist()):
            seen.setdefault(int(index.assignments[i]), []).append(value)
    expected = torch.tensor([sum(v) / len(v) if (v := seen.get(m)) else 0.0 for m in range(30)])
    torch.testing.assert_close(index.cluster_losses, expected)
    assert not index.cluster_losses.requires_grad


def test_knc_is_its_formula(digits, backend):
    x, labels = digits
    index = MagnetIndex(3, generator=seeded(), backend=backend).fit(x[:500], labels[:500])
    queries, neighbours = x[500:530], 7
    expected = torch.zeros(30, 10)
    for i, q in enumerate(queries):
        squared = (index.centroids - q).square().sum(1)
        nearest = squared.argsort()[:neighbours]
        for m in nearest:
            expected[i, index.centroid_labels[m]] += torch.exp(-squared[m] / (2 * index.variance))
    expected = expected / expected.sum(1, keepdim=True)
    torch.testing.assert_close(index.knc_scores(queries, neighbours), expected)
    assert torch.equal(index.knc_predict(queries, neighbours), expected.argmax(1))
    everything = index.knc_scores(queries)  # 128 neighbours, of which there are 30
    torch.testing.assert_close(everything.sum(1), torch.ones(30))
    assert (index.knc_predict(x[500:]) != labels[500:]).float().mean() < 0.3  # other writers' digits, raw pixels


def test_knc_with_collapsed_clusters(backend):
    # exp(-d / 2 sigma^2) of every cluster underflows: the nearest still decides.
    x, labels = torch.tensor([[0.0]] * 3 + [[1.0]] * 3), torch.tensor([7] * 3 + [-2] * 3)
    index = MagnetIndex(2, generator=seeded(), backend=backend).fit(x, labels)
    assert index.variance == torch.tensor(1e-4)
    assert index.classes.tolist() == [-2, 7]
    scores = index.knc_scores(torch.tensor([[30.0], [-30.0], [0.5]]))
    torch.testing.assert_close(scores, torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]))
    assert index.knc_predict(torch.tensor([[30.0], [-30.0]])).tolist() == [-2, 7]
    assert index.knc_predict(torch.empty(0, 1)).shape == (0,)


def test_variance_is_that_of_the_paper(blobs):
    x, labels = blobs
    index = MagnetIndex(2, generator=seeded()).fit(x, labels)
    expected = inertia(x, index.centroids, index.assignments) / 29
    torch.testing.assert_close(index.variance, torch.tensor(expected))


def test_state_restores_a_fitted_index(digits):
    x, labels = digits
    index = MagnetIndex(3, generator=seeded()).fit(x, labels)
    batch = index.sample_batch()
    index.update_losses(batch, torch.rand(48, generator=seeded()))
    fresh, double = MagnetIndex(3), MagnetIndex(3).fit(x.double(), labels)
    for other in (fresh, double):  # whatever it held before
        other.load_state_dict(index.state_dict())
        assert repr(other) == repr(index)
        assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), index.state_dict().values()))
        ours, theirs = (i.sample_batch(5, 6, generator=seeded(9)) for i in (other, index))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
        assert torch.equal(other.knc_scores(x, 20), index.knc_scores(x, 20))
    nested, outer = nn.Module(), nn.Module()
    nested.index, outer.index = MagnetIndex(3), index
    nested.load_state_dict(outer.state_dict())
    assert torch.equal(nested.index.centroids, index.centroids)
    fresh.load_state_dict(MagnetIndex(3).state_dict())
    with pytest.raises(RuntimeError, match="not fitted"):
        fresh.sample_batch()
    partial = index.state_dict()
    del partial["assignments"]
    with pytest.raises(RuntimeError, match="assignments"):
        MagnetIndex(3).load_state_dict(partial)
    assert torch.equal(copy.deepcopy(index).sample_batch().indices, index.sample_batch().indices)
    assert index.double().centroids.dtype == torch.float64
    assert index.knc_predict(x).shape == (600,)


def test_representation(digits):
    index = MagnetIndex(2)
    assert "clusters_per_class=2, num_iterations=20" in repr(index)
    assert "not fitted" in repr(index)
    assert "20 clusters of 10 classes, 600 samples" in repr(index.fit(*digits))


def test_training_on_its_batches_separates_classes():
    # Two classes of two modes each, interleaved on a line; the embeddings themselves are what learns.
    generator = seeded(0)
    labels = torch.arange(80) % 2
    x = torch.randn(80, 2, generator=generator) * 0.4 + torch.arange(80)[:, None] % 4 * torch.tensor([1.0, 0.0])
    x.requires_grad_()
    index, loss = MagnetIndex(2, generator=generator), MagnetLoss(1.0, reduction="none")
    optimizer = torch.optim.SGD([x], 0.5)
    first = float((index.fit(x, labels).knc_predict(x, 2) != labels).float().mean())
    for step in range(60):
        if step % 20 == 0:
            index.fit(x, labels)
        batch = index.sample_batch(4, 8)
        losses = loss(x[batch.indices], batch.clusters, batch.cluster_labels)
        index.update_losses(batch, losses)
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    assert float((index.fit(x, labels).knc_predict(x, 2) != labels).float().mean()) < first / 2


@pytest.mark.parametrize("call", ["sample_batch", "knc_predict", "knc_scores", "update_losses"])
def test_not_fitted(call):
    arguments = {"sample_batch": (), "update_losses": (None, None)}.get(call, (torch.randn(2, 3),))
    with pytest.raises(RuntimeError, match=r"MagnetIndex is not fitted: call fit\(embeddings, labels\) first"):
        getattr(MagnetIndex(), call)(*arguments)


def test_bad_input(blobs):
    x, labels = blobs
    for bad in (math.nan, math.inf, 1e25):  # 1e25 squared is beyond float32
        y = x.clone()
        y[4, 1] = bad
        with pytest.raises(ValueError, match=r"row 4 of 30"):
            MagnetIndex(2).fit(x, labels).knc_predict(y)
    for option in ("clusters_per_class", "num_iterations", "num_restarts"):
        with pytest.raises(ValueError, match=f"{option}: expected at least 1, got 0"):
            MagnetIndex(**{option: 0})
    with pytest.raises(ValueError, match="variance_floor: expected a positive number"):
        MagnetIndex(variance_floor=0.0)
    index = MagnetIndex(2).fit(x, labels)
    with pytest.raises(ValueError, match="num_clusters: expected at least 1, got 0"):
        index.sample_batch(num_clusters=0)
    with pytest.raises(ValueError, match="samples_per_cluster: expected at least 1, got 0"):
        index.sample_batch(samples_per_cluster=0)
    with pytest.raises(ValueError, match="num_neighbours: expected at least 1, got 0"):
        index.knc_predict(x, 0)
    with pytest.raises(ValueError, match=r'losses: expected one a sample, shape \(6,\).*reduction="none".*got \(\)'):
        index.update_losses(index.sample_batch(2, 3), torch.tensor(1.0))
    with pytest.raises(ValueError, match=rf"^embeddings: expected width {x.shape[1]} on cpu, .* got width 7 on cpu"):
        index.knc_predict(torch.randn(3, 7))
    with pytest.raises(ValueError, match=r"variance_floor: expected a number in the range of float32, got 1e\+300"):
        MagnetIndex(variance_floor=1e300)
    for call in (lambda: index.fit(x, labels, generator=0), lambda: index.sample_batch(generator=0)):
        with pytest.raises(TypeError, match=r"^generator: expected a torch.Generator or None, got int"):
            call()
