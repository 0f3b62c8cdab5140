"""The margin softmax: its loss, with all that a loss can ask for around the op `contrast`, and its logits."""

import torch
from torch import Tensor

from ..backends import budget, registry
from ..core import checks
from ..core.centers import center_vectors, class_similarities
from ..core.cosine_sums import cosine_sums
from ..core.enums import MarginType, Reduction, Relation, Similarity
from ..core.indices import ABSENT, IGNORED, INVALID, check_index
from ..core.margins import check_margin
from ..core.reductions import reduce_loss
from ..core.similarity import accumulation_dtype, pair_similarity, similarity_sum, take_rows
from ..core.softmax_terms import Terms, cross_entropy, losses, spread, terms
from ..ops.contrast.epilogues import Epilogue
from ..ops.contrast.op import Contrast, contrast
from ..ops.nearest.op import Nearest, nearest
from ..ops.scores.op import Scores, scores

_OF_CLASSES = {"x": "embeddings", "y": "weight", "target": "labels", "bias": "logit_bias"}


def _is_exporting() -> bool:
    """Whether a graph is made that others are to read, who know torch's own operations alone."""
    return torch.jit.is_tracing() or torch.onnx.is_in_onnx_export() or torch.compiler.is_exporting()


def _row_scale(scale: float | Tensor, embeddings: Tensor) -> float | Tensor:
    """A number, 0-d or (B, 1) scale as the ops take it: a number, or 0-d or (B,) in the accumulation dtype."""
    if not isinstance(scale, Tensor):
        return checks.positive_number("scale", checks.number("scale", scale, "a number or a tensor"))
    checks.dense("scale", scale)
    if tuple(scale.shape) == (embeddings.shape[0], 1):
        scale = scale[:, 0]
    elif scale.dim() != 0:
        raise ValueError(
            f"scale: expected a number, a 0-d tensor or shape ({embeddings.shape[0]}, 1), got {tuple(scale.shape)}"
        )
    return checks.row_factor("scale", scale, embeddings, positive=True)


def _one_center(
    weight: Tensor, temperature: float, bias: Tensor | None, backend: str, label_smoothing: float = 0.0
) -> Tensor:
    """(C, D) of weights (C, K, D), on which everything is checked but what several centers ask for."""
    if not 0 <= checks.number("center_temperature", temperature) < float("inf"):
        raise ValueError(f"center_temperature: expected a number of at least 0, got {temperature}")
    if not isinstance(weight, Tensor) or weight.dim() != 3 or not weight.shape[1]:
        got = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"weight: expected a tensor (classes, centers, width) with centers, got {got}")
    if bias is not None:
        raise ValueError("logit_bias: expected None where a class has several centers, got a tensor")
    if label_smoothing != 0:
        raise ValueError(f"label_smoothing: expected 0 where a class has several centers, got {label_smoothing}")
    if temperature != 0 and registry.known(backend) not in ("auto", "reference"):
        raise ValueError(f"backend: expected 'auto' or 'reference' with a center_temperature, got {backend!r}")
    return weight[:, 0]


def _nearest_centers(call: Contrast, centers: Tensor, backend: str) -> Contrast:
    """A checked call on the first centers (C, D) as one on all: the columns of a class are a group, the target is the
    most similar one of the own class.
    """
    num_classes, num_centers = centers.shape[:2]
    labels = check_index(call.target, num_classes, call.ignore_index, "labels", absent=True)
    classes = torch.arange(num_classes, device=centers.device).repeat_interleave(num_centers)
    all_centers = centers.to(call.x.dtype).flatten(0, 1)
    search = Nearest(call.x, all_centers, labels, classes, similarity=call.similarity)
    _, best = nearest.run(search, backend, valid=False)
    # Where nothing is most similar, as nothing is to what is not a number, the first one takes part.
    target = torch.where(labels >= 0, torch.maximum(best[:, 0], labels * num_centers), labels)
    call = call._replace(y=all_centers, target=target, row_labels=labels, column_labels=classes)
    return call._replace(ignore_index=IGNORED, group_size=num_centers)


def class_vectors(
    call: Contrast, centers: Tensor | None, center_temperature: float, ignore_index: int, backend: str
) -> tuple[Contrast, Tensor, Tensor]:
    """The call, checked, and u, negative_lse (B,): the similarity with the own class, the log-sum-exp over the others.

    call: of embeddings, weight (C, D), labels, scale, bias and similarity; ABSENT labels have negatives alone.
    centers: (C, K, D), of which the weight is the first ones, or None.
    """
    call = contrast.checked(call._replace(relation=Relation.DIFFERENT, ignore_index=ignore_index), _OF_CLASSES)
    call = call._replace(target=call.target.long())  # ignore_index need not fit a narrower dtype
    if centers is None or center_temperature == 0:
        of_columns = call if centers is None else _nearest_centers(call, centers, backend)
        return call, *contrast.run(of_columns, backend, _OF_CLASSES)
    with torch.autocast(call.x.device.type, enabled=False):
        return call, *center_vectors(
            call.x,
            centers.to(call.x.dtype),
            call.target,
            call.scale,
            similarity=call.similarity,
            temperature=float(center_temperature),
            ignore_index=ignore_index,
            piece_bytes=budget.memory_budget(),
        )


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
    center_temperature: float = 0.0,
    logit_bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Softmax cross entropy over class similarities, with a margin of any sign on the own class.

        z_j = scale u_ij  (j != y_i),   z_{y_i} = scale psi(u_{i,y_i}),   loss_i = -log softmax(z + bias)_{y_i}

    computed as softplus(logsumexp_{j != y_i} z_j - z_{y_i}), which keeps losses and gradients far below rounding.

    Args:
        embeddings: (B, D), float64, float32, bfloat16 or float16.
        weight: (C, D), one row a class, same dtype; or (C, K, D), K centers a class, from which the u_ij of a class is
            made; with a temperature in PyTorch, in pieces of classes that fit the memory budget.
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
        center_temperature: t >= 0. Of a class with several centers the most similar one counts at 0 (sub-center
            ArcFace), else their mean under softmax(u / t) (SoftTriple).
        logit_bias: (C,), added to the logits of every row, the own class's too; see `bias_from_counts`.
        ignore_index: label of rows that count for nothing; so does -2**63, which is reserved.
        reduction: "mean" (over rows that are not ignored; 0 if there are none), "sum" or "none".
        backend: "auto", or the name of one; see `fused_margins.explain`.

    Returns:
        A scalar, or (B,) for "none"; float32, float64 for float64 inputs.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, unknown names, a scale that is not positive.
        IndexError: a label out of range (on a GPU the row is NaN; see `fused_margins.checked`).

    Gradients: embeddings, weight, scale, margin, angular_margin_rad, class_weight, logit_bias; twice differentiable.

    Source: Liu et al., Negative Margin Matters: Understanding Margin in Few-shot Classification, 2020, softmax
        loss with a margin.

    >>> import torch
    >>> from fused_margins.functional import margin_softmax_loss
    >>> embeddings, weight, labels = torch.eye(3), torch.eye(3), torch.arange(3)
    >>> margin_softmax_loss(embeddings, weight, labels, scale=4.0, margin=-0.5)
    tensor(0.0049)
    """
    tensors = (embeddings, weight, labels)
    given = (
        "margin_softmax_loss", scale, margin, similarity, margin_type, angular_margin_rad, angular_multiplier,
        beyond_pi, margin_gradient, label_smoothing, class_weight, center_temperature, logit_bias, ignore_index,
        reduction, backend,
    )  # fmt: skip
    asked, loss = contrast.again(tensors, given, _OF_CLASSES)
    if loss is not None:
        return loss
    label_smoothing = checks.number("label_smoothing", label_smoothing)
    centers = None
    if center_temperature != 0 or (isinstance(weight, Tensor) and weight.dim() == 3):
        centers, weight = weight, _one_center(weight, center_temperature, logit_bias, backend, label_smoothing)
    if any(isinstance(value, Tensor) for value in (margin, scale, angular_margin_rad, logit_bias)):
        embeddings, weight = checks.matrices(embeddings, weight, ("embeddings", "weight"))
        checks.labels("labels", labels, embeddings.shape[0], embeddings)
    options = (margin, margin_type, angular_margin_rad, angular_multiplier, beyond_pi, margin_gradient)
    own = check_margin(labels, weight, similarity, *options)
    scale = _row_scale(scale, embeddings)
    logit_bias = checks.vector("logit_bias", logit_bias, weight.shape[0], weight) if logit_bias is not None else None
    reduced = checks.choice("reduction", reduction, Reduction)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing}")
    # An angle that is a number goes with the op, and so does smoothing where a kernel does it; what else there is, is
    # row code on what the op makes of a row.
    by_op = own.is_a_number and center_temperature == 0
    cosines = own.similarity == Similarity.COSINE
    smooth = label_smoothing > 0
    if smooth:
        embeddings, weight = checks.matrices(embeddings, weight, ("embeddings", "weight"))
    if (
        smooth
        and by_op
        and cosines
        and class_weight is None
        and logit_bias is None
        and _smooths(backend, embeddings, weight, labels)
    ):
        of_op, smooth = label_smoothing, False
    else:
        of_op = 0.0
    by_rows = smooth or class_weight is not None
    if by_rows:
        embeddings, weight = checks.matrices(embeddings, weight, ("embeddings", "weight"))
        class_weight, asked = checks.vector("class_weight", class_weight, weight.shape[0], weight), None
    of_row: Terms | None = None
    of_all: Tensor | None = None
    if by_op and (cosines or not smooth):
        of_loss = (own.angle_rad, own.beyond_pi, own.straight_through, Reduction.NONE if by_rows else reduced)
        of_own = own.margin  # the op's bias is one of the other classes alone: that of the own class is a margin
        if logit_bias is not None:
            of_own = of_own - take_rows(logit_bias, labels) / scale
        call = Contrast(
            embeddings, weight, labels, None, None, None, scale, logit_bias, of_own, own.similarity, Relation.DIFFERENT,
            ignore_index, Epilogue.MARGIN_SOFTMAX, *of_loss, smoothing=of_op,  # type: ignore[arg-type]
        )  # fmt: skip
        if centers is not None:
            call, asked = _nearest_centers(contrast.checked(call, _OF_CLASSES), centers, backend), None
        plain = contrast.run(call, backend, _OF_CLASSES, valid=False, asked=asked)
        if not by_rows:
            return plain  # type: ignore[no-any-return]
        labels = labels.long()  # ignore_index need not fit a narrower dtype
        counted = (labels != ignore_index) & (labels != ABSENT)
        if smooth:
            sums = cosine_sums(embeddings, weight, _each(class_weight, weight), labels)
            u, of_all = (torch.where(counted, t, 0.0) for t in sums)
            of_row = terms(labels, None, u, of_all, own, scale, logit_bias, class_weight, weight.shape[0])
    else:
        call, u, negative_lse = class_vectors(
            Contrast(embeddings, weight, labels, None, None, None, scale, logit_bias, 0.0, own.similarity),
            centers, center_temperature, ignore_index, backend,
        )  # fmt: skip
        labels, each = call.target, _each(class_weight, weight)
        counted, elsewhere = (labels != ignore_index) & (labels != ABSENT), labels == ABSENT
        if smooth:
            of_all = similarity_sum(call.x, call.y, each, own.similarity)
        of_row = terms(labels, elsewhere, u, of_all, own, call.scale, logit_bias, class_weight, weight.shape[0])
        plain = cross_entropy(negative_lse, of_row.z)
    row_weight = None if class_weight is None else take_rows(class_weight, labels)
    of_others = None if of_row is None else spread(plain, of_row)
    loss, row_weight = losses(plain, row_weight, of_others, counted, label_smoothing, weight.shape[0])
    return reduce_loss(loss, row_weight, reduced)


def _smooths(backend: str, embeddings: Tensor, weight: Tensor, labels: Tensor) -> bool:
    """Whether smoothing goes with the op, of checked matrices: the C++ of a CPU and Triton have it, and the reference
    where it is asked for, or runs in the place of C++."""
    call = Contrast(embeddings, weight, labels, epilogue=Epilogue.MARGIN_SOFTMAX, smoothing=1.0)
    if registry.known(backend) != "auto":
        return backend == "reference" or registry.can_run(backend, contrast.problem(call))
    return embeddings.device.type == "cpu" or registry.resolve(backend, contrast.problem(call)) != "reference"


def _each(class_weight: Tensor | None, weight: Tensor) -> Tensor:
    """(C,) the weight of each class in a sum over them."""
    if class_weight is not None:
        return class_weight
    return weight.new_ones(weight.shape[0], dtype=accumulation_dtype(weight.dtype))


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
    center_temperature: float = 0.0,
    logit_bias: Tensor | None = None,
    ignore_index: int = -100,
    backend: str = "auto",
) -> Tensor:
    """The logits whose cross entropy is `margin_softmax_loss`; without labels, plain scaled similarities.

        z_ij = scale u_ij + bias_j  (j != y_i),   z_{i,y_i} = scale psi(u_{i,y_i}) + bias_{y_i}

    Predict from the logits without labels: accuracy on margin-shifted ones is meaningless.

    Args:
        embeddings: (B, D), float64, float32, bfloat16 or float16. weight: (C, D) or (C, K, D), same dtype.
        labels: (B,) integers in [0, C), `ignore_index` for rows without a margin, or None.
        scale, margin, and all others: as for `margin_softmax_loss`.

    Returns:
        (B, C) in the dtype of the embeddings.

    Raises:
        As `margin_softmax_loss`.

    Gradients: embeddings, weight, scale, margin, angular_margin_rad, logit_bias; twice differentiable.

    Source: Liu et al., Negative Margin Matters, 2020, the logits of its softmax loss with a margin.

    >>> import torch
    >>> from fused_margins.functional import margin_logits
    >>> margin_logits(torch.eye(2), torch.eye(2), torch.tensor([0, 1]), scale=10.0, margin=0.5)
    tensor([[5., 0.],
            [0., 5.]])
    """
    measure = checks.choice("similarity", similarity, Similarity)
    ignore_index = checks.integer("ignore_index", ignore_index)
    centers = None
    if center_temperature != 0 or (isinstance(weight, Tensor) and weight.dim() == 3):
        centers, weight = weight, _one_center(weight, center_temperature, logit_bias, backend)
    embeddings, weight = checks.matrices(embeddings, weight, ("embeddings", "weight"))
    scale = _row_scale(scale, embeddings)
    plain = labels is None
    if labels is None:
        labels = torch.full((embeddings.shape[0],), ignore_index, device=embeddings.device)
    checks.labels("labels", labels, embeddings.shape[0], embeddings)
    labels = labels.long()  # ignore_index need not fit a narrower dtype
    options = (margin, margin_type, angular_margin_rad, angular_multiplier, beyond_pi, margin_gradient)
    own = check_margin(labels, weight, measure, *options)
    if centers is not None:
        with torch.autocast(embeddings.device.type, enabled=False):
            u = class_similarities(embeddings, centers.to(embeddings.dtype), measure, float(center_temperature))
        if not plain:
            index = check_index(labels, weight.shape[0], ignore_index, "labels")[:, None]
            of_own = u.gather(1, index.clamp(min=0))
            shifted = torch.where(index == INVALID, torch.nan, own.psi(of_own[:, 0])[:, None])
            u = u.scatter(1, index.clamp(min=0), torch.where(index == IGNORED, of_own, shifted))
        of_row = scale[:, None] if isinstance(scale, Tensor) and scale.dim() else scale
        return (u * of_row).to(embeddings.dtype)
    call = Scores(embeddings, weight, scale=scale, similarity=measure, ignore_index=ignore_index)
    if logit_bias is not None:
        logit_bias = checks.vector("logit_bias", logit_bias, weight.shape[0], weight)
    if plain:
        logits = scores.run(call, "reference" if _is_exporting() else backend)
        return logits if logit_bias is None else (logits + logit_bias).to(logits.dtype)
    # What psi takes away from the own class: constant for additive margins, else a function of its similarity.
    taken = own.margin
    if own.type != MarginType.ADDITIVE:
        of_class = take_rows(weight, check_index(labels, weight.shape[0], ignore_index, "labels"))
        u = pair_similarity(embeddings, of_class, measure)
        taken = u - own.psi(u)
    logits = scores.run(call._replace(target=labels, margin=taken), backend, _OF_CLASSES)
    return logits if logit_bias is None else (logits + logit_bias).to(logits.dtype)
