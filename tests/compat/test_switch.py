"""Their classes turn into ours and back, in modules that exist and in those that are built from now on."""

import copy
import pickle
import re

import pytest
import pytorch_metric_learning
import torch
from pytorch_metric_learning import distances, reducers
from pytorch_metric_learning import losses as their_losses
from pytorch_metric_learning import miners as their_miners
from pytorch_metric_learning.losses import CosFaceLoss as imported_before
from pytorch_metric_learning.utils import distributed as their_distributed

from fused_margins.compat.pytorch_metric_learning import accelerate, explain, losses, miners, patch, restore
from fused_margins.compat.pytorch_metric_learning.switch import OURS
from fused_margins.compat.pytorch_metric_learning.utils import accuracy_calculator, distributed

from .oracle import BATCH, HEAD, OTHERS, PAIRS, PROXIES, THEIRS, left_to_them, mined, options_of, run


class Model(torch.nn.Module):
    """A trunk and losses inside of it, one in a memory."""

    def __init__(self):
        super().__init__()
        self.trunk = torch.nn.Linear(5, 5).double()
        parts = [their_losses.CosFaceLoss(**HEAD).double(), their_losses.ProxyAnchorLoss(**HEAD).double()]
        memory = their_losses.CrossBatchMemory(their_losses.NTXentLoss(), 5, 12, miner=their_miners.BatchHardMiner())
        self.losses = torch.nn.ModuleList([*parts, memory, CosFaceOfAUser(**HEAD)])

    def forward(self, x, labels):
        return sum(loss(self.trunk(x), labels) for loss in self.losses)


class CosFaceOfAUser(their_losses.CosFaceLoss):
    """A class of a user's, which nobody turns into another."""


def test_a_model_turns_into_ours_and_back_in_place():
    torch.manual_seed(0)
    model = Model()
    kinds, state = [type(m) for m in model.modules()], copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parameters, heard = list(model.parameters()), []
    hook = model.losses[0].register_forward_hook(lambda *_: heard.append(1))
    want = copy.deepcopy(model)(*BATCH)
    heard.clear()
    assert accelerate(model) is model
    found = {type(m) for m in model.modules()}
    assert found >= {losses.CosFaceLoss, losses.ProxyAnchorLoss, losses.CrossBatchMemory, losses.NTXentLoss}
    assert found >= {miners.BatchHardMiner, CosFaceOfAUser, torch.nn.Linear, distances.CosineSimilarity}
    assert all(a is b for a, b in zip(parameters, model.parameters()))
    assert model.state_dict().keys() == state.keys()
    value = model(*BATCH)
    torch.testing.assert_close(value, want, rtol=1e-9, atol=0)
    value.backward()
    optimizer.step()
    assert not torch.equal(model.losses[0].W, state["losses.0.W"])
    assert heard == [1]
    assert restore(model) is model
    assert [type(m) for m in model.modules()] == kinds
    accelerate(accelerate(model))
    hook.remove()
    with left_to_them("CosFaceLoss") as seen:
        pickle.loads(pickle.dumps(model.losses[0]))(*BATCH)
    assert seen == []


def test_every_class_of_ours_turns():
    names = {*THEIRS, "CrossBatchMemory", "DistributedLossWrapper", "DistributedMinerWrapper"}
    assert {kind.__name__ for kind in OURS} == names
    for name in (*PAIRS, *PROXIES, *OTHERS):
        torch.manual_seed(0)
        loss = getattr(their_losses, name)(**options_of(name)).double()
        want = run(loss, *BATCH)
        with left_to_them(name) as seen:
            got = run(accelerate(loss), *BATCH)
        assert seen == []
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("turn", [accelerate, restore])
def test_what_is_no_module_is_named(turn):
    with pytest.raises(TypeError, match=r"module: expected a torch.nn.Module, got list"):
        turn([])


def test_a_patch_builds_ours_and_is_undone():
    before = dict(vars(their_losses))
    built_before = their_losses.CrossBatchMemory(their_losses.NTXentLoss(), 5, 8)
    with patch():
        from pytorch_metric_learning.losses import NTXentLoss
        from pytorch_metric_learning.losses.ntxent_loss import NTXentLoss as of_its_module

        assert NTXentLoss is pytorch_metric_learning.losses.NTXentLoss is losses.NTXentLoss
        assert type(of_its_module()) is losses.NTXentLoss
        assert type(pickle.loads(pickle.dumps(built_before)).loss) is losses.NTXentLoss  # built anew
        assert type(built_before.loss) is of_its_module
        assert type(imported_before(**HEAD)) is losses.CosFaceLoss
        assert type(CosFaceOfAUser(**HEAD)) is CosFaceOfAUser
        assert type(pytorch_metric_learning.miners.BatchHardMiner()) is miners.BatchHardMiner
        assert type(reducers.MeanReducer()) is reducers.MeanReducer

        class Mine(pytorch_metric_learning.losses.NTXentLoss):
            pass

        assert issubclass(Mine, losses.NTXentLoss)
        # What was built before is still what their own code takes it for.
        wrapper = their_distributed.DistributedLossWrapper(built_before)
        assert type(wrapper) is distributed.DistributedLossWrapper
        with patch():
            pass
        assert pytorch_metric_learning.losses.NTXentLoss is losses.NTXentLoss
    assert dict(vars(their_losses)) == before
    assert type(imported_before(**HEAD)) is type(their_losses.CosFaceLoss(**HEAD)) is imported_before
    first = patch()
    first.undo()
    first.undo()
    assert dict(vars(their_losses)) == before
    with first:
        assert type(their_losses.NTXentLoss()) is losses.NTXentLoss
    assert dict(vars(their_losses)) == before
    with pytest.raises(ZeroDivisionError), patch():
        _ = 1 / 0
    assert dict(vars(their_losses)) == before


CALL = BATCH[0].float(), BATCH[1]


@pytest.mark.parametrize(
    ("module", "call", "words"),
    [
        (losses.NTXentLoss(), {}, "NTXentLoss: our code, by labels"),
        (losses.NTXentLoss(), {"indices_tuple": mined("pairs", CALL[1])}, "by the indices_tuple"),
        (losses.NTXentLoss(distance=distances.SNRDistance()), {}, "learning: the distance is SNRDistance"),
        (losses.NTXentLoss(collect_stats=True), {}, "the loss collects statistics"),
        (losses.TripletMarginLoss(swap=True), {}, "with swap"),
        (losses.TripletMarginLoss(triplets_per_anchor=5), {}, "triplets are drawn at random"),
        (losses.TripletMarginLoss(reducer=reducers.ThresholdReducer(low=0.1)), {}, "ThresholdReducer takes triplets"),
        (losses.ArcFaceLoss(**HEAD, margin=200), {}, "the margin is 200 degrees"),
        (losses.SubCenterArcFaceLoss(**HEAD), {}, "SubCenterArcFaceLoss: our code, by labels"),
        (losses.ProxyAnchorLoss(3, 5), {}, r"a label is not within \[0, 3\)"),
        (losses.ContrastiveLoss(), {}, "ContrastiveLoss: the code of .*: there is no other for this class"),
        (their_losses.NTXentLoss(), {}, r"it is theirs; accelerate\(\) turns it into ours"),
        (miners.BatchHardMiner(), {}, "BatchHardMiner: our code, by labels"),
        (miners.BatchEasyHardMiner(distance=distances.SNRDistance()), {}, "the distance is SNRDistance"),
        (miners.MultiSimilarityMiner(), {}, "the matrix of all pairs is small"),
        (losses.CrossBatchMemory(losses.SupConLoss(), 5), {}, "Memory of SupConLoss: our code, by labels"),
        (losses.CrossBatchMemory(losses.ContrastiveLoss(), 5), {}, "listed: ContrastiveLoss needs them"),
        (losses.CrossBatchMemory(losses.NTXentLoss(), 5, miner=miners.BatchHardMiner()), {}, "they are mined"),
        (distributed.DistributedLossWrapper(losses.NCALoss(), efficient=True), {}, "of NCALoss: our code, by labels"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, torch.nn.Module) else "",
)
def test_explain_says_which_way_a_call_takes(module, call, words):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(torch.nn.Module, "__call__", None)  # nothing is computed
        answer = explain(module, *CALL, **call)
    assert re.search(words, answer), answer


@pytest.mark.parametrize("name", [*PAIRS, *PROXIES, *OTHERS])
def test_explain_is_right(name):
    loss = getattr(losses, name)(**options_of(name))
    for labels in (CALL[1], CALL[1].int(), CALL[1].float()):
        with left_to_them(name) as seen:
            try:
                loss(CALL[0], labels)
            except (IndexError, RuntimeError):
                seen = [1]
        assert ("our code" in explain(loss, CALL[0], labels)) == (not seen)


def test_explain_says_that_labels_are_missing():
    assert explain(losses.NTXentLoss(), CALL[0]).endswith("learning: there are no labels")


def test_other_utilities_are_theirs():
    from pytorch_metric_learning.utils import accuracy_calculator as theirs

    assert accuracy_calculator is theirs
    with pytest.raises(ImportError):
        from fused_margins.compat.pytorch_metric_learning.utils import nothing  # noqa: F401
