"""A memory across batches is theirs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning import distances
from pytorch_metric_learning import losses as their_losses
from pytorch_metric_learning import miners as their_miners
from pytorch_metric_learning.utils.loss_and_miner_utils import get_all_pairs_indices

from fused_margins.compat.pytorch_metric_learning import losses

from .oracle import BATCH, OTHERS, PAIRS, THEIRS, assert_equal, left_to_them, seeds


@settings(max_examples=25)
@given(
    name=st.sampled_from([*PAIRS, *OTHERS, "ContrastiveLoss"]),
    seed=seeds,
    memory=st.integers(6, 20),
    masked=st.booleans(),
)
def test_a_memory_across_batches_is_theirs(name, seed, memory, masked):
    generator = torch.Generator().manual_seed(seed)
    ours, theirs = (m.CrossBatchMemory(getattr(m, name)(), 5, memory) for m in (losses, their_losses))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for rows in (4, 5, 1, 6, 6, 3):
        embeddings = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
        labels = torch.randint(3, (rows,), generator=generator)
        mask = torch.arange(rows) % 2 == 0 if masked and rows > 2 else None
        left = rows - (0 if mask is None else int(mask.sum()))
        of_both = []
        for loss, module in ((ours, losses), (theirs, their_losses)):
            leaf = embeddings.clone().requires_grad_()
            with left_to_them(name if name in THEIRS else "NTXentLoss") as seen:
                value = loss(leaf, labels, enqueue_mask=mask)
            if module is losses and name in THEIRS and left > 1:
                assert seen == []
            (gradient,) = torch.autograd.grad(value, leaf)
            of_both.append([value, gradient])
        assert_equal(*of_both, 1e-9, 1e-9)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert_equal(list(ours.state_dict().values()), list(theirs.state_dict().values()), 0, 0)


def test_a_memory_with_mined_pairs_is_theirs():
    options = {"miner": their_miners.MultiSimilarityMiner()}
    of_both = [m.CrossBatchMemory(m.NTXentLoss(), 5, 12, **options)(*BATCH) for m in (losses, their_losses)]
    torch.testing.assert_close(*of_both, rtol=1e-9, atol=0)
    pairs = get_all_pairs_indices(BATCH[1])
    of_both = [m.CrossBatchMemory(m.NTXentLoss(), 5, 12)(*BATCH, pairs) for m in (losses, their_losses)]
    torch.testing.assert_close(*of_both, rtol=1e-9, atol=0)
    # A loss that leaves the call to them gets the pairs.
    of_both = [
        m.CrossBatchMemory(m.NTXentLoss(distance=distances.LpDistance()), 5, 12)(*BATCH) for m in (losses, their_losses)
    ]
    torch.testing.assert_close(*of_both, rtol=1e-9, atol=0)


def test_the_position_in_the_queue_is_kept_where_asked_for():
    """Theirs forgets it, and takes a full memory for an empty one."""
    saved = losses.CrossBatchMemory(losses.NTXentLoss(), 5, 20, keep_position=True)
    theirs = their_losses.CrossBatchMemory(their_losses.NTXentLoss(), 5, 20)
    for batch in (1, 2):
        for memory in (saved, theirs):
            memory(BATCH[0] + batch, BATCH[1])
    state = saved.state_dict()
    assert set(state) == {*theirs.state_dict(), "queue_idx", "has_been_filled"}
    resumed = losses.CrossBatchMemory(losses.NTXentLoss(), 5, 20, keep_position=True)
    resumed.load_state_dict(state, strict=True)
    assert (resumed.queue_idx, resumed.has_been_filled) == (4, True)
    want = theirs(*BATCH)
    torch.testing.assert_close(resumed(*BATCH), want, rtol=1e-9, atol=0)
    forgetful = their_losses.CrossBatchMemory(their_losses.NTXentLoss(), 5, 20)
    forgetful.load_state_dict(theirs.state_dict(), strict=True)
    assert not torch.isclose(forgetful(*BATCH), want)
    # Without it the keys are theirs, and one that is missing or unexpected is reported.
    for keep in (False, True):
        other = losses.CrossBatchMemory(losses.NTXentLoss(), 5, 20, keep_position=keep)
        with pytest.raises(RuntimeError, match=r"Missing key.*queue_idx" if keep else r"Unexpected key.*queue_idx"):
            other.load_state_dict(theirs.state_dict() if keep else state, strict=True)
