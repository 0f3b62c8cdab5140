"""What no kernel does is done by their code, with their errors."""

import warnings

import pytest
import torch
from pytorch_metric_learning import distances, reducers
from pytorch_metric_learning import losses as their_losses

from fused_margins.compat.pytorch_metric_learning import losses, miners
from fused_margins.compat.pytorch_metric_learning.losses import heads
from fused_margins.core.indices import UNADMITTED

from .oracle import (
    BATCH,
    HEAD,
    HEADS,
    OTHERS,
    PAIRS,
    PROXIES,
    TRIPLETS,
    assert_equal,
    left_to_them,
    mined,
    of_any_number,
    options_of,
    pair,
    run,
    same,
    same_samples,
)


class LearnedDistance(distances.CosineSimilarity):
    """Some other measure."""

    def compute_mat(self, query_emb, ref_emb):
        return super().compute_mat(query_emb, ref_emb) ** 3


def hooked():
    distance = distances.CosineSimilarity()
    distance.register_forward_hook(lambda module, inputs, mat: mat.exp())
    return distance


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ArcFaceLoss", HEAD | {"margin": -20}),
        ("ArcFaceLoss", HEAD | {"margin": 200}),
        ("ArcFaceLoss", HEAD | {"scale": torch.tensor(3.0)}),
        ("ArcFaceLoss", HEAD | {"scale": -1}),
        ("ArcFaceLoss", HEAD | {"collect_stats": True}),
        ("ArcFaceLoss", HEAD | {"distance": LearnedDistance()}),
        ("ArcFaceLoss", HEAD | {"distance": distances.CosineSimilarity(power=3)}),
        ("ArcFaceLoss", HEAD | {"distance": distances.CosineSimilarity(p=1)}),
        ("ArcFaceLoss", HEAD | {"distance": distances.CosineSimilarity(collect_stats=True)}),
        ("CosFaceLoss", HEAD | {"distance": hooked()}),
        ("CosFaceLoss", HEAD | {"margin": torch.tensor(0.3)}),
        ("CosFaceLoss", HEAD | {"scale": float("inf"), "reducer": reducers.DoNothingReducer()}),
        ("NormalizedSoftmaxLoss", HEAD | {"temperature": -1.0}),
        ("NormalizedSoftmaxLoss", HEAD | {"distance": distances.LpDistance()}),
        ("NormalizedSoftmaxLoss", HEAD | {"distance": distances.DotProductSimilarity(normalize_embeddings=False)}),
        ("SubCenterArcFaceLoss", HEAD | {"sub_centers": 2, "margin": 200}),
        ("LargeMarginSoftmaxLoss", HEAD | {"scale": -1}),
        ("SphereFaceLoss", HEAD | {"collect_stats": True}),
        ("ProxyAnchorLoss", HEAD | {"alpha": torch.tensor(4.0)}),
        ("ProxyAnchorLoss", HEAD | {"margin": torch.tensor(0.2)}),
        ("ProxyAnchorLoss", HEAD | {"collect_stats": True}),
        ("ProxyAnchorLoss", HEAD | {"distance": distances.LpDistance()}),
        ("ProxyNCALoss", HEAD | {"distance": distances.LpDistance(power=1)}),
        ("ProxyNCALoss", HEAD | {"softmax_scale": -1.0}),
        ("NCALoss", {"softmax_scale": torch.tensor(2.0)}),
        ("NCALoss", {"collect_stats": True}),
        ("MultiSimilarityLoss", {"alpha": -1.0}),
        ("MultiSimilarityLoss", {"beta": torch.tensor(10.0)}),
        ("MultiSimilarityLoss", {"base": torch.tensor(0.5)}),
        ("MultiSimilarityLoss", {"distance": distances.LpDistance()}),
        ("GeneralizedLiftedStructureLoss", {"distance": distances.LpDistance(power=2)}),
        ("SoftTripleLoss", HEAD | {"gamma": -1.0}),
        ("SoftTripleLoss", HEAD | {"margin": torch.tensor(0.1).double()}),
        ("SoftTripleLoss", HEAD | {"la": torch.tensor(5.0)}),
        ("SoftTripleLoss", HEAD | {"collect_stats": True}),
        ("GeneralizedLiftedStructureLoss", {"distance": distances.CosineSimilarity(), "pos_margin": torch.tensor(0.5)}),
        ("GeneralizedLiftedStructureLoss", {"distance": distances.CosineSimilarity(), "neg_margin": torch.tensor(0.5)}),
        ("TripletMarginLoss", {"swap": True}),
        ("TripletMarginLoss", {"smooth_loss": True}),
        ("TripletMarginLoss", {"margin": torch.tensor(0.2)}),
        ("TripletMarginLoss", {"collect_stats": True}),
        ("TripletMarginLoss", {"reducer": reducers.AvgNonZeroReducer(collect_stats=True)}),
        ("MarginLoss", {"nu": torch.tensor(0.2)}),
        ("MarginLoss", {"margin": torch.tensor(0.2)}),
        ("MarginLoss", {"collect_stats": True}),
        ("NTXentLoss", {"distance": distances.LpDistance()}),
        ("NTXentLoss", {"distance": distances.SNRDistance()}),
        ("NTXentLoss", {"distance": distances.DotProductSimilarity(power=3)}),
        ("NTXentLoss", {"temperature": torch.tensor(0.5)}),
        ("NTXentLoss", {"distance": distances.CosineSimilarity(collect_stats=True)}),
        ("SupConLoss", {"distance": LearnedDistance()}),
        ("SupConLoss", {"collect_stats": True}),
        ("SupConLoss", {"temperature": -0.5}),
    ],
    ids=str,
)
def test_what_no_kernel_does_is_left_to_them(name, options):
    ours, theirs = pair(name, **options)
    with left_to_them(name) as seen:
        got = run(ours, *BATCH)
    assert seen == [type(ours)]
    assert_equal(got, run(theirs, *BATCH), 0, 0)


@pytest.mark.parametrize(
    "labels", [BATCH[1].double(), BATCH[1] % 2 == 0, torch.where(BATCH[1] == 0, UNADMITTED, BATCH[1])], ids=str
)
def test_labels_that_no_kernel_reads_are_left_to_them(labels):
    for name in PAIRS:
        same(name, {}, BATCH[0], labels, fused=False)
    same_samples("BatchEasyHardMiner", {}, [BATCH[0], labels], False)


def doubled(found):
    return {"loss": found["loss"] | {"losses": found["loss"]["losses"] * 2}}


@pytest.mark.parametrize(
    ("name", "hook", "change"),
    [
        ("ArcFaceLoss", "modify_cosine_of_target_classes", lambda cosine: cosine - 1),
        ("CosFaceLoss", "get_cosine", lambda cosine: cosine / 2),
        ("CosFaceLoss", "scale_logits", lambda logits: logits / 2),
        ("NormalizedSoftmaxLoss", "get_logits", lambda logits: logits / 2),
        (
            "NTXentLoss",
            "_compute_loss",
            lambda found: {"loss": found["loss"] | {"losses": found["loss"]["losses"] * 2}},
        ),
        ("LargeMarginSoftmaxLoss", "get_cos_with_margin", lambda cosine: cosine / 2),
        ("SphereFaceLoss", "scale_logits", lambda logits: logits / 2),
        ("SoftTripleLoss", "get_logits", lambda logits: logits / 2),
        ("ProxyAnchorLoss", "get_logits", lambda logits: logits / 2),
        ("ProxyNCALoss", "nca_computation", doubled),
        ("NCALoss", "nca_computation", doubled),
        ("MultiSimilarityLoss", "_compute_loss", doubled),
        (
            "SupConLoss",
            "mat_based_loss",
            lambda found: {"loss": found["loss"] | {"losses": found["loss"]["losses"] * 2}},
        ),
    ],
)
def test_a_hook_of_a_subclass_is_heard(name, hook, change):
    options = options_of(name)
    ours, theirs = (getattr(m, name) for m in (losses, their_losses))

    def replaced(base):
        return type(name, (base,), {hook: lambda self, *a: change(getattr(base, hook)(self, *a))})

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        ours, theirs = replaced(ours)(**options), replaced(theirs)(**options)
    ours.load_state_dict(theirs.state_dict())
    assert_equal(run(ours, *BATCH), run(theirs, *BATCH), 0, 0)
    unchanged = pair(name, **options)[1]
    unchanged.load_state_dict(theirs.state_dict())
    assert run(unchanged, *BATCH)[0] != run(ours, *BATCH)[0]
    # Or of one module alone.
    patched = pair(name, **options)[0]
    patched.load_state_dict(theirs.state_dict())
    if "loss" not in hook and "nca" not in hook:
        method = getattr(patched, hook)
        setattr(patched, hook, lambda *a: change(method(*a)))
        assert_equal(run(patched, *BATCH), run(theirs, *BATCH), 0, 0)


@pytest.mark.parametrize("name", [*HEADS, *PROXIES, *PAIRS, *OTHERS])
def test_transformed_calls_are_left_to_them(name):
    # Double beforehand: a parameter that theirs casts within a transform is not valid after it.
    ours, theirs = (loss.double() for loss in pair(name, **options_of(name)))
    with left_to_them(name) as seen:
        gradient = torch.func.grad(lambda embeddings: ours(embeddings, BATCH[1]))(BATCH[0])
    assert seen == [type(ours)]
    torch.testing.assert_close(gradient, run(theirs, *BATCH)[1], rtol=1e-9, atol=1e-9)


def test_soft_triple_is_left_to_them_where_its_matrix_fits_the_memory_budget():
    for budget in (12 * 4 * 10 * 8, 12 * 4 * 10 * 8 - 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(heads, "memory_budget", lambda: budget)  # noqa: B023
            ours, _ = pair("SoftTripleLoss", **HEAD)
            for embeddings, matrix_bytes in ((BATCH[0], 12 * 4 * 10 * 8), (BATCH[0].bfloat16(), torch.inf)):
                with left_to_them("SoftTripleLoss") as seen:
                    ours(embeddings, BATCH[1])
                assert len(seen) == (matrix_bytes <= budget)
            assert ours.fc.dtype == torch.float64


def test_another_loss_method_is_used():
    ours, theirs = pair("SupConLoss")
    for loss in (ours, theirs):
        loss.loss_method = lambda mat, pairs: loss.zero_losses()  # noqa: B023
    assert_equal(run(ours, *BATCH), run(theirs, *BATCH), 0, 0)


def test_another_cross_entropy_is_used():
    ours, theirs = pair("CosFaceLoss", **HEAD)
    for loss in (ours, theirs):
        loss.cross_entropy = torch.nn.CrossEntropyLoss(reduction="none", label_smoothing=0.3)
    assert_equal(run(ours, *BATCH), run(theirs, *BATCH), 0, 0)


@pytest.mark.parametrize("name", [*HEADS, *PROXIES, *PAIRS, *OTHERS])
@pytest.mark.parametrize(
    "call",
    [
        (torch.randn(4, 5), torch.arange(3)),
        (torch.randn(4, 5), torch.zeros(4, 1, dtype=torch.int64)),
        (torch.randn(4, 5), None),
        (torch.randn(4, 5, 2), torch.arange(4)),
        (torch.randn(4, 7), torch.arange(4)),
        (torch.randn(4, 5), torch.arange(4) + 1),
        (torch.randn(4, 5), torch.arange(4) - 1),
        (torch.randn(4, 5), torch.tensor([0, 1, -100, 2])),
        (torch.randn(4, 5), torch.arange(4).int()),
        (torch.randn(4, 5), torch.arange(4), None, torch.randn(4, 5), torch.arange(4)),
        (torch.randn(4, 5), torch.arange(4) % 2, None, torch.randn(4, 6), torch.arange(4) % 2),
        (torch.randn(4, 5), torch.arange(4) % 2, None, torch.randn(4, 5).double(), torch.arange(4) % 2),
        (torch.randn(0, 5), torch.arange(0)),
        (torch.randint(9, (4, 5)), torch.arange(4) % 2),
    ],
    ids=lambda call: " ".join(str(tuple(t.shape)) if t is not None else "none" for t in call),
)
def test_errors_are_theirs(name, call):
    ours, theirs = pair(name, **options_of(name))
    outcomes = []
    for loss in (ours, theirs):
        try:
            outcomes.append(loss(*call))
        except Exception as error:
            outcomes.append(type(error))
    if isinstance(outcomes[1], type):
        assert outcomes[0] == outcomes[1]
    else:
        torch.testing.assert_close(*outcomes, equal_nan=True)


class Margin(distances.CosineSimilarity):
    """Some other difference."""

    def margin(self, x, y):
        return 2 * super().margin(x, y)


@pytest.mark.parametrize("name", TRIPLETS)
def test_another_difference_of_distances_is_used(name):
    same(name, {"distance": Margin()}, *BATCH, fused=False)


def test_other_labels_of_proxies_are_used():
    ours, theirs = pair("ProxyNCALoss", **HEAD)
    for loss in (ours, theirs):
        loss.proxy_labels = torch.tensor([1, 0, 2, 3])
    assert_equal(run(ours, *BATCH), run(theirs, *BATCH), 0, 0)


@pytest.mark.parametrize("name", TRIPLETS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("reducer", [None, reducers.MeanReducer()])
def test_rows_that_are_not_finite_are_reduced_as_theirs_are(name, bad, reducer):
    """A comparison drops NaN, which a sum does not."""
    embeddings = BATCH[0].index_fill(0, torch.tensor([2]), bad)
    options = {"distance": distances.LpDistance(normalize_embeddings=False), "reducer": reducer}
    values = [loss(embeddings, BATCH[1]) for loss in pair(name, **options)]
    torch.testing.assert_close(*values, equal_nan=True)


def test_a_pair_that_is_positive_and_negative_is_refused_as_by_them():
    both = torch.tensor([0, 0]), torch.tensor([1, 2]), torch.tensor([0, 3]), torch.tensor([1, 4])
    for kind in (both, tuple(t.repeat(8) for t in both)):  # few pairs are sorted, many are masked
        for name in ("SupConLoss", "MultiSimilarityLoss"):
            with of_any_number():
                for loss in pair(name):
                    with pytest.raises(AssertionError, match="either be positive or negative"):
                        loss(*BATCH, kind)


@pytest.mark.parametrize("name", [*PAIRS, *TRIPLETS])
@pytest.mark.parametrize(
    "change",
    [
        lambda t: (t[0], t[1] - 20, t[2]),
        lambda t: (t[0] + 20, t[1], t[2]),
        lambda t: (t[0], t[1], t[2] + 20),
        lambda t: (t[0], t[1] - 12, t[2]),  # counted from the end
        lambda t: (t[0], t[1][:-1], t[2]),
        lambda t: tuple(x.int() for x in t),
        lambda t: tuple(x > 0 for x in t),
        lambda t: tuple(x.tolist() for x in t),
        lambda t: list(t),
        lambda t: t[:2],
        lambda t: tuple(x[:0] for x in t),
        lambda t: tuple(x[None] for x in t),
    ],
)
def test_indices_are_theirs_to_refuse(name, change):
    ours, theirs = pair(name)
    indices = change(tuple(t[:4] for t in mined("triplets", BATCH[1])))  # so few that their rows are gathered
    outcomes = []
    with of_any_number():
        for loss in (ours, theirs):
            try:
                outcomes.append(loss(*BATCH, indices))
            except Exception as error:
                outcomes.append(type(error))
    if isinstance(outcomes[1], type):
        assert outcomes[0] == outcomes[1]
    else:
        torch.testing.assert_close(*outcomes, rtol=1e-9, atol=1e-9)


def test_pairs_of_multi_similarity_where_one_side_alone_is_its_own_reference():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(miners, "FEW_ENTRIES", 0)
        for call in ((*BATCH, BATCH[0], BATCH[1].clone()), (*BATCH, BATCH[0].clone(), BATCH[1])):
            same_samples("MultiSimilarityMiner", {}, call, False)
