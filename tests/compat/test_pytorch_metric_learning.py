"""The drop-in for pytorch-metric-learning, which is itself the oracle."""

import contextlib
import copy
import math
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning import distances, reducers, regularizers
from pytorch_metric_learning import losses as their_losses
from pytorch_metric_learning import miners as their_miners
from pytorch_metric_learning.utils import distributed
from pytorch_metric_learning.utils.loss_and_miner_utils import get_all_pairs_indices, get_all_triplets_indices

from fused_margins.compat import pytorch_metric_learning as compat
from fused_margins.compat.pytorch_metric_learning import calls, losses, miners
from fused_margins.core.indices import UNADMITTED

HEADS = ("ArcFaceLoss", "CosFaceLoss", "NormalizedSoftmaxLoss")
PAIRS = ("NTXentLoss", "SupConLoss")
# Where a call ends that is left to them.
THEIRS = {
    "ArcFaceLoss": (their_losses.LargeMarginSoftmaxLoss, "compute_loss"),
    "SubCenterArcFaceLoss": (their_losses.LargeMarginSoftmaxLoss, "compute_loss"),
    "CosFaceLoss": (their_losses.LargeMarginSoftmaxLoss, "compute_loss"),
    "NormalizedSoftmaxLoss": (their_losses.NormalizedSoftmaxLoss, "compute_loss"),
    "NTXentLoss": (their_losses.GenericPairLoss, "compute_loss"),
    "SupConLoss": (their_losses.GenericPairLoss, "compute_loss"),
    "BatchEasyHardMiner": (their_miners.BatchEasyHardMiner, "mine"),
    "BatchHardMiner": (their_miners.BatchEasyHardMiner, "mine"),
}
REDUCERS = {
    "default": lambda: None,
    "mean": reducers.MeanReducer,
    "sum": reducers.SumReducer,
    "nothing": reducers.DoNothingReducer,
    "above zero": reducers.AvgNonZeroReducer,
    "threshold": lambda: reducers.ThresholdReducer(low=0.3),
    "anchor": reducers.PerAnchorReducer,
    "class": lambda: reducers.ClassWeightedReducer(torch.linspace(0.5, 2.0, 8)),
}
seeds, sizes = st.integers(0, 2**16), st.integers(1, 12)


@contextlib.contextmanager
def left_to_them(name: str) -> Iterator[list[type]]:
    """The classes whose calls are run by their code."""
    (owner, method), seen = THEIRS[name], []
    original = getattr(owner, method)

    def spy(self, *call):
        seen.append(type(self))
        return original(self, *call)

    setattr(owner, method, spy)
    try:
        yield seen
    finally:
        setattr(owner, method, original)


def numbers(result) -> list[torch.Tensor]:
    """A scalar; or what DoNothingReducer lets through, with its indices."""
    if isinstance(result, torch.Tensor):
        return [result]
    found = []
    for part in result.values():
        assert isinstance(part["reduction_type"], str)
        found.append(torch.as_tensor(part["losses"]))
        if part["indices"] is not None:
            found += part["indices"] if isinstance(part["indices"], tuple) else [part["indices"]]
    return found


def run(loss, embeddings, labels, *, indices_tuple=None, ref_emb=None, ref_labels=None):
    """What a call gives, and the gradients of all that has one."""
    embeddings = embeddings.clone().requires_grad_()
    ref_emb = None if ref_emb is None else ref_emb.clone().requires_grad_()
    result = numbers(loss(embeddings, labels, indices_tuple, ref_emb, ref_labels))
    leaves = [embeddings, *([] if ref_emb is None else [ref_emb]), *loss.parameters()]
    total = sum((t * torch.linspace(1, 2, t.numel()).view_as(t)).sum() for t in result if t.is_floating_point())
    gradients = [None] * len(leaves)
    if isinstance(total, torch.Tensor) and total.requires_grad:
        gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    # Theirs has none, or zeros, where nothing depends on a leaf.
    return [*result, *[torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients)]]


def assert_equal(ours, theirs, rtol, atol):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, equal_nan=True)


def pair(name: str, **options):
    """Ours and theirs, of equal parameters."""
    module = losses if "Loss" in name else miners
    theirs = getattr(their_losses if "Loss" in name else their_miners, name)(**copy.deepcopy(options))
    ours = getattr(module, name)(**options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def same(name, options, embeddings, labels, *, fused, **call):
    """Ours equals theirs in float64 to 1e-9, and in float32 is as near to that; `fused`: whether a kernel runs."""
    ours, theirs = pair(name, **options)
    want = run(theirs.double(), embeddings.double(), labels, **_of_dtype(call, torch.float64))
    for dtype, rtol, atol in ((torch.float64, 1e-9, 1e-9), (torch.float32, 1e-4, 1e-4)):
        ours = ours.to(dtype)
        with left_to_them(name) as seen:
            got = run(ours, embeddings.to(dtype), labels, **_of_dtype(call, dtype))
        assert seen == ([] if fused else [type(ours)])
        assert all(t.dtype == dtype for t in got if t.is_floating_point())
        assert_equal([t.double() if t.is_floating_point() else t for t in got], want, rtol, atol)


def _of_dtype(call, dtype):
    return {k: v.to(dtype) if k == "ref_emb" and v is not None else v for k, v in call.items()}


def mined(kind, labels):
    """What a miner could have found."""
    if kind is None:
        return None
    return get_all_triplets_indices(labels) if kind == "triplets" else get_all_pairs_indices(labels)


@settings(max_examples=30)
@given(
    name=st.sampled_from(HEADS),
    seed=seeds,
    rows=sizes,
    classes=st.integers(1, 8),
    reducer=st.sampled_from(sorted(REDUCERS)),
    indices=st.sampled_from([None, "triplets", "pairs"]),
    of_embeddings=st.booleans(),
    of_weight=st.booleans(),
    number=st.floats(0.1, 1.0),
)
def test_heads_are_theirs(name, seed, rows, classes, reducer, indices, of_embeddings, of_weight, number):
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (rows,), generator=generator)
    options = {"num_classes": classes, "embedding_size": 5, "reducer": REDUCERS[reducer]()}
    options |= {"embedding_regularizer": regularizers.LpRegularizer()} if of_embeddings else {}
    options |= {"weight_regularizer": regularizers.ZeroMeanRegularizer(), "weight_reg_weight": 3} if of_weight else {}
    if name == "NormalizedSoftmaxLoss":
        options |= {"temperature": number}
    else:
        options |= {"margin": number * (180 if name == "ArcFaceLoss" else 2) - (name == "CosFaceLoss"), "scale": 6}
    same(name, options, embeddings, labels, fused=True, indices_tuple=mined(indices, labels))


@settings(max_examples=40)
@given(
    name=st.sampled_from(PAIRS),
    seed=seeds,
    rows=sizes,
    columns=st.one_of(st.none(), sizes),
    classes=st.integers(1, 6),
    dtype=st.sampled_from([torch.int64, torch.int32, torch.uint8]),
    reducer=st.sampled_from(sorted(REDUCERS)),
    regularized=st.booleans(),
    normalized=st.booleans(),
    temperature=st.floats(0.3, 3.0),
    shared=st.booleans(),
)
def test_pair_losses_are_theirs(
    name, seed, rows, columns, classes, dtype, reducer, regularized, normalized, temperature, shared
):
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (rows,), generator=generator).to(dtype)
    options = {"temperature": temperature, "reducer": REDUCERS[reducer]()}
    options |= {"embedding_regularizer": regularizers.LpRegularizer()} if regularized else {}
    if not normalized:
        options["distance"] = distances.DotProductSimilarity(normalize_embeddings=False)
        embeddings = embeddings / 4  # so that no loss comes near to zero, where reducers would flip
    call = {}
    if columns is not None:
        columns = rows if shared else columns
        call["ref_emb"] = torch.randn(columns, 5, generator=generator, dtype=torch.float64) / 4
        # One tensor for both sides of labels says that a row is its own reference.
        call["ref_labels"] = labels if shared else torch.randint(classes, (columns,), generator=generator)
    if reducer == "anchor" and columns is not None and columns > rows:
        reducer = "mean"  # theirs counts the positives of references as anchors
        options["reducer"] = None
    same(name, options, embeddings, labels, fused=True, **call)


@settings(max_examples=40)
@given(
    strategies=st.tuples(*[st.sampled_from(["easy", "semihard", "hard", "all"])] * 2).filter(
        lambda s: s not in [("semihard", "semihard"), ("all", "semihard"), ("semihard", "all")]
    ),
    distance=st.sampled_from(["default", "squared", "plain", "cosine", "dot"]),
    seed=seeds,
    rows=st.integers(1, 30),
    columns=st.one_of(st.none(), sizes),
    classes=st.integers(1, 6),
    dtype=st.sampled_from([torch.int64, torch.int16]),
)
def test_easy_and_hard_samples_are_theirs(strategies, distance, seed, rows, columns, classes, dtype):
    make = {
        "default": lambda: None,
        "squared": lambda: distances.LpDistance(power=2),
        "plain": lambda: distances.LpDistance(normalize_embeddings=False),
        "cosine": distances.CosineSimilarity,
        "dot": lambda: distances.DotProductSimilarity(normalize_embeddings=False),
    }[distance]
    positives, negatives = strategies
    options = {"pos_strategy": positives, "neg_strategy": negatives, "distance": make()}
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (rows,), generator=generator).to(dtype)
    call = [torch.randn(rows, 5, generator=generator, dtype=torch.float64), labels]
    if columns is not None:
        call += [torch.randn(columns, 5, generator=generator, dtype=torch.float64)]
        call += [torch.randint(classes, (columns,), generator=generator).to(dtype)]
    euclidean = distance in ("default", "squared", "plain")
    fused = negatives != "all" and not (euclidean and positives == "semihard")
    same_samples("BatchEasyHardMiner", options, call, fused)
    if strategies == ("hard", "hard"):
        same_samples("BatchHardMiner", {"distance": make()}, call, True)


def same_samples(name, options, call, fused):
    ours, theirs = pair(name, **options)
    with left_to_them(name) as seen:
        found = ours(*call)
    assert seen == ([] if fused else [type(ours)])
    wanted = theirs(*call)
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    counts = ("num_pos_pairs", "num_neg_pairs", "num_triplets")
    assert [getattr(ours, n, None) for n in counts] == [getattr(theirs, n, None) for n in counts]


BATCH = torch.arange(60, dtype=torch.float64).sin().view(12, 5), torch.arange(12) % 4


class LearnedDistance(distances.CosineSimilarity):
    """Some other measure."""

    def compute_mat(self, query_emb, ref_emb):
        return super().compute_mat(query_emb, ref_emb) ** 3


def hooked():
    distance = distances.CosineSimilarity()
    distance.register_forward_hook(lambda module, inputs, mat: mat.exp())
    return distance


HEAD = {"num_classes": 4, "embedding_size": 5}


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
        ("SubCenterArcFaceLoss", HEAD | {"sub_centers": 2}),
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
    "options",
    [
        {"allowed_pos_range": (0.2, 1.0)},
        {"allowed_neg_range": (0.2, 1.0), "pos_strategy": "hard", "neg_strategy": "hard"},
        {"collect_stats": True},
        {"distance": distances.LpDistance(p=1)},
        {"distance": distances.LpDistance(power=3)},
        {"distance": LearnedDistance()},
        {"distance": distances.CosineSimilarity(collect_stats=True)},
    ],
    ids=str,
)
def test_searches_that_no_kernel_makes_are_left_to_them(options):
    same_samples("BatchEasyHardMiner", options, BATCH, False)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("kind", ["triplets", "pairs"])
def test_mined_pairs_are_left_to_them(name, kind):
    same(name, {}, *BATCH, fused=False, indices_tuple=mined(kind, BATCH[1]))


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
        (
            "SupConLoss",
            "mat_based_loss",
            lambda found: {"loss": found["loss"] | {"losses": found["loss"]["losses"] * 2}},
        ),
    ],
)
def test_a_hook_of_a_subclass_is_heard(name, hook, change):
    options = HEAD if name in HEADS else {}
    ours, theirs = (getattr(m, name) for m in (losses, their_losses))

    def replaced(base):
        return type(name, (base,), {hook: lambda self, *a: change(getattr(base, hook)(self, *a))})

    ours, theirs = replaced(ours)(**options), replaced(theirs)(**options)
    ours.load_state_dict(theirs.state_dict())
    assert_equal(run(ours, *BATCH), run(theirs, *BATCH), 0, 0)
    unchanged = pair(name, **options)[1]
    unchanged.load_state_dict(theirs.state_dict())
    assert run(unchanged, *BATCH)[0] != run(ours, *BATCH)[0]
    # Or of one module alone.
    patched = pair(name, **options)[0]
    patched.load_state_dict(theirs.state_dict())
    if "loss" not in hook:
        method = getattr(patched, hook)
        setattr(patched, hook, lambda *a: change(method(*a)))
        assert_equal(run(patched, *BATCH), run(theirs, *BATCH), 0, 0)


def test_a_hook_of_a_miner_is_heard():
    class Reversed(miners.BatchHardMiner):
        def get_positives(self, *a):
            self.seen = True
            return super().get_positives(*a)

    miner = Reversed()
    found = miner(*BATCH)
    assert miner.seen
    assert all(map(torch.equal, found, their_miners.BatchHardMiner()(*BATCH)))


@pytest.mark.parametrize("name", [*HEADS, *PAIRS])
def test_transformed_calls_are_left_to_them(name):
    # Double beforehand: a parameter that theirs casts within a transform is not valid after it.
    ours, theirs = (loss.double() for loss in pair(name, **(HEAD if name in HEADS else {})))
    with left_to_them(name) as seen:
        gradient = torch.func.grad(lambda embeddings: ours(embeddings, BATCH[1]))(BATCH[0])
    assert seen == [type(ours)]
    torch.testing.assert_close(gradient, run(theirs, *BATCH)[1], rtol=1e-9, atol=1e-9)


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


@pytest.mark.parametrize("name", [*HEADS, *PAIRS])
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
    ours, theirs = pair(name, **(HEAD if name in HEADS else {}))
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


def test_all_that_they_export_is_there():
    for ours, theirs in ((losses, their_losses), (miners, their_miners)):
        names = [n for n in dir(theirs) if not n.startswith("_")]
        assert ours.__all__ == names
        replaced = set()
        for name in names:
            a, b = getattr(ours, name), getattr(theirs, name)
            if a is not b:
                replaced.add(name)
                assert issubclass(a, b)
                assert a.__name__ == b.__name__ == name
        assert replaced == {n for n in (*THEIRS, "CrossBatchMemory") if n in names}
        # A class that descends from one that is replaced descends from ours.
        for name in names:
            for base in replaced:
                if isinstance(getattr(theirs, name), type) and issubclass(getattr(theirs, name), getattr(theirs, base)):
                    assert issubclass(getattr(ours, name), getattr(ours, base))
    assert compat.reducers is reducers
    assert compat.distances is distances
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = compat.nothing


@pytest.mark.parametrize("name", [*HEADS, *PAIRS, "SubCenterArcFaceLoss"])
def test_state_dicts_load_both_ways(name):
    ours, theirs = pair(name, **(HEAD if name not in PAIRS else {}))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert repr(ours) == repr(theirs)
    again = copy.deepcopy(ours)
    with left_to_them(name) as seen:
        value = again(*BATCH)
    assert seen == ([] if name != "SubCenterArcFaceLoss" else [type(ours)])
    torch.testing.assert_close(value, theirs(*BATCH))


@pytest.mark.parametrize("name", HEADS)
def test_a_wide_batch_widens_the_weight_and_a_half_one_leaves_it(name):
    ours, theirs = pair(name, **HEAD, scale=4) if name != "NormalizedSoftmaxLoss" else pair(name, **HEAD)
    want = run(theirs.double(), BATCH[0].bfloat16().double(), BATCH[1])[0]
    for dtype in (torch.bfloat16, torch.float16):
        with left_to_them(name) as seen:
            loss = ours(BATCH[0].to(dtype), BATCH[1])
        assert not seen
        assert (loss.dtype, ours.W.dtype) == (dtype, torch.float32)
        torch.testing.assert_close(loss.double(), want, rtol=0.05, atol=0.05)
    theirs.float()(BATCH[0].bfloat16(), BATCH[1])
    assert theirs.W.dtype == torch.bfloat16  # the fault of theirs
    ours(*BATCH)
    assert ours.W.dtype == torch.float64


@pytest.mark.parametrize("name", [*HEADS, *PAIRS])
def test_autocast_is_heard(name):
    ours, theirs = pair(name, **(HEAD if name in HEADS else {}))
    embeddings = BATCH[0].float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(embeddings, BATCH[1])
    assert loss.dtype == torch.float32
    loss.backward()
    assert embeddings.grad.dtype == torch.float32
    torch.testing.assert_close(loss, theirs(BATCH[0].float(), BATCH[1]), rtol=0.05, atol=0.05)


def test_wrappers_take_ours():
    ours, theirs = pair("NTXentLoss")
    both = [
        [
            m.MultipleLosses([loss, m.SupConLoss()], weights=[1, 2]),
            m.SelfSupervisedLoss(loss),
            m.SelfSupervisedLoss(loss, symmetric=False),
        ]
        for m, loss in ((losses, ours), (their_losses, theirs))
    ]
    views = BATCH[0], BATCH[0].cos()
    for i, (a, b) in enumerate(zip(*both)):
        call = BATCH if i == 0 else views
        torch.testing.assert_close(a(*call), b(*call), rtol=1e-9, atol=0)
    with pytest.warns(UserWarning, match="non-distributed"):
        value = distributed.DistributedLossWrapper(ours)(*BATCH)
    torch.testing.assert_close(value, theirs(*BATCH), rtol=1e-9, atol=0)
    assert distributed.DistributedMinerWrapper(miners.BatchHardMiner()).miner


@settings(max_examples=12)
@given(name=st.sampled_from([*PAIRS, "TripletMarginLoss"]), seed=seeds, memory=st.integers(6, 20), masked=st.booleans())
def test_a_memory_across_batches_is_theirs(name, seed, memory, masked):
    generator = torch.Generator().manual_seed(seed)
    ours, theirs = (m.CrossBatchMemory(getattr(m, name)(), 5, memory) for m in (losses, their_losses))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for rows in (4, 5, 1, 6, 6, 3):
        embeddings = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
        labels = torch.randint(3, (rows,), generator=generator)
        mask = torch.arange(rows) % 2 == 0 if masked and rows > 2 else None
        of_both = []
        for loss, module in ((ours, losses), (theirs, their_losses)):
            leaf = embeddings.clone().requires_grad_()
            with left_to_them("NTXentLoss") as seen:
                value = loss(leaf, labels, enqueue_mask=mask)
            if module is losses and name in PAIRS:
                # Of a single row, theirs compares the row with itself; so do we.
                assert seen == ([type(loss.loss)] if rows - (0 if mask is None else int(mask.sum())) == 1 else [])
            (gradient,) = torch.autograd.grad(value, leaf)
            of_both.append([value, gradient])
        assert_equal(*of_both, 1e-9, 1e-9)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert_equal(list(ours.state_dict().values()), list(theirs.state_dict().values()), 0, 0)


def test_a_memory_with_mined_pairs_is_theirs():
    options = {"miner": their_miners.MultiSimilarityMiner()}
    of_both = [m.CrossBatchMemory(m.NTXentLoss(), 5, 12, **options)(*BATCH) for m in (losses, their_losses)]
    torch.testing.assert_close(*of_both, rtol=0, atol=0)
    pairs = get_all_pairs_indices(BATCH[1])
    of_both = [m.CrossBatchMemory(m.NTXentLoss(), 5, 12)(*BATCH, pairs) for m in (losses, their_losses)]
    torch.testing.assert_close(*of_both, rtol=0, atol=0)
    # A loss that leaves the call to them gets the pairs.
    of_both = [
        m.CrossBatchMemory(m.NTXentLoss(distance=distances.LpDistance()), 5, 12)(*BATCH) for m in (losses, their_losses)
    ]
    torch.testing.assert_close(*of_both, rtol=0, atol=0)


def test_ntxent_does_not_saturate():
    """Theirs adds the least float32 to a probability and takes the logarithm: -87.34, and no gradient."""
    x, labels = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    references = {"ref_emb": torch.tensor([[-1.0, 1e-2], [1.0, 1e-2], [1.0, -1e-2]]), "ref_labels": torch.arange(3)}
    ours, theirs = pair("NTXentLoss", temperature=0.01)
    truth = run(theirs, x.double(), labels, **_of_dtype(references, torch.float64))
    assert truth[0].item() == pytest.approx(200 + math.log(2), abs=0.02)
    got, saturated = run(ours, x, labels, **references), run(theirs, x, labels, **references)
    assert_equal([t.double() for t in got], truth, 1e-4, 1e-4)
    assert saturated[0].item() == pytest.approx(87.34, abs=0.01)
    assert truth[1].abs().max() > 0.5
    assert not saturated[1].any()


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("labels", [[0, 1], [0, 0], [1, 2], [0, 1, 1]])
def test_a_single_pair_of_either_kind_is_none_to_them(name, labels):
    references = {"ref_emb": BATCH[0][1 : 1 + len(labels)], "ref_labels": torch.tensor(labels)}
    same(name, {}, BATCH[0][:1], torch.tensor([0]), fused=True, **references)


def test_two_views_with_a_small_loss_count_in_a_mean_of_what_is_above_zero():
    """Theirs rounds it to zero and drops it, so that the mean is over the other rows."""
    x = torch.tensor([[1.0, 0.0], [1.0, 0.01], [0.0, 1.0], [0.6, 0.8]])
    call = x, torch.tensor([0, 0, 1, 1])
    ours, theirs = pair("SupConLoss", temperature=0.02)
    rows = [1, 0, 3, 2]
    u = torch.nn.functional.normalize(x.double())
    logits = (u @ u.T / 0.02).fill_diagonal_(-torch.inf)
    truth = torch.nn.functional.cross_entropy(logits, torch.tensor(rows)).item()
    assert ours(*call).item() == pytest.approx(truth, rel=1e-5)
    assert theirs(*call).item() > 1.3 * truth


@pytest.mark.parametrize(("name", "margin"), [("ArcFaceLoss", {"margin": 0}), ("NormalizedSoftmaxLoss", {})])
def test_small_losses_are_not_rounded_to_zero(name, margin):
    ours, theirs = pair(name, num_classes=2, embedding_size=2, **margin)
    state = {"W": torch.tensor([[1.0, -1.0], [0.1, 0.0]])}
    for loss in (ours, theirs):
        loss.load_state_dict(state)
    x, labels = torch.tensor([[1.0, 0.2]]), torch.tensor([0])
    scale = 64 if name == "ArcFaceLoss" else 20
    unit = torch.nn.functional.normalize
    u = unit(x.double()) @ unit(state["W"].double(), dim=0)
    truth = math.log1p(math.exp(float(u[0, 1] - u[0, 0]) * scale))
    assert ours(x, labels).item() == pytest.approx(truth, rel=1e-3)
    assert theirs(x, labels).item() == 0


def test_gradients_are_finite_at_the_poles_and_at_zero():
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])
    for name in HEADS:
        ours, theirs = pair(name, num_classes=2, embedding_size=2)
        for loss in (ours, theirs):
            loss.load_state_dict({"W": torch.tensor([[1.0, 0.0], [0.0, 1.0]])})
        got, want = run(ours, x, torch.tensor([0, 0, 1])), run(theirs, x, torch.tensor([0, 0, 1]))
        torch.testing.assert_close(got[0], want[0])
        assert all(t.isfinite().all() for t in got)
        assert not got[1][2].any()  # a row of zeros has no direction
        if name == "ArcFaceLoss":
            assert not want[1].isfinite().all()
        else:
            assert want[1][2].abs().max() > 1e9


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


@pytest.mark.parametrize("name", [*HEADS, *PAIRS])
def test_a_row_that_is_not_finite_makes_the_loss_nan(name):
    embeddings = BATCH[0].index_fill(0, torch.tensor([2]), torch.nan)
    options = {"reducer": reducers.DoNothingReducer()}  # a comparison drops NaN
    ours, theirs = (
        numbers(loss(embeddings, BATCH[1])) for loss in pair(name, **options, **HEAD if name in HEADS else {})
    )
    assert ours[0].isnan().any()
    assert bool((ours[0].isnan() >= theirs[0].isnan()).all())


def test_a_row_of_nan_is_never_mined():
    embeddings = BATCH[0].index_fill(0, torch.tensor([2]), torch.nan)
    for strategies in (("easy", "hard"), ("hard", "easy"), ("easy", "semihard"), ("hard", "hard")):
        found = miners.BatchEasyHardMiner(*strategies)(embeddings, BATCH[1])
        assert found[0].tolist() == [0, 1, *range(3, 12)]
        assert not any((t == 2).any() for t in found)


def test_a_missing_or_old_package_names_the_extra(monkeypatch):
    name = "fused_margins.compat.pytorch_metric_learning"
    for old, kind in ((None, ModuleNotFoundError), ("2.7.1", ImportError)):
        with monkeypatch.context() as patch:
            patch.delitem(sys.modules, name)
            if old is None:
                patch.setitem(sys.modules, "pytorch_metric_learning", None)
            else:
                patch.setattr("pytorch_metric_learning.__version__", old)
            with pytest.raises(kind, match=r'2\.8 or newer.*pip install "fused-margins\[pml\]"'):
                __import__(name)


def test_pairs_are_made_when_they_are_looked_at():
    labels = torch.tensor([0, 0, 1])
    found = list(calls.AllPairs(labels, labels.clone(), torch.arange(3)))
    assert all(map(torch.equal, found, get_all_pairs_indices(labels)))
