"""The losses and miners as functions. Each is a few lines over what one of the ops returns."""

from typing import Any

import torch
from torch import Tensor

from .farthest import farthest
from .margins import MARGIN_TYPES, check_options, margin_function, row_margin, row_scale
from .ops import checks
from .ops.contrast import contrast
from .ops.labels import check_index
from .ops.magnet.op import apply as magnet
from .ops.margin_softmax.op import apply as margin_softmax
from .ops.nearest import nearest
from .ops.nearest.op import search
from .ops.scores import scores
from .ops.similarity import less_by_rounding, pair_similarity, similarity_sum, take_rows
from .reductions import REDUCTIONS, reduce_loss, softplus

__all__ = [
    "cluster_distances",
    "magnet_loss",
    "margin_logits",
    "margin_softmax_loss",
    "mine_negatives",
    "mine_positives",
]

POSITIVE_STRATEGIES = ("easy", "hard")
STRATEGIES = ("hard", "semihard")


@checks.target_is_called("labels")
def margin_softmax_loss(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    scale: float | Tensor = 30.0,
    margin: float | Tensor = 0.0,
    similarity: str = "cosine",
    margin_type: str = "additive",
    angular_margin_rad: float | Tensor = 0.0,
    angular_multiplier: float = 1.0,
    beyond_pi: str = "standard",
    margin_gradient: str = "exact",
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Softmax cross entropy over class similarities, with a margin of any sign on the own class.

        z_j = scale u_ij  (j != y_i),   z_{y_i} = scale psi(u_{i,y_i}),   loss_i = -log softmax(z)_{y_i}

    computed as softplus(logsumexp_{j != y_i} z_j - z_{y_i}), which keeps losses and gradients far below rounding.

    Args:
        embeddings: (B, D), float64, float32, bfloat16 or float16.
        weight: (C, D), one row a class, same dtype.
        labels: (B,) integers in [0, C), or `ignore_index`.
        scale: s > 0: a number, 0-d tensor (may learn) or (B, 1).
        margin: m: a number, 0-d tensor, (C,) one a class or (B, 1) one a sample; of any sign; differentiable as a
            tensor. In units of similarity for "additive" and "combined", in radians for "angular".
        similarity: "cosine", "dot" or "negative_squared_euclidean"; angular margins need "cosine".
        margin_type: psi(u) = u - m ("additive"), cos(theta + m) ("angular") or cos(m1 theta + m2) - m ("combined").
        angular_margin_rad, angular_multiplier: m2 (as `margin`, in radians) and m1 > 0 of "combined" alone. Angular
            margins lie within [-pi, pi]; the values of tensors are not checked.
        beyond_pi: where theta + m2 > pi: u - m2 sin m2 ("standard"), -2 - cos(theta + m2) ("continuous"), or psi(u) = u
            wherever u <= 0 ("easy"). With m1 != 1 always the continuous one. For a negative m2,
            u + 1 - cos(m2 / m1) where theta < |m2| / m1.
        margin_gradient: "exact", or "straight_through": d psi / d u taken as 1 for the angular types.
        label_smoothing: epsilon in [0, 1]; as torch.nn.functional.cross_entropy defines it.
        class_weight: (C,), weight of each class; "mean" then divides by the sum of the weights of the labels.
        ignore_index: label of rows that count for nothing.
        reduction: "mean" (over rows that are not ignored; 0 if there are none), "sum" or "none".
        backend: "auto", or the name of one; see `fused_margins.explain`.

    Returns:
        A scalar, or (B,) for "none"; float32, float64 for float64 inputs.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, unknown names, a scale that is not positive.
        IndexError: a label out of range (on a GPU the row is NaN; see `fused_margins.checked`).

    Gradients: embeddings, weight, scale, margin, angular_margin_rad, class_weight; twice differentiable.

    Source: Liu et al., Negative Margin Matters: Understanding Margin in Few-shot Classification, 2020, softmax
        loss with a margin.

    >>> import torch
    >>> from fused_margins.functional import margin_softmax_loss
    >>> embeddings, weight, labels = torch.eye(3), torch.eye(3), torch.arange(3)
    >>> margin_softmax_loss(embeddings, weight, labels, scale=4.0, margin=-0.5)
    tensor(0.0049)
    """
    checks.choice("reduction", reduction, REDUCTIONS)
    checks.choice("margin_type", margin_type, MARGIN_TYPES)
    checks.whole("ignore_index", ignore_index)
    checks.number("label_smoothing", label_smoothing)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing}")
    embeddings, weight = checks.matrices(embeddings, weight, ("embeddings", "weight"))
    checks.labels("labels", labels, embeddings.shape[0], embeddings)
    labels = labels.long()  # ignore_index need not fit a narrower dtype
    class_weight = checks.vector("class_weight", class_weight, weight.shape[0], weight)
    scale = row_scale(scale, embeddings)
    options = (similarity, margin_type, angular_margin_rad, angular_multiplier, beyond_pi, margin_gradient)
    check_options(margin, *options)
    angle = margin if margin_type == "angular" else angular_margin_rad
    if not isinstance(angle, Tensor) and angular_multiplier == 1 and label_smoothing == 0 and class_weight is None:
        of_row = row_margin("margin", 0.0 if margin_type == "angular" else margin, labels, weight)
        of_row = checks.row_factor("margin", of_row, embeddings, positive=False)
        of_angle = (float(angle), beyond_pi, margin_gradient == "straight_through")
        return margin_softmax(
            embeddings, weight, labels, scale, of_row, of_angle, similarity, ignore_index, reduction, backend
        )

    psi = margin_function(margin, labels, weight, *options)
    u, negative_lse = contrast(
        embeddings,
        weight,
        labels,
        scale=scale,
        similarity=similarity,
        ignore_index=ignore_index,
        backend=backend,
    )
    z = scale * psi(u)
    loss = softplus(negative_lse - z)
    counted = (labels != ignore_index).to(loss.dtype)
    row_weight = counted
    if class_weight is not None:
        row_weight = counted * take_rows(class_weight, labels)
        loss = loss * row_weight
    if label_smoothing > 0:
        # sum_j w_j (lse - z_j): all classes' logits at once, from one vector, the weighted sum of the class directions.
        each = class_weight if class_weight is not None else loss.new_ones(weight.shape[0])
        own = row_weight if class_weight is not None else 1.0
        lse = torch.logaddexp(negative_lse, z)
        with torch.autocast(embeddings.device.type, enabled=False):
            everyone = scale * similarity_sum(embeddings, weight, each, similarity) + own * (z - scale * u)
        spread = torch.where(counted > 0, lse * each.sum() - everyone, 0.0)
        loss = (1 - label_smoothing) * loss + label_smoothing / max(weight.shape[0], 1) * spread
    return reduce_loss(loss, row_weight, reduction)


@checks.target_is_called("labels")
def margin_logits(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor | None = None,
    *,
    scale: float | Tensor = 30.0,
    margin: float | Tensor = 0.0,
    similarity: str = "cosine",
    margin_type: str = "additive",
    angular_margin_rad: float | Tensor = 0.0,
    angular_multiplier: float = 1.0,
    beyond_pi: str = "standard",
    margin_gradient: str = "exact",
    ignore_index: int = -100,
    backend: str = "auto",
) -> Tensor:
    """The logits whose cross entropy is `margin_softmax_loss`; without labels, plain scaled similarities.

        z_ij = scale u_ij  (j != y_i),   z_{i,y_i} = scale psi(u_{i,y_i})

    Predict from the logits without labels: accuracy on margin-shifted ones is meaningless.

    Args:
        embeddings: (B, D), float64, float32, bfloat16 or float16. weight: (C, D), same dtype.
        labels: (B,) integers in [0, C), `ignore_index` for rows without a margin, or None.
        scale, margin, and all others: as for `margin_softmax_loss`.

    Returns:
        (B, C) in the dtype of the embeddings.

    Raises:
        As `margin_softmax_loss`.

    Gradients: embeddings, weight, scale, margin, angular_margin_rad; twice differentiable.

    Source: Liu et al., Negative Margin Matters, 2020, the logits of its softmax loss with a margin.

    >>> import torch
    >>> from fused_margins.functional import margin_logits
    >>> margin_logits(torch.eye(2), torch.eye(2), torch.tensor([0, 1]), scale=10.0, margin=0.5)
    tensor([[5., 0.],
            [0., 5.]])
    """
    checks.choice("margin_type", margin_type, MARGIN_TYPES)
    checks.whole("ignore_index", ignore_index)
    embeddings, weight = checks.matrices(embeddings, weight, ("embeddings", "weight"))
    scale = row_scale(scale, embeddings)
    options: dict[str, Any] = {"similarity": similarity, "scale": scale, "backend": backend}
    plain = labels is None
    if labels is None:
        labels = torch.full((embeddings.shape[0],), ignore_index, device=embeddings.device)
    checks.labels("labels", labels, embeddings.shape[0], embeddings)
    labels = labels.long()  # ignore_index need not fit a narrower dtype
    psi = margin_function(
        margin,
        labels,
        weight,
        similarity,
        margin_type,
        angular_margin_rad,
        angular_multiplier,
        beyond_pi,
        margin_gradient,
    )
    if plain:
        return scores(embeddings, weight, **options)
    # What psi takes away from the own class: constant for additive margins, else a function of its similarity.
    if margin_type == "additive":
        taken: float | Tensor = row_margin("margin", margin, labels, weight)
    else:
        own = take_rows(weight, check_index(labels, weight.shape[0], ignore_index, "labels"))
        u = pair_similarity(embeddings, own, similarity)
        taken = u - psi(u)
    return scores(embeddings, weight, target=labels, margin=taken, ignore_index=ignore_index, **options)


def mine_positives(
    embeddings: Tensor,
    labels: Tensor,
    *,
    strategy: str = "easy",
    similarity: str = "cosine",
    reference_embeddings: Tensor | None = None,
    reference_labels: Tensor | None = None,
    self_index: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Each anchor's easy positive, the most similar other sample of its class, or its hard one, the least similar.

        index_i = argmax (easy) or argmin (hard) over j != i with label_j = label_i of  u_ij

    The hard one needs no B x N matrix either, but for squared distances a copy of both sides, one entry wider; among
    similarities that agree to a few roundings it may be either.

    Args:
        embeddings: (B, D) anchors. labels: (B,) integers.
        strategy: "easy" or "hard".
        similarity: "cosine", "dot" or "negative_squared_euclidean".
        reference_embeddings, reference_labels: (N, D) and (N,): search these instead of the batch, a memory bank or a
            gathered batch.
        self_index: (B,) the reference that *is* the anchor and is never its positive, -1 for none. Within the batch it
            is 0 .. B-1; with references it is none unless given.
        backend: "auto", or the name of one.

    Returns:
        similarity (B,), float32 (float64 for float64), and index (B,) int64; -inf and -1 for an anchor alone in its
        class.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, unknown names. IndexError: a self index out of range.

    Gradients: none; gather the positives by their index and differentiate their similarity.

    Source: Levi et al., Rethinking preventing class-collapsing in metric learning with margin-based losses,
        2020, easy positive sampling; Hermans et al., In defense of the triplet loss for person re-identification,
        2017, the hardest positive of "batch hard".

    >>> import torch
    >>> from fused_margins.functional import mine_positives
    >>> embeddings = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [0.0, 2.0]])
    >>> mine_positives(embeddings, torch.tensor([0, 0, 0, 1]))
    (tensor([0.8000, 0.8000, 0.6000,   -inf]), tensor([ 1,  0,  1, -1]))
    >>> mine_positives(embeddings, torch.tensor([0, 0, 0, 1]), strategy="hard")[1]
    tensor([ 2,  2,  0, -1])
    """
    checks.choice("strategy", strategy, POSITIVE_STRATEGIES)
    checks.similarity(similarity)
    x, y, row_labels, column_labels, self_column = search_sides(
        embeddings, labels, reference_embeddings, reference_labels, self_index
    )
    if strategy == "hard":
        return farthest(x, y, row_labels, column_labels, self_column, similarity, backend)
    x, y = checks.in_one_dtype(x, y)
    value, index = search(x, y, row_labels, column_labels, self_column, None, similarity, "same", 1, backend)
    return value.squeeze(1), index.squeeze(1)


def mine_negatives(
    embeddings: Tensor,
    labels: Tensor,
    *,
    strategy: str = "hard",
    positive_similarity: Tensor | None = None,
    similarity: str = "cosine",
    reference_embeddings: Tensor | None = None,
    reference_labels: Tensor | None = None,
    self_index: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Each anchor's hardest negative, or the hardest that is less similar than its positive.

        index_i = argmax over j with label_j != label_i (and, semi-hard, u_ij < u_positive(i)) of  u_ij

    Less similar by more than rounding, (D + 8) eps of the lengths of anchor and positive (of a dot product's bound, if
    given): a copy of the positive with another label is none of them.

    Args:
        embeddings: (B, D) anchors. labels: (B,) integers.
        strategy: "hard" or "semihard".
        positive_similarity: (B,) the bound of "semihard"; None mines the easy positives for it.
        similarity, reference_embeddings, reference_labels, self_index, backend: as for `mine_positives`.

    Returns:
        similarity (B,), float32 (float64 for float64), and index (B,) int64; -inf and -1 where no negative is admitted.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, unknown names. IndexError: a self index out of range.

    Gradients: none; gather the negatives by their index and differentiate their similarity.

    Source: Schroff et al., FaceNet: A unified embedding for face recognition and clustering, 2015, semi-hard
        negatives of section 3.2.

    >>> import torch
    >>> from fused_margins.functional import mine_negatives
    >>> embeddings = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.9, 0.1], [0.0, 1.0]])
    >>> mine_negatives(embeddings, torch.tensor([0, 0, 1, 1]), strategy="semihard")[1]
    tensor([ 3,  3, -1,  0])
    """
    checks.choice("strategy", strategy, STRATEGIES)
    x, y, row_labels, column_labels, self_column = search_sides(
        embeddings, labels, reference_embeddings, reference_labels, self_index
    )
    options: dict[str, Any] = {"self_index": self_column, "similarity": similarity, "backend": backend}
    below = None
    size = 1.0 if similarity == "cosine" else None
    positive_similarity = checks.vector("positive_similarity", positive_similarity, embeddings.shape[0], embeddings)
    if strategy == "semihard":
        if positive_similarity is None:
            mined, index = nearest(x, y, row_labels, column_labels, relation="same", **options)
            positive_similarity = mined[:, 0]
            if similarity == "dot":
                pair = x.detach(), take_rows(y.detach(), index[:, 0])
                size = pair[0].to(mined.dtype).norm(dim=1) * pair[1].to(mined.dtype).norm(dim=1)
        below = less_by_rounding(positive_similarity.detach(), x.shape[1], size)
    value, index = nearest(x, y, row_labels, column_labels, relation="different", below=below, **options)
    return value[:, 0], index[:, 0]


def magnet_loss(
    embeddings: Tensor,
    clusters: Tensor,
    cluster_labels: Tensor,
    *,
    alpha: float = 1.0,
    variance_floor: float = 1e-4,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Pull each sample to its cluster's mean, away from the clusters of other classes, in units of their variance.

        loss_i = relu(alpha + d_{i,own} / 2 sigma^2 + log sum_{m: class(m) != class(i)} exp(-d_im / 2 sigma^2))
        d_im = |r_i - mu_m|^2,  mu_m the mean of the batch's samples of cluster m,  sigma^2 = sum_i d_{i,own} / (B - 1)

    Args:
        embeddings: (B, D) r, float64, float32, bfloat16 or float16.
        clusters: (B,) integers in [0, M): the cluster of each sample; every cluster needs a member.
        cluster_labels: (M,) integers: the class of each cluster.
        alpha: the desired gap, in units of log odds.
        variance_floor: least sigma^2, so that a batch of equal embeddings does not divide by 0.
        reduction: "mean", "sum" or "none".
        backend: "auto", or the name of one.

    Returns:
        A scalar, or (B,) for "none"; float32, float64 for float64 inputs. A batch of one class has loss 0.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, unknown names; on a CPU, a cluster without members.
        IndexError: on a CPU, a cluster out of range.

    Gradients: embeddings, also through the means and the variance; twice differentiable.

    Source: Rippel et al., Metric Learning with Adaptive Density Discrimination, 2015, loss of a
        minibatch.

    >>> import torch
    >>> from fused_margins.functional import magnet_loss
    >>> embeddings = torch.tensor([[0.0], [0.2], [1.0], [1.2]])
    >>> magnet_loss(embeddings, torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1]), alpha=40.0)
    tensor(5.0000)
    """
    return magnet(embeddings, clusters, cluster_labels, alpha, variance_floor, reduction, backend, "embeddings")


def cluster_distances(embeddings: Tensor, centroids: Tensor, *, backend: str = "auto") -> Tensor:
    """Squared Euclidean distance of every embedding to every centroid.

        d_ik = |x_i - c_k|^2

    Args:
        embeddings: (B, D), float64, float32, bfloat16 or float16. centroids: (K, D), same dtype.
        backend: "auto", or the name of one.

    Returns:
        (B, K) in the dtype of the embeddings, never negative.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices.

    Gradients: embeddings, centroids; twice differentiable.

    Source: Rippel et al., Metric Learning with Adaptive Density Discrimination, 2015, distances of its loss.

    >>> import torch
    >>> from fused_margins.functional import cluster_distances
    >>> cluster_distances(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 0.0]]))
    tensor([[ 0.],
            [25.]])
    """
    checks.matrices(embeddings, centroids, ("embeddings", "centroids"))
    return 0 - scores(embeddings, centroids, similarity="negative_squared_euclidean", backend=backend)


def search_sides(
    embeddings: Tensor,
    labels: Tensor,
    reference_embeddings: Tensor | None,
    reference_labels: Tensor | None,
    self_index: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Both sides of a search, and which column is the row itself; checked."""
    if (reference_embeddings is None) != (reference_labels is None):
        raise ValueError("reference_embeddings and reference_labels: expected both or neither")
    y = embeddings if reference_embeddings is None else reference_embeddings
    column_labels = labels if reference_labels is None else reference_labels
    checks.matrices(embeddings, y, ("embeddings", "reference_embeddings"))
    checks.labels("labels", labels, embeddings.shape[0], embeddings)
    checks.labels("reference_labels", reference_labels, y.shape[0], embeddings, optional=True)
    checks.labels("self_index", self_index, embeddings.shape[0], embeddings, optional=True)
    if reference_embeddings is None and self_index is None:
        self_index = torch.arange(embeddings.shape[0], device=embeddings.device)
    return embeddings, y, labels, column_labels, self_index
