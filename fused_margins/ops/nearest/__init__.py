"""The k most similar columns that each row's label admits, or the k least similar ones.

Symbols: B rows x_i, N columns y_j, both of width D; u_ij their similarity (see `fused_margins.core.similarity`).

    index_i = arg top-k over the admitted j of  u_ij          similarity_i = u_{i, index_i}

It serves easy positives (relation "same") and hard ones (`largest=False`), hard and semi-hard negatives ("different",
with `below`), k-means assignment within a class, k nearest clusters and Recall@k.

Args
    x, y: (B, D) and (N, D), float64, float32, bfloat16 or float16, equal; any strides; one device.
    row_labels: (B,) integers. column_labels: (N,) integers; one that is `fused_margins.core.indices.UNADMITTED` is
    admitted by no relation.
    relation: "same" admits column_label_j == row_label_i, "different" the others, "any" all.
    k: how many, at least 1.
    self_index: (B,) the column that is the row itself, never admitted; -1 for none.
    below: (B,) or None; admits only u_ij < below_i.
    largest: False for the least similar columns, least similar first.
    backend: "auto", or the name of one in `fused_margins.backends.registry`.

Returns similarity (B, k), float32 (float64 for float64), most similar first, and index (B, k) int64. Where fewer than k
are admitted: index -1, similarity -inf.

Edge rules
    Ties go to the lowest column. A similarity of NaN is never chosen. Distances are compared and returned as sum (x -
    y)^2.

Raises ValueError and TypeError for shapes, dtypes, devices and unknown names before any kernel runs; on a CPU,
IndexError for a self index out of range.

Gradients: none; gather the chosen columns and differentiate their similarity.

>>> import torch
>>> from fused_margins.ops.nearest import nearest
>>> x, labels = torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([0, 0, 1])
>>> options = {"similarity": "negative_squared_euclidean", "self_index": torch.arange(3)}
>>> similarity, index = nearest(x, x, labels, labels, **options)
>>> index.flatten(), similarity.flatten()
(tensor([ 1,  0, -1]), tensor([-1., -1., -inf]))
"""

from .op import nearest

__all__ = ["nearest"]
