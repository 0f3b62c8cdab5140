"""What ResNets drop in training: how much, in which shape, when, and by whose random numbers."""

import pytest
import torch
import torch.nn.functional as F

from fused_margins.fewshot.backbones import Drop, DropBlock, Network
from fused_margins.fewshot.config import Backbone
from fused_margins.fewshot.errors import UserError


def _ramped(rate, size, generator=None, shape=(8, 32, 10, 10)):
    """DropBlock's output of ones at its full rate."""
    drop = DropBlock(rate, size, ramp_steps=1)
    drop(torch.ones(1, 1, size, size))
    return drop(torch.ones(shape), generator)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_whole_squares_fall_and_the_rest_grows(size):
    output = _ramped(0.2, size, torch.Generator().manual_seed(0))
    fallen = (output == 0).float()
    assert float(fallen.mean()) == pytest.approx(0.2, abs=0.03)  # squares overlap, which makes it a little less
    # Each fallen feature lies in a square of fallen ones: opening the mask by that square changes nothing.
    squares = -F.max_pool2d(-fallen, size, stride=1)
    opened = F.max_pool2d(F.pad(squares, (size - 1,) * 4), size, stride=1)
    assert torch.equal(opened, fallen)
    assert float(output.mean()) == pytest.approx(1, abs=1e-5)
    assert len(output.unique()) == 2
    assert (fallen.mean(dim=(0, 1)) > 0).all()  # corners as well


def test_a_square_may_be_as_large_as_the_features():
    output = _ramped(0.25, 4, torch.Generator().manual_seed(0), (50, 40, 4, 4))
    fallen = (output == 0).flatten(2)
    assert torch.equal(fallen.all(dim=2), fallen.any(dim=2))
    assert float(fallen.float().mean()) == pytest.approx(0.25, abs=0.03)


def test_all_may_fall():
    assert torch.equal(_ramped(0.999999, 1, shape=(1, 1, 1, 1)).isfinite(), torch.ones(1, 1, 1, 1, dtype=torch.bool))


def test_the_rate_rises_with_the_steps_trained():
    drop = DropBlock(0.4, 1, ramp_steps=4)
    features = torch.ones(4, 64, 8, 8)
    fallen = []
    for _ in range(6):
        drop.eval()
        assert drop(features) is features  # judging does not count
        drop.train()
        fallen.append(float((drop(features) == 0).float().mean()))
    assert fallen == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.4], abs=0.02)
    restored = DropBlock(0.4, 1, ramp_steps=4)
    restored.load_state_dict(drop.state_dict())
    assert float((restored(features) == 0).float().mean()) == pytest.approx(0.4, abs=0.02)


def test_dropout_keeps_the_expectation():
    drop = Drop(0.3)
    features = torch.ones(20, 30, 4, 4)
    output = drop(features, torch.Generator().manual_seed(0))
    assert float((output == 0).float().mean()) == pytest.approx(0.3, abs=0.02)
    assert output.max() == pytest.approx(1 / 0.7)
    drop.eval()
    assert drop(features) is features


@pytest.mark.parametrize("drop", [Drop(0.0), DropBlock(0.0, 5, 10)])
def test_nothing_falls_at_rate_0(drop):
    features = torch.ones(2, 3, 4, 4)
    assert drop(features) is features


@pytest.mark.parametrize("name", ["resnet12", "resnet18"])
def test_the_given_generator_draws_and_no_other(name):
    settings = Backbone(name=name, channels=2, drop_rate=0.3, dropblock_size=2, dropblock_steps=1)
    network = Network(1, (32, 32), settings)
    network.requires_grad_(False)
    images = torch.rand(4, 1, 32, 32)
    network(images)
    host = torch.get_rng_state()
    first, same, other = (network(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), host)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    network.eval()
    assert torch.equal(network(images, torch.Generator().manual_seed(1)), network(images))


@pytest.mark.parametrize("name", ["resnet12", "resnet18"])
def test_dropout_in_the_first_two_stages_and_squares_in_the_last_two(name):
    network = Network(1, (84, 84), Backbone(name=name, channels=2, drop_rate=0.1, dropblock_size=3))
    kinds = [type(drop) for drop in network.features.drops]
    half = len(kinds) // 2
    assert kinds == [Drop] * half + [DropBlock] * half
    assert len(kinds) == {"resnet12": 4, "resnet18": 8}[name]


@pytest.mark.parametrize(
    ("name", "size", "largest"),
    [("resnet12", 32, 2), ("resnet12", 84, 5), ("resnet18", 32, 4), ("resnet18", 84, 3), ("resnet18", 224, 7)],
)
def test_squares_that_do_not_fit_are_named(name, size, largest):
    def network(dropblock_size, drop_rate=0.1):
        settings = Backbone(name=name, channels=2, drop_rate=drop_rate, dropblock_size=dropblock_size)
        return Network(3, (size, size), settings)

    with pytest.raises(UserError, match=f"dropblock_size: squares of 8 x 8 .* at most {largest} x {largest} do"):
        network(8)
    network(8, drop_rate=0)
    last = []
    fitting = network(largest)
    fitting.features.blocks[-1].register_forward_hook(lambda module, inputs, output: last.append(output.shape))
    fitting(torch.rand(2, 3, size, size))
    assert last[0][2:] == (largest, largest)
