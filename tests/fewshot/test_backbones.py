"""The networks compute what the papers' official code defines, in whatever order is fast; and what ResNets drop in
training: how much, in which shape, when, and by whose random numbers."""

import pytest
import torch
import torch.nn.functional as F

from fused_margins.fewshot.backbones import Block12, Block18, Conv4Block, Drop, DropBlock, Network, StridedBlock
from fused_margins.fewshot.config import Backbone
from fused_margins.fewshot.terminal import UserError

NAMES = ("convnet", "conv4", "resnet12", "resnet18")


def _parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("channels", "size", "blocks"), [(1, (8, 8), 3), (3, (84, 84), 4), (3, (32, 28), 4), (1, (9, 5), 2)]
)
def test_shapes_of_convnet(channels, size, blocks):
    network = Network(channels, size, Backbone(blocks=blocks, channels=6, embedding_size=5))
    embeddings = network(torch.rand(7, channels, *size))
    assert embeddings.shape == (7, 5)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(7))


@pytest.mark.parametrize(
    ("name", "channels", "size", "features", "parameters"),
    [
        ("convnet", 1, 8, 32, 19_968),
        # As many parameters as the official code, but for Conv4's 256 biases.
        ("conv4", 3, 84, 1600, 112_832),
        ("conv4", 3, 32, 256, 112_832),
        ("conv4", 1, 28, 64, 111_680),
        ("resnet12", 3, 84, 640, 12_424_320),
        ("resnet12", 3, 32, 640, 12_424_320),
        ("resnet18", 3, 224, 512, 11_176_512),
        ("resnet18", 3, 84, 512, 11_176_512),
        ("resnet18", 3, 32, 512, 11_168_832),
    ],
)
def test_official_sizes(name, channels, size, features, parameters):
    with torch.device("meta"):  # shapes alone
        network = Network(channels, (size, size), Backbone(name=name))
        assert network(torch.empty(2, channels, size, size)).shape == (2, features)
    assert network.embedding_size == features
    assert _parameters(network) == parameters


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("embedding_size", [None, 7])
def test_the_embedding_size_is_what_comes_out(name, embedding_size):
    network = Network(1, (16, 16), Backbone(name=name, channels=4, embedding_size=embedding_size))
    assert network(torch.rand(3, 1, 16, 16)).shape == (3, network.embedding_size)
    assert network.embedding_size == (
        embedding_size or {"convnet": 32, "conv4": 4, "resnet12": 40, "resnet18": 32}[name]
    )
    assert isinstance(network.head, torch.nn.Linear) == (embedding_size is not None or name == "convnet")


def test_normalisation_is_an_option():
    network = Network(1, (8, 8), Backbone(normalize=False))
    lengths = network(torch.rand(7, 1, 8, 8)).norm(dim=1)
    assert (lengths - 1).abs().min() > 1e-4


def test_pixels_are_standardised_if_asked_for():
    images = torch.rand(7, 2, 8, 8)
    plain, standardized = (Network(2, (8, 8), Backbone(standardize=s)) for s in (False, True))
    mean, std = torch.tensor([0.3, 0.6]), torch.tensor([0.2, 0.5])
    seen = []
    for network in (plain, standardized):
        network.set_pixel_statistics(mean, std)
        network.features.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        network(images)
    torch.testing.assert_close(seen[0], images, rtol=0, atol=0)
    torch.testing.assert_close(seen[1], (images - mean[:, None, None]) / std[:, None, None])
    assert torch.equal(Network(2, (8, 8), Backbone()).pixel_std.flatten(), torch.ones(2))


@pytest.mark.parametrize("blocks", [4, 9])
def test_too_many_blocks_name_the_most_that_fit(blocks):
    with pytest.raises(
        UserError, match=f"blocks: {blocks} blocks halve 8 x 8 images to less than a pixel, at most 3 fit"
    ):
        Network(1, (8, 8), Backbone(blocks=blocks))
    Network(1, (8, 8), Backbone(blocks=3))


@pytest.mark.parametrize("name", ["conv4", "resnet12"])
def test_too_small_images_are_named(name):
    with pytest.raises(UserError, match=f"backbone: {name} halves images four times, 15 x 40 are too small"):
        Network(1, (15, 40), Backbone(name=name))
    Network(1, (16, 40), Backbone(name=name, channels=2))


@pytest.mark.parametrize("name", NAMES)
def test_channels_last_throughout(name):
    network = Network(3, (16, 16), Backbone(name=name, channels=4))
    outputs = []
    for block in network.features.blocks:
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    network(torch.rand(2, 3, 16, 16))
    assert len(outputs) == len(network.features.blocks)
    assert all(output.is_contiguous(memory_format=torch.channels_last) for output in outputs)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_parameter(name):
    network = Network(1, (16, 16), Backbone(name=name, channels=4))
    network(torch.rand(8, 1, 16, 16))[:, 0].sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())


@pytest.mark.parametrize("name", ["conv4", "resnet12", "resnet18"])
def test_convolutions_start_normal_by_fan_out(name):
    network = Network(3, (32, 32), Backbone(name=name, channels=32))
    for conv in (m for m in network.modules() if isinstance(m, torch.nn.Conv2d)):
        weight, size = conv.weight.detach(), conv.kernel_size[0]
        assert float(weight.std()) == pytest.approx((2 / (size**2 * conv.out_channels)) ** 0.5, rel=0.25)
        assert weight.abs().max() > 2 * weight.std()  # a uniform one ends at 1.7


def _norm(images, norm):
    return F.batch_norm(images, None, None, norm.weight, norm.bias, training=True)


def _perturbed(block):
    """Scales and shifts of either sign, so that the order of layers matters where it does."""
    for module in block.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.weight)
            torch.nn.init.normal_(module.bias)
    return block.double()


def _assert_same_function(block, official, size=9):
    """Outputs and gradients of all parameters, of a block in training."""
    _perturbed(block)
    images = torch.randn(5, 2, size, size, dtype=torch.float64)
    results = []
    for function in (block, official):
        block.zero_grad()
        output = function(images)
        (output * torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output)).sum().backward()
        results.append([output.detach(), *(parameter.grad.clone() for parameter in block.parameters())])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs)


def test_a_convnet_block_is_strided_conv_norm_relu():
    block = StridedBlock(2, 3)

    def definition(images):
        return F.relu(_norm(F.conv2d(images, block.strided.weight, padding=1)[:, :, ::2, ::2], block.norm))

    _assert_same_function(block, definition)
    assert block.strided.bias is None


def test_a_conv4_block_is_conv_with_bias_norm_relu_pool():
    block = Conv4Block(2, 3)
    bias = torch.randn(3, dtype=torch.float64)

    def official(images):
        return F.max_pool2d(F.relu(_norm(F.conv2d(images, block.conv.weight, bias, padding=1), block.norm)), 2)

    _assert_same_function(block, official)


def test_a_resnet12_block_is_the_official_one():
    block = Block12(2, 3)

    def official(images):
        features = F.leaky_relu(_norm(F.conv2d(images, block.conv1.weight, padding=1), block.norm1), 0.1)
        features = F.leaky_relu(_norm(F.conv2d(features, block.conv2.weight, padding=1), block.norm2), 0.1)
        features = _norm(F.conv2d(features, block.conv3.weight, padding=1), block.norm3)
        shortcut_conv, shortcut_norm = block.shortcut
        features = features + _norm(F.conv2d(images, shortcut_conv.weight), shortcut_norm)
        return F.max_pool2d(F.leaky_relu(features, 0.1), 2)

    _assert_same_function(block, official)


@pytest.mark.parametrize(("channels", "stride"), [(2, 1), (3, 2)])
def test_a_resnet18_block_is_the_official_one(channels, stride):
    block = Block18(2, channels, stride)

    def official(images):
        features = F.conv2d(images, block.conv1.weight, stride=stride, padding=1)
        features = F.relu(_norm(features, block.norm1))
        features = _norm(F.conv2d(features, block.conv2.weight, padding=1), block.norm2)
        if channels == 2:
            return F.relu(features + images)
        shortcut_conv, shortcut_norm = block.shortcut
        return F.relu(features + _norm(F.conv2d(images, shortcut_conv.weight, stride=stride), shortcut_norm))

    _assert_same_function(block, official)
    assert isinstance(block.shortcut, torch.nn.Identity) == (channels == 2)


def test_resnet18_has_a_stem_of_its_own_for_small_images():
    with torch.device("meta"):
        stems = [Network(3, (size, size), Backbone(name="resnet18")).features.stem for size in (63, 64)]
        assert stems[0](torch.empty(1, 3, 32, 32)).shape == (1, 64, 32, 32)
        assert stems[1](torch.empty(1, 3, 84, 84)).shape == (1, 64, 21, 21)


@pytest.mark.parametrize("name", ["resnet12", "resnet18"])
def test_the_features_of_a_resnet_are_means_over_all_places(name):
    network = Network(1, (32, 32), Backbone(name=name, channels=2, normalize=False))
    last = []
    network.features.drops[-1].register_forward_hook(lambda module, inputs, output: last.append(output))
    embeddings = network(torch.rand(3, 1, 32, 32))
    assert last[0].shape[2:] == {"resnet12": (2, 2), "resnet18": (4, 4)}[name]
    torch.testing.assert_close(embeddings, last[0].flatten(2).mean(dim=2))


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
