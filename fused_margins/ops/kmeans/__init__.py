"""k-means of every class apart: k-means++ seeds, then Lloyd's iterations, given the random numbers.

Symbols: n samples x_i of width D in C classes; class c has slots_c clusters; K clusters in all, grouped by class.

    minimise over centroids c, for each class, sum over its samples of min_k |x_i - c_k|^2

The t-th seed of a class is the sample with the least waiting_ti / (its squared distance from the seeds before; 1 for
the first): a race of exponential waiting times, whose winner is drawn in proportion to the distance. Then centroids
move to the means of their samples, and samples to the nearest centroid of their class, the lowest of equals, until no
assignment changes or `num_iterations` are done. An empty cluster moves to the sample of its class that lies farthest
from its centroid.

Args
    x: (n, D), float64 or float32 (narrower dtypes are for the caller to widen), finite.
    members: (n,) int64, the samples by class, ascending within one. sizes, slots: (C,) int64, samples and clusters of a
    class, slots <= sizes. waiting: (most slots, n) float64, standard exponential.
    num_clusters: K, the sum of slots. num_iterations: at most so many updates. largest_class: the largest of sizes.
    backend: "auto", or the name of one in `fused_margins.backends.registry`.

Returns centroids (K, D), assignments (n,) int64 in [0, K), squared distances (n,) from the own centroid.

Edge rules
    A class with fewer distinct samples than clusters leaves some of them without a member.

Raises ValueError, TypeError and IndexError for shapes, dtypes and sizes that do not go together.

Gradients: none.

Source: Arthur and Vassilvitskii, k-means++: The advantages of careful seeding, 2007, section 2.2; Lloyd, Least squares
quantization in PCM, 1982.

>>> import torch
>>> from fused_margins.ops.kmeans import kmeans
>>> x, one = torch.tensor([[0.0], [0.2], [5.0]]), torch.ones(2, 3, dtype=torch.float64)
>>> sizes, slots = torch.tensor([3]), torch.tensor([2])
>>> kmeans(x, torch.arange(3), sizes, slots, one, num_clusters=2, largest_class=3)[0].flatten()
tensor([0.1000, 5.0000])
"""

from .op import kmeans

__all__ = ["kmeans"]
