"""The magnet loss of a batch in one call each way: means of its clusters, distances from all of them, the loss.

Symbols: B rows x_i of width D in M clusters; mu_m the mean of the rows of cluster m; d_im = |x_i - mu_m|^2.

    loss_i = relu(alpha + d_{i,own} / 2 sigma^2 + log sum_{m: class(m) != class(i)} exp(-d_im / 2 sigma^2))
    sigma^2 = max(sum_i d_{i,own} / (B - 1), variance_floor)

Args
    x: (B, D), float64, float32, bfloat16 or float16; any strides.
    clusters: (B,) integers in [0, M); every cluster needs a member. cluster_labels: (M,) integers, the class of each.
    alpha: a number. variance_floor: a positive number.
    reduction: "mean", "sum" or "none".
    backend: "auto", or the name of one in `fused_margins.backends.registry`.

Returns a scalar, or (B,) for "none"; float32 (float64 for float64).

Edge rules
    A batch of one class, and an empty batch, have loss 0 and no gradient. At its floor sigma^2 has no gradient. Where
    sigma^2 is not finite, the loss of several classes and its gradients are NaN.

Raises ValueError and TypeError for shapes, dtypes, devices and unknown names before any kernel runs; on a CPU,
IndexError for a cluster out of range and ValueError for one without members.

Gradients: x, to second order; they flow through the means and sigma^2.

Source: Rippel et al., Metric Learning with Adaptive Density Discrimination, 2015, loss of a minibatch.

>>> import torch
>>> from fused_margins.ops.magnet import magnet
>>> x = torch.tensor([[0.0], [0.2], [1.0], [1.2]])
>>> magnet(x, torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1]), alpha=40.0)
tensor(5.0000)
"""

from .op import magnet

__all__ = ["magnet"]
