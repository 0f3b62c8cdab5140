"""A program: an installed wheel has every public name, and its losses run on the kernels; of torch and numpy alone."""

import torch

import fused_margins
from fused_margins.backends import registry

for name in fused_margins.__all__:
    getattr(fused_margins, name)
x, labels = torch.randn(32, 16).requires_grad_(), torch.arange(32) % 4
losses = [
    fused_margins.MarginSoftmaxLoss(4, 16, backend="cpu"),
    fused_margins.EasyPositiveTripletLoss(backend="cpu"),
    fused_margins.EasyPositiveInfoNCELoss(backend="cpu"),
]
for loss in losses:
    (grad,) = torch.autograd.grad(loss(x, labels), x)
    assert grad.isfinite().all(), loss
    assert grad.any(), loss
assert all(registry.has_kernel(op, "reference") for op in registry.OPS)
print(f"{len(fused_margins.__all__)} public names, {len(losses)} losses on the kernels, {len(registry.OPS)} ops")
