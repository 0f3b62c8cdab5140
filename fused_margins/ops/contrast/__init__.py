"""Contrast each row's positive column with the log-sum-exp over the columns that its label admits.

Symbols: B rows x_i, N columns y_j, both of width D; u_ij their similarity (see `fused_margins.core.similarity`).

    positive_i     = u_{i, target_i}
    negative_lse_i = logsumexp over the admitted j of  scale_i u_ij + bias_j

Every margin softmax, InfoNCE and the magnet loss are a few lines over these two vectors: the margin belongs to the
positive entry alone, which is why no margin appears here, and softplus(negative_lse - z) keeps losses far below the
rounding of logsumexp - z.

Args
    x, y: (B, D) and (N, D), float64, float32, bfloat16 or float16, equal; any strides; one device.
    target: (B,) integers in [0, N), the positive column; `ignore_index` (-1) marks a row as ignored.
    row_labels: (B,) integers, None for the targets. column_labels: (N,) integers, None for 0 .. N-1.
    scale: a positive number, 0-d tensor or (B,) tensor. bias: (N,) or None.
    relation: "different" admits column_label_j != row_label_i, "same" equality, "any" all.
    self_index: (B,) the column that is the row itself, never admitted; -1 for none.
    backend: "auto", or the name of one in `fused_margins.backends.registry`.

Returns positive (B,) and negative_lse (B,), float32 (float64 for float64).

Edge rules
    An ignored row has positive 0 and negative_lse -inf, with zero gradient (its values must be finite all the same);
    so has, for negative_lse, a row that admits no column. A zero vector has cosine 0 with everything and zero gradient.
    The gradient of a distance at 0 is 0.

Raises ValueError and TypeError for shapes, dtypes, devices and unknown names before any kernel runs; on a CPU,
IndexError for a target or self index out of range and ValueError for a scale that is not positive. On other devices
that row is NaN.

Gradients: x, y, scale, bias, to second order; with q_ij = exp(scale_i u_ij + bias_j - negative_lse_i) where admitted,
and g_i, h_i the gradients of negative_lse_i, positive_i:

    dL/du_ij = g_i scale_i q_ij + h_i [j == target_i]     dL/dbias_j = sum_i g_i q_ij
    dL/dscale_i = g_i sum_j q_ij u_ij

Costs in multiplications of B x N x D: forward 1, with a gradient of x or scale 2; backward 1, and a second for those
softmax weights that did not fit the memory budget (`fused_margins.set_memory_budget`): 3 to 4 together.

>>> import torch
>>> from fused_margins.ops.contrast import contrast
>>> x, weight = torch.eye(2), torch.eye(2)
>>> positive, negative_lse = contrast(x, weight, torch.tensor([0, 1]), scale=10.0)
>>> positive, negative_lse
(tensor([1., 1.]), tensor([0., 0.]))
"""

from .op import contrast

__all__ = ["contrast"]
