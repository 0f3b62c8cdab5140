"""Shapes, memory format, and the order of layers that the speed depends on."""

import pytest
import torch
from torch import nn

from fused_margins.fewshot.backbones import ConvBlock, ConvNet
from fused_margins.fewshot.config import Backbone
from fused_margins.fewshot.errors import UserError


@pytest.mark.parametrize(
    ("channels", "size", "blocks"), [(1, (8, 8), 3), (3, (84, 84), 4), (3, (32, 28), 4), (1, (9, 5), 2)]
)
def test_shapes(channels, size, blocks):
    network = ConvNet(channels, size, Backbone(blocks=blocks, channels=6, embedding_size=5))
    embeddings = network(torch.rand(7, channels, *size))
    assert embeddings.shape == (7, 5)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(7))


def test_normalisation_is_an_option():
    network = ConvNet(1, (8, 8), Backbone(normalize=False))
    lengths = network(torch.rand(7, 1, 8, 8)).norm(dim=1)
    assert (lengths - 1).abs().min() > 1e-4


def test_too_many_blocks_name_the_most_that_fit():
    with pytest.raises(UserError, match="blocks: 4 blocks halve 8 x 8 images to nothing, at most 3 fit"):
        ConvNet(1, (8, 8), Backbone(blocks=4))
    ConvNet(1, (8, 8), Backbone(blocks=3))


def test_channels_last_throughout():
    network = ConvNet(3, (8, 8), Backbone(blocks=2, channels=4))
    outputs = []
    for block in network.blocks:
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    network(torch.rand(2, 3, 8, 8))
    assert network.blocks[0].conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(output.is_contiguous(memory_format=torch.channels_last) for output in outputs)


def test_a_block_is_conv_pool_norm_relu():
    block = ConvBlock(2, 3)
    images = torch.randn(5, 2, 8, 8)
    expected = nn.functional.relu(
        nn.functional.batch_norm(
            nn.functional.max_pool2d(nn.functional.conv2d(images, block.conv.weight, padding=1), 2),
            None,
            None,
            training=True,
        )
    )
    torch.testing.assert_close(block(images), expected)
    assert block.conv.bias is None


def test_gradients_reach_every_parameter():
    network = ConvNet(1, (8, 8), Backbone())
    network(torch.rand(8, 1, 8, 8))[:, 0].sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())
