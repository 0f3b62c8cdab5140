"""Margins and biases for classes of unequal size, made of how many samples each has."""

import torch
from torch import Tensor

from . import checks


def margin_from_counts(counts: Tensor, *, max_margin: float = 0.5, power: float = 0.25) -> Tensor:
    """Margins of classes that grow as the classes get rarer.

        m_c = max_margin (n_c / min_c n_c)^-power

    Args:
        counts: (C,) samples n_c of each class, integers or floating, all positive.
        max_margin: the margin of the rarest class, of any sign, in units of the similarity; an angular one in radians.
        power: at least 0; 1/4 is that of the source, 0 gives every class the same margin.

    Returns:
        (C,) margins as `margin_softmax_loss` and its modules take them, float32 or in the dtype of floating counts.

    Raises:
        ValueError, TypeError: counts that are no positive numbers, a power below 0.

    Gradients: none.

    Source: Cao et al., Learning imbalanced datasets with label-distribution-aware margin loss, 2019, eq. 13; that the
    largest margin is a number of the user's is of its experiments, where it is 0.5 at scale 30.

    >>> import torch
    >>> from fused_margins.functional import margin_from_counts
    >>> margin_from_counts(torch.tensor([1, 16, 81]))
    tensor([0.5000, 0.2500, 0.1667])
    """
    max_margin, power = checks.number("max_margin", max_margin), checks.number("power", power)
    if not 0 <= power < float("inf"):
        raise ValueError(f"power: expected a number of at least 0, got {power}")
    of_classes = _counts(counts)
    return (max_margin * (of_classes / of_classes.min()).pow(-power)).to(_dtype_of_counts(counts))


def bias_from_counts(counts: Tensor, *, tau: float = 1.0) -> Tensor:
    """Biases of logits that make up for how often classes come: logit adjustment.

        b_c = tau log(n_c / sum_k n_k)

    Training with `logit_bias` b, and predicting without it, is consistent for the mean of the classes' accuracies.

    Args:
        counts: (C,) samples n_c of each class, integers or floating, all positive.
        tau: 1 for that consistency; of any sign.

    Returns:
        (C,) biases for `margin_softmax_loss(logit_bias=...)` and modules, float32 or in the dtype of floating counts.

    Raises:
        ValueError, TypeError: counts that are no positive numbers.

    Gradients: none.

    Source: Menon et al., Long-tail learning via logit adjustment, 2021, eq. 10.

    >>> import torch
    >>> from fused_margins.functional import bias_from_counts
    >>> bias_from_counts(torch.tensor([1, 3])).exp()
    tensor([0.2500, 0.7500])
    """
    tau = checks.number("tau", tau)
    of_classes = _counts(counts)
    return (tau * (of_classes / of_classes.sum()).log()).to(_dtype_of_counts(counts))


def _dtype_of_counts(counts: Tensor) -> torch.dtype:
    return counts.dtype if counts.is_floating_point() else torch.get_default_dtype()


def _counts(counts: Tensor) -> Tensor:
    """(C,) positive numbers in float64."""
    checks.dense("counts", counts)
    if not isinstance(counts, Tensor) or counts.dim() != 1:
        got = tuple(counts.shape) if isinstance(counts, Tensor) else type(counts).__name__
        raise TypeError(f"counts: expected a tensor of shape (classes,), got {got}")
    counts = checks.values("counts", counts, tuple(counts.shape)).detach()
    if counts.is_meta or not counts.shape[0] or not bool(((counts > 0) & counts.isfinite()).all()):
        raise ValueError(f"counts: expected one positive number a class, got {counts}")
    return counts.double()
