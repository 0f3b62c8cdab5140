"""Losses of two processes, whose references are the rows of both."""

import pytest
import torch
from pytorch_metric_learning import losses as their_losses
from pytorch_metric_learning.utils import distributed as their_distributed

from fused_margins.compat.pytorch_metric_learning import losses, miners
from fused_margins.compat.pytorch_metric_learning.utils import distributed
from tests.distributed import ranks

from .oracle import BATCH, left_to_them

NAMES = ("NTXentLoss", "SupConLoss", "MultiSimilarityLoss", "TripletMarginLoss", "MarginLoss", "ContrastiveLoss")


def both_agree(rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    for name in (
        "NTXentLoss",
        "SupConLoss",
        "MultiSimilarityLoss",
        "TripletMarginLoss",
        "MarginLoss",
        "ContrastiveLoss",
    ):
        for rows, references in ((6, False), (6, True), (1, False)):
            x = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
            labels = torch.randint(3, (rows,), generator=generator)
            call = (
                [torch.randn(rows, 5, generator=generator, dtype=torch.float64), labels.flip(0)] if references else []
            )
            for efficient in (True, False):
                of_both = []
                for module, wrappers in ((losses, distributed), (their_losses, their_distributed)):
                    leaf = x.clone().requires_grad_()
                    loss = wrappers.DistributedLossWrapper(getattr(module, name)(), efficient=efficient)
                    with left_to_them(name if name != "ContrastiveLoss" else "NTXentLoss") as seen:
                        value = loss(leaf, labels, None, *call)
                    if module is losses and name != "ContrastiveLoss" and rows > 1 and not references:
                        assert not seen, (name, seen)
                    value.backward()
                    of_both.append([value, leaf.grad])
                for a, b in zip(*of_both):
                    assert torch.allclose(a, b, rtol=1e-9, atol=1e-9), (name, rows, references, efficient, a, b)
    memory = [m.CrossBatchMemory(m.NTXentLoss(), 5, 32) for m in (losses, their_losses)]
    wrapped = [w.DistributedLossWrapper(m) for w, m in zip((distributed, their_distributed), memory)]
    torch.testing.assert_close(*[w(x.repeat(6, 1), torch.arange(6) % 3) for w in wrapped], rtol=1e-9, atol=0)


def test_two_processes_agree_with_theirs(tmp_path):
    ranks.run(both_agree, 2, tmp_path)


def test_a_memory_outside_a_process_group_is_called_as_it_is():
    """Theirs gives it one argument too many."""
    mask = torch.arange(12) < 6
    theirs = distributed._theirs.DistributedLossWrapper(their_losses.CrossBatchMemory(their_losses.NTXentLoss(), 5, 12))
    with pytest.warns(UserWarning, match="non-distributed"):  # noqa: SIM117
        with pytest.raises(TypeError, match="positional arguments"):
            theirs(*BATCH, enqueue_mask=mask)
    value = distributed.DistributedLossWrapper(losses.CrossBatchMemory(losses.NTXentLoss(), 5, 12))(
        *BATCH, enqueue_mask=mask
    )
    theirs = their_losses.CrossBatchMemory(their_losses.NTXentLoss(), 5, 12)
    torch.testing.assert_close(value, theirs(*BATCH, enqueue_mask=mask), rtol=1e-9, atol=0)


def test_a_miner_outside_a_process_group_mines():
    """Theirs asks for the size of a group that is not there."""
    with pytest.raises((RuntimeError, ValueError)):
        distributed._theirs.DistributedMinerWrapper(miners.BatchHardMiner())(*BATCH)
    found = distributed.DistributedMinerWrapper(miners.BatchHardMiner())(*BATCH)
    assert all(map(torch.equal, found, miners.BatchHardMiner()(*BATCH)))
    references = BATCH[0][:5].cos(), BATCH[1][:5]
    found = distributed.DistributedMinerWrapper(miners.BatchHardMiner())(*BATCH, *references)
    assert all(map(torch.equal, found, miners.BatchHardMiner()(*BATCH, *references)))
