"""Contrast each row's positive column with the log-sum-exp over the columns that its label admits.

Symbols: B rows x_i, N columns y_j, both of width D; u_ij their similarity (see `fused_margins.core.similarity`).

    positive_i     = u_{i, target_i}
    negative_lse_i = logsumexp over the admitted j of  scale_i u_ij + bias_j

Every margin softmax, InfoNCE and the magnet loss are a few lines over these two vectors: a margin belongs to the
positive entry alone, and softplus(negative_lse - z) keeps losses far below the rounding of logsumexp - z. The commonest
lines are epilogues, which the kernels of the same call do (`fused_margins.ops.contrast.epilogues` has the table):

    margin_softmax    loss_i = softplus(negative_lse_i - scale_i (psi(u_{i, target_i}) - margin_i))
    info_nce          loss_i = softplus(negative_lse_i - scale_i u_{i, target_i})

The first is the cross entropy of logits scale_i u_ij, with the own one's u_ij replaced by psi(u_ij) - margin_i. psi(u)
is u, or, of cosines, cos(theta + angle) with u = cos(theta) and a continuation beyond [0, pi]. A smoothing of e makes
it 1 - e of that and e of its mean over all classes in place of the own one, for cosines of one label a column:

    loss_i + e (z_{i, target_i} - mean_j z_ij),    sum_j u_ij = <x_i / |x_i|, sum_j y_j / |y_j|>

Angles that are tensors, multiples of angles, other smoothing and class weights are row code on what the op returns, in
`fused_margins.functional`.

Args
    x, y: (B, D) and (N, D), float64, float32, bfloat16 or float16, equal; any strides; one device.
    target: (B,) integers in [0, N), the positive column; `ignore_index` (-1) marks a row as ignored, and
    `fused_margins.core.indices.ABSENT` one whose class lives elsewhere: it has negatives and no positive here.
    row_labels: (B,) integers, None for the targets. column_labels: (N,) integers, None for 0 .. N-1; one that is
    `fused_margins.core.indices.UNADMITTED` is admitted by no relation: unfilled memory, padding.
    self_index: (B,) the column that is the row itself, never admitted; -1 for none.
    scale: a positive number, 0-d tensor or (B,) tensor. bias: (N,) or None.
    group_size: K, a divisor of N. Columns come in groups of K in turn; of those of a group that a row admits, the most
    similar one counts alone, the first of equal ones: the centers of a class.
    relation: "different" admits column_label_j != row_label_i, "same" equality, "any" all.
    epilogue: "none", "margin_softmax" or "info_nce".
    margin: of "margin_softmax": a number, 0-d tensor or (B,) tensor. angle_rad: a number within [-pi, pi], for cosines;
    beyond_pi: its continuation, "standard", "continuous" or "easy"; straight_through: psi'(u) is taken as 1. See
    `fused_margins.functional.margin_softmax_loss`.
    smoothing: of "margin_softmax", a number e in [0, 1]; every backend has it but "cuda".
    reduction: of an epilogue: "mean" over the rows that count (0 if there are none), "sum" or "none". All count that
    are not ignored, in "info_nce" those that have a negative.
    backend: "auto", or the name of one in `fused_margins.backends.registry`.

Returns positive (B,) and negative_lse (B,), or with an epilogue the loss, a scalar or (B,) for "none"; float32 (float64
for float64).

Edge rules
    An ignored row has positive 0 and negative_lse -inf, with zero gradient (its values must be finite all the same);
    so has, for negative_lse, a row that admits no column. An absent row has positive 0 without a gradient. With an
    epilogue ignored and absent rows have loss 0 and no gradient, and so have rows that admit no column. A zero vector
    has cosine 0 with everything and zero gradient. The gradient of a distance at 0 is 0.

Raises ValueError and TypeError for shapes, dtypes, devices and unknown names before any kernel runs; on a CPU,
IndexError for a target or self index out of range and ValueError for a scale that is not positive. On other devices
that row is NaN.

Gradients: x, y, scale, bias, margin, to second order; with q_ij = exp(scale_i u_ij + bias_j - negative_lse_i) where
admitted, and g_i, h_i the gradients of negative_lse_i, positive_i:

    dL/du_ij = g_i scale_i q_ij + h_i [j == target_i]     dL/dbias_j = sum_i g_i q_ij
    dL/dscale_i = g_i sum_j q_ij u_ij

In a loss, with p_i the probability that the row is not of its class, g_i = p_i, h_i = -scale_i p_i psi'(u), and
dL/dmargin_i = scale_i p_i.

Costs in multiplications of B x N x D: forward 1, with a gradient of x or scale 2; backward 1, and a second for those
softmax weights that did not fit the memory budget (`fused_margins.set_memory_budget`): 3 to 4 together. On a GPU
those of 16-bit inputs are not saved, since to write and to read them takes as long: 4, unless exponentials are kept, or
Triton has all columns in one tile, which saves cosines: a loss of targets alone, of at most 128 columns (64 of float64,
none of float16) and 8,192 rows.

Exponentials of bfloat16 cosines (`fused_margins.set_exponential_budget`; Triton): with a number of at most 70 as
scale, no bias, no smoothing and scale + ln N < 80 the forward writes E_ij = exp(scale u_ij) in bfloat16, unshifted, 0
where the row does not admit the column, and sums S_i of it in float32 before the rounding. Unit vectors a_i, b_j;
c_i = g_i scale / S_i; then

    dL/da_i = c_i (E b)_i        dL/db_j = (E^T (c a))_j        dL/dx_i = (dL/da_i - a_i <a_i, dL/da_i>) / |x_i|

two plain products, 3 together. An epilogue adds -S_i psi'(u) to the positive's entry; without one the positives'
derivatives are added apart. Errors: roundings of E, of c a and of b to 2^-9 each; where a gradient is nearly all along
its vector, which the last formula takes out, what is left is the rounding of that part.

Source: Liu et al., Negative Margin Matters: Understanding Margin in Few-shot Classification, 2020, the softmax loss
with a margin; Deng et al., ArcFace: Additive Angular Margin Loss for Deep Face Recognition, 2019, eq. 3; van den Oord
et al., Representation learning with contrastive predictive coding, 2018, eq. 4.

>>> import torch
>>> from fused_margins.ops.contrast import contrast
>>> x, weight = torch.eye(2), torch.eye(2)
>>> positive, negative_lse = contrast(x, weight, torch.tensor([0, 1]), scale=10.0)
>>> positive, negative_lse
(tensor([1., 1.]), tensor([0., 0.]))
>>> contrast(torch.eye(3), torch.eye(3), torch.arange(3), scale=4.0, margin=-0.5, epilogue="margin_softmax")
tensor(0.0049)
"""

from .op import contrast

__all__ = ["contrast"]
