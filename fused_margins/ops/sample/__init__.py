"""One column of each row drawn at random, so that distances are spread evenly over their range.

Symbols: B rows x_i, N columns y_j, both of width D; d_ij the distance between their directions.

    P(index_i = j) = w(d_ij) / sum over the admitted k of w(d_ik)          d_ij^2 = 2 - 2 cos(x_i, y_j)
    w(d) = 1 / q(max(d, 0.5)) where d < 1.4, and 0 from there on
    log q(d) = (D - 2) log d + (D - 3)/2 log(1 - d^2 / 4)

q is the density of the distance between two random points of the unit sphere in D dimensions. A row whose admitted
columns all lie beyond 1.4 draws one of them, each as likely as the other. A draw is a search for the largest of

    log w(d_ij) - log E_ij     E_ij = -log(1 - U_ij)     U_ij = (word_ij + 1/2) / 2^32, at most 1 - 2^-24

in which no weight is ever exponentiated, so that none underflows. word_ij is the first of those that Philox 2x32-10
makes of the counter (i, j) and the key `seed`: every backend draws the same column, whatever its tiles and threads, but
for numbers that are equal within rounding.

Args
    x, y: (B, D) and (N, D), float64, float32, bfloat16 or float16, equal; any strides; one device.
    row_labels: (B,) integers. column_labels: (N,) integers.
    seed: 0-d integer tensor; its lowest 32 bits count.
    relation: "different" admits column_label_j != row_label_i, "same" the equal ones, "any" all.
    self_index: (B,) the column that is the row itself, never admitted; -1 for none.
    backend: "auto", or the name of one in `fused_margins.backends.registry`.

Returns index (B,) int64, -1 where no column is admitted.

Edge rules
    Of equal numbers the lowest column is drawn. A cosine of NaN is never admitted. On a GPU a row whose self index is
    out of range draws -1.

Raises ValueError and TypeError for shapes, dtypes, devices and unknown names before any kernel runs; on a CPU,
IndexError for a self index out of range.

Gradients: none; gather the drawn columns and differentiate their similarity.

Sources: Wu et al., Sampling matters in deep embedding learning, 2017, distance weighted sampling. Maddison et al., A*
sampling, 2014: a draw as a search, section 2. Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011: Philox.

>>> import torch
>>> from fused_margins.ops.sample import sample
>>> x, labels = torch.eye(3), torch.tensor([0, 1, 0])
>>> sample(x, x, labels, labels, torch.tensor(5))
tensor([1, 2, 1])
"""

from .op import sample

__all__ = ["sample"]
