"""Inputs of 16 bits: sums in float32 are worth it against what PyTorch does in 16 bits."""

import pytest
import torch
from torch.nn import functional as F

from fused_margins.functional import margin_softmax_loss
from fused_margins.ops import registry

SCALE, MARGIN = 16.0, -0.1


def eager(embeddings, weight, labels):
    z = F.linear(SCALE * F.normalize(embeddings), F.normalize(weight))
    z = z.scatter_add(1, labels[:, None], z.new_full((1, 1), -SCALE * MARGIN).expand(len(labels), 1))
    return F.cross_entropy(z, labels)


def gradients(loss, *leaves):
    leaves = [t.detach().requires_grad_() for t in leaves]
    return [g.double() for g in torch.autograd.grad(loss(*leaves), leaves)]


@pytest.mark.parametrize("backend", [b.name for b in registry.BACKENDS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("noise", [30.0, 1.0], ids=["untrained", "trained"])
def test_gradients_have_at_most_half_the_error_of_eager_pytorch(noise, dtype, backend, device_for):
    device = device_for("margin_softmax", backend)
    g = torch.Generator().manual_seed(0)
    weight, labels = torch.randn(60, 96, generator=g), torch.randint(60, (64,), generator=g)
    embeddings = weight[labels] + noise * torch.randn(64, 96, generator=g)
    embeddings, weight, labels = embeddings.to(device, dtype), weight.to(device, dtype), labels.to(device)

    def loss(x, y, backend):
        return margin_softmax_loss(x, y, labels, scale=SCALE, margin=MARGIN, backend=backend)

    truth = gradients(lambda x, y: loss(x, y, "reference"), embeddings.double(), weight.double())
    ours = gradients(lambda x, y: loss(x, y, backend), embeddings, weight)
    theirs = gradients(lambda x, y: eager(x, y, labels), embeddings, weight)
    for right, our, their in zip(truth, ours, theirs):
        assert (our - right).norm() <= (their - right).norm() / 2
