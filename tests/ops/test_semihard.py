"""Semi-hard negatives are less similar than the positive."""

import pytest
import torch
from fused_margins.ops.similarity import SIMILARITIES

from fused_margins.functional import mine_negatives


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_a_copy_of_the_positive_is_no_semihard_negative(similarity, dtype, backend, device_for):
    """Whatever computes the two similarities, and in whatever order."""
    device, count = device_for("nearest", backend), 12
    g = torch.Generator().manual_seed(0)
    anchors = torch.randn(count, 67, generator=g)
    positives = anchors + 0.3 * torch.randn(count, 67, generator=g)
    others = torch.randn(count, 67, generator=g)
    x = torch.cat([anchors, positives, positives, others]).to(device, dtype)
    labels = torch.arange(count).repeat(4) + 100 * torch.tensor([0, 0, 1, 2]).repeat_interleave(count)
    _, index = mine_negatives(x, labels.to(device), strategy="semihard", similarity=similarity, backend=backend)
    assert (index[:count] >= 0).all()
    assert not (index[:count].cpu() == 2 * count + torch.arange(count)).any()
