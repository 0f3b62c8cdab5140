"""The drop-in has their names, state dicts and wrappers."""

import copy
import importlib
import sys

import pytest
import pytorch_metric_learning
import torch
from pytorch_metric_learning import distances, reducers
from pytorch_metric_learning import losses as their_losses
from pytorch_metric_learning import miners as their_miners
from pytorch_metric_learning.utils import distributed
from pytorch_metric_learning.utils.loss_and_miner_utils import get_all_pairs_indices

from fused_margins.compat import pytorch_metric_learning as compat
from fused_margins.compat.pytorch_metric_learning import calls, explain, losses, miners

from .oracle import BATCH, HEAD, HEADS, OTHERS, PAIRS, PROXIES, THEIRS, left_to_them, options_of, pair, run, weight_of


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


@pytest.mark.parametrize("name", [*HEADS, *PROXIES, *PAIRS, *OTHERS])
def test_state_dicts_load_both_ways(name):
    ours, theirs = pair(name, **options_of(name))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert repr(ours) == repr(theirs)
    again = copy.deepcopy(ours)
    with left_to_them(name) as seen:
        value = again(*BATCH)
    assert not seen
    torch.testing.assert_close(value, theirs(*BATCH))


@pytest.mark.parametrize("name", HEADS)
def test_a_wide_batch_widens_the_weight_and_a_half_one_leaves_it(name):
    scales = {"NormalizedSoftmaxLoss": {}, "SoftTripleLoss": {"la": 4}}
    ours, theirs = pair(name, **HEAD, **scales.get(name, {"scale": 4}))
    weight = weight_of(ours)
    want = run(theirs.double(), BATCH[0].bfloat16().double(), BATCH[1])[0]
    for dtype in (torch.bfloat16, torch.float16):
        with left_to_them(name) as seen:
            loss = ours(BATCH[0].to(dtype), BATCH[1])
        assert not seen
        assert (loss.dtype, getattr(ours, weight).dtype) == (dtype, torch.float32)
        torch.testing.assert_close(loss.double(), want, rtol=0.05, atol=0.05)
    theirs.float()(BATCH[0].bfloat16(), BATCH[1])
    assert getattr(theirs, weight).dtype == torch.bfloat16  # the fault of theirs
    ours(*BATCH)
    assert getattr(ours, weight).dtype == torch.float64


@pytest.mark.parametrize("name", [*HEADS, *PROXIES, *PAIRS, *OTHERS])
def test_autocast_is_heard(name):
    ours, theirs = pair(name, **options_of(name))
    embeddings = BATCH[0].float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(embeddings, BATCH[1])
    assert loss.dtype == torch.float32
    loss.backward()
    assert embeddings.grad.dtype == torch.float32
    torch.testing.assert_close(loss, theirs(BATCH[0].float(), BATCH[1]), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", ["NCALoss", "ProxyNCALoss"])
def test_autocast_rounds_no_distances(name):
    ours, theirs = pair(name, **options_of(name))
    with torch.autocast("cpu", torch.bfloat16):
        loss, of_theirs = (m.float()(BATCH[0].float(), BATCH[1]) for m in (ours, theirs))
    torch.testing.assert_close(loss, of_theirs, rtol=1e-5, atol=1e-6)


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
    named = "NTXentLoss: our code, by labels"
    assert explain(both[0][0], *BATCH) == f"MultipleLosses of {named}; SupConLoss: our code, by labels"
    for wrapper in both[0][1:]:
        assert explain(wrapper, views[0], ref_emb=views[1]) == f"SelfSupervisedLoss of {named}"
    with pytest.warns(UserWarning, match="non-distributed"):
        value = distributed.DistributedLossWrapper(ours)(*BATCH)
    torch.testing.assert_close(value, theirs(*BATCH), rtol=1e-9, atol=0)
    assert distributed.DistributedMinerWrapper(miners.BatchHardMiner()).miner


def test_every_form_of_import_finds_what_theirs_finds():
    package = compat.__name__
    for name in ("distances", "distances.cosine_similarity", "utils.inference", "utils.accuracy_calculator"):
        before = sys.modules[f"pytorch_metric_learning.{name}"].__spec__
        found = importlib.import_module(f"{package}.{name}")
        assert found is sys.modules[f"pytorch_metric_learning.{name}"]
        assert found.__spec__ is before
    assert compat.__version__ == pytorch_metric_learning.__version__
    for name in ("losses.arcface_loss", "nothing", "utils.nothing"):
        with pytest.raises(ModuleNotFoundError, match=name):
            importlib.import_module(f"{package}.{name}")


def test_triplets_give_a_reducer_no_divisor():
    for module in (losses, their_losses):
        with pytest.raises(KeyError, match="divisor"):
            module.TripletMarginLoss(reducer=reducers.DivisorReducer())(*BATCH)


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
