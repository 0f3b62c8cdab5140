"""Margin softmax in one call each way: `contrast` over classes, margins on the own one, and the mean of the losses.

Symbols: B rows x_i, N columns y_j, both of width D; u_ij their similarity (see `fused_margins.ops.similarity`).

    loss_i = softplus(logsumexp_{j != target_i} scale_i u_ij - scale_i (psi(u_{i, target_i}) - margin_i))

which is the cross entropy of logits scale_i u_ij, with the own one's u_ij replaced by psi(u_ij) - margin_i. psi(u) = u,
or, of cosines, cos(theta + angle) with u = cos(theta) and a continuation beyond [0, pi]. Angles that are tensors,
multiples of angles, label smoothing and class weights are made of `contrast` in `fused_margins.functional`; this op is
the common case without their many small steps, which cost more than the kernels where the batch is small.

Args
    x, y: (B, D) and (N, D), float64, float32, bfloat16 or float16, equal; any strides; one device.
    target: (B,) integers in [0, N); `ignore_index` (-1) marks a row as ignored.
    scale: a positive number, 0-d tensor or (B,) tensor. margin: a number, 0-d tensor or (B,) tensor.
    angle_rad: a number within [-pi, pi], for cosines. beyond_pi: the continuation, "standard", "continuous" or "easy".
        straight_through: psi'(u) is taken as 1. See `fused_margins.functional.margin_softmax_loss`.
    reduction: "mean" over the rows that are not ignored (0 if there are none), "sum" or "none".
    backend: "auto", or the name of one in `fused_margins.ops.registry`.

Returns a scalar, or (B,) for "none"; float32 (float64 for float64).

Edge rules
    An ignored row has loss 0 and no gradient; so has a row without another class. The other rules are those of
    `fused_margins.ops.contrast`.

Raises ValueError and TypeError for shapes, dtypes, devices and unknown names before any kernel runs; on a CPU,
IndexError for a target out of range and ValueError for a scale that is not positive. On other devices that row is NaN.

Gradients: x, y, scale, margin, to second order; with q_i the softmax probability that the row is not of its class,

    dL/dnegative_lse_i = q_i     dL/du_{i, target_i} = -scale_i q_i psi'(u)     dL/dmargin_i = scale_i q_i

Source: Liu et al., Negative Margin Matters: Understanding Margin in Few-shot Classification, 2020, the softmax loss
with a margin; Deng et al., ArcFace: Additive Angular Margin Loss for Deep Face Recognition, 2019, eq. 3.

>>> import torch
>>> from fused_margins.ops.margin_softmax import margin_softmax
>>> margin_softmax(torch.eye(3), torch.eye(3), torch.arange(3), scale=4.0, margin=-0.5)
tensor(0.0049)
"""

from .op import margin_softmax

__all__ = ["margin_softmax"]
