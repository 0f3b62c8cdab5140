"""The similarity matrix itself, with margin and scale applied.

Symbols: B rows x_i, N columns y_j, both of width D; u_ij their similarity (see `fused_margins.core.similarity`).

    scores_ij = sign (scale_i (u_ij - margin_i [j == target_i]) + bias_j)

Args
    x, y: (B, D) and (N, D), float64, float32, bfloat16 or float16, equal; any strides; one device.
    scale: a positive number, 0-d tensor or (B,) tensor. margin: likewise, of any sign. bias: (N,) or None.
    target: (B,) integers in [0, N), None for no margin; `ignore_index` (-1) marks a row without one.
    sign: 1, or -1, which turns similarities into distances without a second matrix; it makes no zero negative.
    backend: "auto", or the name of one in `fused_margins.backends.registry`.

Returns (B, N) in the dtype of x; computed in float32 (float64 for float64) and rounded once.

Edge rules
    A zero vector has cosine 0 with everything and zero gradient.

Raises ValueError and TypeError for shapes, dtypes, devices and unknown names before any kernel runs; on a CPU,
IndexError for a target out of range and ValueError for a scale that is not positive. On other devices that row is NaN.

Gradients: x, y, scale, bias, margin, to second order.

>>> import torch
>>> from fused_margins.ops.scores import scores
>>> scores(torch.eye(2), torch.eye(2), scale=10.0, target=torch.tensor([0, 1]), margin=0.35)
tensor([[6.5000, 0.0000],
        [0.0000, 6.5000]])
"""

from .op import scores

__all__ = ["scores"]
