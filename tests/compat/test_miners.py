"""Miners of the drop-in equal theirs."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning import distances
from pytorch_metric_learning import miners as their_miners

from fused_margins.compat.pytorch_metric_learning import miners

from .oracle import BATCH, DISTANCES, left_to_them, pair, same_samples, seeds, sizes

STRATEGIES = ("easy", "semihard", "hard", "all")
REFUSED = {("semihard", "semihard"), ("all", "semihard"), ("semihard", "all")}


@pytest.mark.parametrize("strategies", [s for s in itertools.product(STRATEGIES, STRATEGIES) if s not in REFUSED])
@settings(max_examples=12)
@given(
    distance=st.sampled_from(["default", "squared", "plain", "cosine", "dot"]),
    seed=seeds,
    rows=st.integers(1, 30),
    columns=st.one_of(st.none(), sizes),
    classes=st.integers(1, 6),
    dtype=st.sampled_from([torch.int64, torch.int16]),
    ranges=st.tuples(st.booleans(), st.booleans()),
)
def test_easy_and_hard_samples_are_theirs(strategies, distance, seed, rows, columns, classes, dtype, ranges):
    positives, negatives = strategies
    options = {"pos_strategy": positives, "neg_strategy": negatives, "distance": DISTANCES[distance]()}
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (rows,), generator=generator).to(dtype)
    call = [torch.randn(rows, 5, generator=generator, dtype=torch.float64), labels]
    if columns is not None:
        call += [torch.randn(columns, 5, generator=generator, dtype=torch.float64)]
        call += [torch.randint(classes, (columns,), generator=generator).to(dtype)]
    for i, kind in enumerate(("pos", "neg")):
        options[f"allowed_{kind}_range"] = (0.4, 1.3) if ranges[i] else None
    same_samples("BatchEasyHardMiner", options, call, True)
    if strategies == ("hard", "hard") and not any(ranges):
        same_samples("BatchHardMiner", {"distance": DISTANCES[distance]()}, call, True)


@pytest.mark.parametrize("positives", ["easy", "hard", "semihard"])
@pytest.mark.parametrize("negatives", ["easy", "hard"])
def test_the_ends_of_a_range_belong_to_it(positives, negatives):
    """Products of whole numbers are exact, and no two of a row are equal; 2 x 3, 3 x 5 and 5 x 7 are ends."""
    call = torch.tensor([[1.0], [2], [3], [5], [7], [11]], dtype=torch.float64), torch.tensor([0, 0, 1, 1, 2, 0])
    options = {"pos_strategy": positives, "neg_strategy": negatives, "distance": DISTANCES["dot"]()}
    for ranges in (((2, 22), (6, 15)), ((11, 15), (3, 35)), ((22, 22), (15, 15))):
        same_samples(
            "BatchEasyHardMiner", options | dict(zip(("allowed_pos_range", "allowed_neg_range"), ranges)), call, True
        )


@pytest.mark.parametrize("strategies", [s for s in itertools.product(STRATEGIES, STRATEGIES) if s not in REFUSED])
@pytest.mark.parametrize("ranges", [(None, None), ((4, 27), (4, 23)), ((7, 31), (8, 16))])
def test_distances_of_whole_numbers_are_compared_exactly(strategies, ranges):
    """A positive and a negative of a row, and ends of ranges, are at one distance."""
    calls = [(torch.tensor([[-4.0], [0], [4], [11], [27]]), torch.tensor([0, 0, 1, 1, 0]))]
    if ranges == (None, None):
        calls += [(torch.tensor([[3.0], [-5], [41], [6], [-13], [-18]]), torch.tensor([0, 0, 0, 1, 1, 1]))]
    options = {"distance": DISTANCES["plain"]()} | dict(zip(("pos_strategy", "neg_strategy"), strategies))
    options |= dict(zip(("allowed_pos_range", "allowed_neg_range"), ranges))
    for call in calls:
        same_samples("BatchEasyHardMiner", options, call, True)


@pytest.mark.parametrize(
    "options",
    [
        {"allowed_neg_range": torch.tensor([0.2, 1.0])},
        {"collect_stats": True},
        {"distance": distances.LpDistance(p=1)},
        {"distance": distances.LpDistance(power=3)},
        {"distance": distances.SNRDistance()},
        {"distance": distances.CosineSimilarity(collect_stats=True)},
    ],
    ids=str,
)
def test_searches_that_no_kernel_makes_are_left_to_them(options):
    same_samples("BatchEasyHardMiner", options, BATCH, False)


def test_a_hook_of_a_miner_is_heard():
    class Reversed(miners.BatchHardMiner):
        def get_positives(self, *a):
            self.seen = True
            return super().get_positives(*a)

    miner = Reversed()
    found = miner(*BATCH)
    assert miner.seen
    assert all(map(torch.equal, found, their_miners.BatchHardMiner()(*BATCH)))


def test_the_nearest_sample_is_found_although_theirs_rounds():
    """Their distances of float32 are roots of differences of squares, by which near samples tie."""
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(1, 8, generator=generator)) + 1e-4 * torch.randn(
        40, 8, generator=generator
    )
    labels = torch.arange(40) % 4
    (a, p, *_), (_, q, *_) = (m.BatchEasyHardMiner(neg_strategy="hard")(x, labels) for m in (miners, their_miners))
    unit = torch.nn.functional.normalize(x.double())
    of_ours, of_theirs = ((unit[a] - unit[other]).norm(dim=1) for other in (p, q))
    assert (of_ours <= of_theirs * (1 + 1e-3)).all()
    assert (of_ours < of_theirs * 0.99).any()


def test_a_row_of_nan_is_never_mined():
    embeddings = BATCH[0].index_fill(0, torch.tensor([2]), torch.nan)
    for strategies in (("easy", "hard"), ("hard", "easy"), ("easy", "semihard"), ("hard", "hard")):
        found = miners.BatchEasyHardMiner(*strategies)(embeddings, BATCH[1])
        assert found[0].tolist() == [0, 1, *range(3, 12)]
        assert not any((t == 2).any() for t in found)


@settings(max_examples=40)
@given(
    seed=seeds,
    rows=st.integers(1, 30),
    columns=st.one_of(st.none(), sizes),
    classes=st.integers(1, 6),
    epsilon=st.floats(0.01, 0.5),
    normalized=st.booleans(),
    block=st.sampled_from([1, 64, 1 << 18]),
)
def test_pairs_of_multi_similarity_are_theirs(seed, rows, columns, classes, epsilon, normalized, block):
    generator = torch.Generator().manual_seed(seed)
    options = {"epsilon": epsilon, "distance": distances.DotProductSimilarity(normalize_embeddings=normalized)}
    call = [torch.randn(rows, 5, generator=generator, dtype=torch.float64)]
    call += [torch.randint(classes, (rows,), generator=generator)]
    if columns is not None:
        call += [torch.randn(columns, 5, generator=generator, dtype=torch.float64)]
        call += [torch.randint(classes, (columns,), generator=generator)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(miners, "ENTRIES_AT_ONCE", block)
        patch.setattr(miners, "FEW_ENTRIES", 0)
        same_samples("MultiSimilarityMiner", options, call, True)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("MultiSimilarityMiner", {"distance": distances.LpDistance()}),
        ("MultiSimilarityMiner", {"epsilon": -0.1}),
        ("MultiSimilarityMiner", {"epsilon": torch.tensor(0.1)}),
    ],
    ids=str,
)
def test_other_miners_leave_to_them_what_no_kernel_does(name, options):
    call = BATCH[0].repeat(11, 1) + torch.linspace(0, 1, 132)[:, None], BATCH[1].repeat(11)
    same_samples(name, options, call, False)
    same_samples("MultiSimilarityMiner", {}, BATCH, False)  # a small matrix
    same_samples("MultiSimilarityMiner", {}, call, True)


def test_distance_weighted_draws_have_their_distribution():
    """Both draw as often as a class has samples; pairs of 12 rows are counted over many calls."""
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    labels = torch.arange(12) % 3
    counts = []
    for miner in pair("DistanceWeightedMiner"):
        torch.manual_seed(0)
        of_pairs = torch.zeros(2, 12, 12)
        for _ in range(300):
            anchor, *others = miner(embeddings, labels)
            assert miner.num_triplets == len(anchor)
            for count, other in zip(of_pairs, others):
                count.index_put_((anchor, other), torch.ones(len(anchor)), accumulate=True)
        counts.append(of_pairs)
    assert torch.equal(counts[0].sum(2), counts[1].sum(2))
    # Two samples of a multinomial: squared differences over sums are about 1 in the mean.
    ours, theirs = counts
    seen = (ours + theirs) > 0
    statistic = ((ours - theirs) ** 2 / (ours + theirs))[seen]
    assert statistic.mean() < 1.5
    assert statistic.max() < 16


def test_a_distance_weighted_draw_does_not_underflow():
    """In 512 dimensions their weights are relative to the largest of the batch, and most rows of float32 have none."""
    generator = torch.Generator().manual_seed(0)
    centre = torch.randn(4, 512, generator=generator)
    near = centre[:1] + 0.6 * torch.randn(2, 512, generator=generator)
    embeddings, labels = torch.cat([near, centre]), torch.tensor([0, 1, 0, 1, 0, 1])
    ours, theirs = (
        set(m.DistanceWeightedMiner(nonzero_loss_cutoff=1.4)(embeddings, labels)[0].tolist())
        for m in (miners, their_miners)
    )
    unit = torch.nn.functional.normalize(embeddings)
    has_near_negative = ((unit[:, None] - unit).norm(dim=2) < 1.4) & (labels[:, None] != labels)
    assert ours == set(has_near_negative.any(1).nonzero()[:, 0].tolist())
    assert theirs < ours


@pytest.mark.parametrize("columns", [None, 5])
def test_distance_weighted_draws_of_few_rows(columns):
    """One class, one row, and nothing within the cut-off: nothing is drawn."""
    for labels in ([0, 0, 0], [0], [0, 1]):
        embeddings = torch.eye(4, dtype=torch.float64)[: len(labels)]
        call = [embeddings, torch.tensor(labels)]
        call += [] if columns is None else [embeddings, torch.tensor(labels)]
        for found, wanted in zip(*(m.DistanceWeightedMiner()(*call) for m in (miners, their_miners))):
            assert len(found) == len(wanted) == 0


def test_other_cut_offs_are_left_to_them():
    for options in ({"cutoff": 0.4}, {"nonzero_loss_cutoff": 1.3}):
        ours, _ = pair("DistanceWeightedMiner", **options)
        with left_to_them("DistanceWeightedMiner") as seen:
            ours(*BATCH)
        assert seen == [miners.DistanceWeightedMiner]
