"""pytorch-metric-learning as the oracle of the drop-in for it: ours beside theirs."""

import contextlib
import copy
import warnings
from collections.abc import Iterator

import pytest
import torch
from hypothesis import strategies as st
from pytorch_metric_learning import distances, reducers, regularizers
from pytorch_metric_learning import losses as their_losses
from pytorch_metric_learning import miners as their_miners
from pytorch_metric_learning.utils.loss_and_miner_utils import get_all_pairs_indices, get_all_triplets_indices

from fused_margins.compat.pytorch_metric_learning import calls, losses, miners

HEADS = (
    "ArcFaceLoss",
    "SubCenterArcFaceLoss",
    "CosFaceLoss",
    "NormalizedSoftmaxLoss",
    "LargeMarginSoftmaxLoss",
    "SphereFaceLoss",
    "SoftTripleLoss",
)
PROXIES = ("ProxyAnchorLoss", "ProxyNCALoss")
PAIRS = ("NTXentLoss", "SupConLoss", "MultiSimilarityLoss")
TRIPLETS = ("TripletMarginLoss", "MarginLoss")
OTHERS = ("NCALoss", *TRIPLETS)
# Where a call ends that is left to them.
THEIRS = {
    **dict.fromkeys(HEADS, (their_losses.LargeMarginSoftmaxLoss, "compute_loss")),
    "SoftTripleLoss": (their_losses.SoftTripleLoss, "compute_loss"),
    "NormalizedSoftmaxLoss": (their_losses.NormalizedSoftmaxLoss, "compute_loss"),
    **{name: (getattr(their_losses, name), "compute_loss") for name in (*PROXIES, *OTHERS)},
    **dict.fromkeys((*PAIRS, "GeneralizedLiftedStructureLoss"), (their_losses.GenericPairLoss, "compute_loss")),
    "BatchEasyHardMiner": (their_miners.BatchEasyHardMiner, "mine"),
    "BatchHardMiner": (their_miners.BatchEasyHardMiner, "mine"),
    "MultiSimilarityMiner": (their_miners.MultiSimilarityMiner, "mine"),
    "DistanceWeightedMiner": (their_miners.DistanceWeightedMiner, "mine"),
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
    "of each part": lambda: reducers.MultipleReducers({"loss": reducers.SumReducer()}, reducers.MeanReducer()),
}
REGULARIZERS = {
    "none": lambda: None,
    "zero mean": regularizers.ZeroMeanRegularizer,
    "center invariant": regularizers.CenterInvariantRegularizer,
    "regular face": regularizers.RegularFaceRegularizer,
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
    with warnings.catch_warnings():  # theirs passes tensors to scipy
        warnings.simplefilter("ignore", DeprecationWarning)
        theirs = getattr(their_losses if "Loss" in name else their_miners, name)(**copy.deepcopy(options))
        ours = getattr(module, name)(**options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def same(name, options, embeddings, labels, *, fused, **call):
    """Ours equals theirs in float64 to 1e-9, and in float32 is as near to that; `fused`: whether a kernel runs."""
    ours, theirs = pair(name, **options)
    want = run(theirs.double(), embeddings.double(), labels, **of_dtype(call, torch.float64))
    for dtype, rtol, atol in ((torch.float64, 1e-9, 1e-9), (torch.float32, 1e-4, 1e-4)):
        ours = ours.to(dtype)
        with left_to_them(name) as seen:
            got = run(ours, embeddings.to(dtype), labels, **of_dtype(call, dtype))
        assert seen == ([] if fused else [type(ours)])
        assert all(t.dtype == dtype for t in got if t.is_floating_point())
        assert_equal([t.double() if t.is_floating_point() else t for t in got], want, rtol, atol)


def of_dtype(call, dtype):
    return {k: v.to(dtype) if k == "ref_emb" and v is not None else v for k, v in call.items()}


def mined(kind, labels, ref_labels=None, generator=None):
    """What a miner could have found: all, or some with repetitions."""
    if kind is None:
        return None
    if kind == "triplets":
        return get_all_triplets_indices(labels, ref_labels)
    a1, p, a2, n = get_all_pairs_indices(labels, ref_labels)
    if kind == "some":
        i, j = (torch.randint(len(a), (len(a) // 2,), generator=generator) if len(a) else a for a in (a1, a2))
        a1, p, a2, n = a1[i], p[i], a2[j], n[j]
    return a1, p, a2, n


DISTANCES = {
    "default": lambda: None,
    "squared": lambda: distances.LpDistance(power=2),
    "plain": lambda: distances.LpDistance(normalize_embeddings=False),
    "cosine": distances.CosineSimilarity,
    "dot": lambda: distances.DotProductSimilarity(normalize_embeddings=False),
    "city": lambda: distances.LpDistance(p=1),
}


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


HEAD = {"num_classes": 4, "embedding_size": 5}


def options_of(name: str) -> dict:
    """What a constructor needs."""
    return dict(HEAD) if name in (*HEADS, *PROXIES) else {}


def weight_of(loss: torch.nn.Module) -> str:
    """The name of a head's parameter."""
    ((name, _),) = loss.named_parameters()
    return name


@contextlib.contextmanager
def of_any_number() -> Iterator[None]:
    """Listed pairs are gathered although the matrix of all, in a small test, is smaller."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calls, "why_not_gathered", lambda *_: None)
        yield
