"""What people trip over with a loss that has parameters: the optimizer forgets it, and it stays on another device."""

import pytest
import torch
from torch import nn

from fused_margins import (
    AdaFaceLoss,
    ArcFaceLoss,
    ElasticFaceLoss,
    MagFaceLoss,
    MarginSoftmaxLoss,
    ProxyAnchorLoss,
    SphereFaceLoss,
    SupConLoss,
    parameter_groups,
)


def test_every_parameter_is_in_one_group_the_last_one_the_loss():
    model, loss = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), MarginSoftmaxLoss(3, 4, learnable_scale=True)
    groups = parameter_groups(model, loss, lr=0.1, head_lr=1.0)
    assert [group["lr"] for group in groups] == [0.1, 1.0]
    every = [id(p) for module in (model, loss) for p in module.parameters()]
    assert [id(p) for group in groups for p in group["params"]] == every
    before = loss.weight.detach().clone()
    optimizer = torch.optim.SGD(groups)
    loss(model(torch.randn(8, 4)), torch.arange(8) % 3).backward()
    optimizer.step()
    assert not torch.equal(loss.weight, before)
    assert parameter_groups(model, loss, lr=0.1)[1]["lr"] == 0.1
    assert len(parameter_groups(model, SupConLoss(), lr=0.1)) == 1


def test_a_module_twice_is_an_error():
    model, loss = nn.Linear(4, 4), ArcFaceLoss(3, 4)
    within = nn.ModuleDict({"network": model, "head": loss})
    message = r"^loss: expected parameters that the model has not, got 'weight', .*'head.weight'"
    with pytest.raises(ValueError, match=message):
        parameter_groups(within, loss, lr=0.1)
    with pytest.raises(ValueError, match=r"^loss: expected"):
        parameter_groups(model, model, lr=0.1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, ArcFaceLoss(3, 4), 0.1), TypeError, "model: expected a torch.nn.Module, got NoneType"),
        ((nn.Linear(2, 2), ArcFaceLoss, 0.1), TypeError, "loss: expected a torch.nn.Module, got type"),
        ((nn.Linear(2, 2), ArcFaceLoss(3, 4), -0.1), ValueError, "lr: expected a number of at least 0"),
        ((nn.Linear(2, 2), ArcFaceLoss(3, 4), "0.1"), TypeError, "lr: expected a number"),
    ],
)
def test_what_is_no_module_or_rate(arguments, error, message):
    model, loss, lr = arguments
    with pytest.raises(error, match=message):
        parameter_groups(model, loss, lr=lr)


HEADS = [MarginSoftmaxLoss, ArcFaceLoss, AdaFaceLoss, MagFaceLoss, ElasticFaceLoss, SphereFaceLoss, ProxyAnchorLoss]


@pytest.mark.parametrize("make", HEADS)
def test_a_loss_on_another_device_is_told_to_move(make):
    message = r"^embeddings: expected the device of the loss's weight \(meta\), got cpu; .*: loss.to\('cpu'\), before"
    with pytest.raises(ValueError, match=message):
        make(3, 4).to("meta")(torch.randn(2, 4), torch.tensor([0, 1]))
