"""Margin softmax: one module, and the published losses that are settings of it."""

from typing import Any

import torch
from torch import Tensor, nn

from ..core import checks
from ..core.enums import MarginType, Reduction, Similarity
from ..functional import margin_logits, margin_softmax_loss


class MarginSoftmaxLoss(nn.Module):
    """Softmax cross entropy over class similarities, with a margin of any sign on the own class.

        loss_i = -log softmax(z)_{y_i},   z_j = s u_ij  (j != y_i),   z_{y_i} = s psi(u_{i,y_i})

    Args:
        num_classes: C. embedding_size: D.
        scale: s > 0. learnable_scale: make it a parameter.
        margin: m, a number or a (C,) tensor, of any sign; radians for "angular". learnable_margin: make it a parameter.
        similarity, margin_type, angular_margin_rad, angular_multiplier, beyond_pi, margin_gradient, label_smoothing,
        ignore_index,
            reduction, backend: as for `fused_margins.functional.margin_softmax_loss`.
        class_weight: (C,) tensor or None; kept as a buffer.

    Attributes:
        weight: (C, D) parameter, one row a class.

    Call: loss(embeddings (B, D), labels (B,) integers) gives a scalar, or (B,) for reduction "none".

    Raises:
        ValueError, TypeError, IndexError: as `fused_margins.functional.margin_softmax_loss`.

    Gradients: embeddings, weight, and scale and margin where they learn.

    Source: Liu et al., Negative Margin Matters: Understanding Margin in Few-shot Classification, 2020, softmax
    loss with a margin.

    >>> import torch
    >>> from fused_margins import MarginSoftmaxLoss
    >>> loss = MarginSoftmaxLoss(num_classes=10, embedding_size=64, scale=30.0, margin=-0.05)
    >>> loss(torch.randn(8, 64), torch.randint(0, 10, (8,))).backward()
    >>> loss.weight.grad.shape
    torch.Size([10, 64])
    """

    class_weight: Tensor | None

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        scale: float = 30.0,
        margin: float | Tensor = 0.0,
        *,
        similarity: str = "cosine",
        margin_type: str = "additive",
        angular_margin_rad: float = 0.0,
        angular_multiplier: float = 1.0,
        beyond_pi: str = "standard",
        margin_gradient: str = "exact",
        label_smoothing: float = 0.0,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        learnable_scale: bool = False,
        learnable_margin: bool = False,
        reduction: str = "mean",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        for name, value in (("num_classes", num_classes), ("embedding_size", embedding_size)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if not scale > 0:
            raise ValueError(f"scale: expected a positive number, got {scale}")
        checks.choice("similarity", similarity, Similarity)
        checks.choice("margin_type", margin_type, MarginType)
        checks.choice("reduction", reduction, Reduction)
        if class_weight is not None and tuple(class_weight.shape) != (num_classes,):
            raise ValueError(f"class_weight: expected shape ({num_classes},), got {tuple(class_weight.shape)}")
        if isinstance(margin, Tensor) and margin.dim() > 0 and tuple(margin.shape) != (num_classes,):
            raise ValueError(f"margin: expected a number or shape ({num_classes},), got {tuple(margin.shape)}")
        self.num_classes, self.embedding_size = num_classes, embedding_size
        self.weight = nn.Parameter(torch.empty(num_classes, embedding_size))
        self.scale: float | Tensor = nn.Parameter(torch.tensor(float(scale))) if learnable_scale else float(scale)
        if learnable_margin:
            self.margin: float | Tensor = nn.Parameter(torch.as_tensor(margin, dtype=torch.float32).clone())
        elif isinstance(margin, Tensor):
            self.register_buffer("margin", margin.detach().clone())
        else:
            self.margin = float(margin)
        self.register_buffer("class_weight", None if class_weight is None else class_weight.detach().clone())
        self.margin_options: dict[str, Any] = {
            "similarity": similarity,
            "margin_type": margin_type,
            "angular_margin_rad": angular_margin_rad,
            "angular_multiplier": angular_multiplier,
            "beyond_pi": beyond_pi,
            "margin_gradient": margin_gradient,
        }
        self.label_smoothing, self.ignore_index = label_smoothing, ignore_index
        self.reduction, self.backend = reduction, backend
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Rows of about unit length: a cosine head's step size is relative to the length of its rows."""
        nn.init.normal_(self.weight, std=self.embedding_size**-0.5)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return margin_softmax_loss(
            embeddings,
            self.weight,
            labels,
            scale=self.scale,
            margin=self.margin,
            label_smoothing=self.label_smoothing,
            class_weight=self.class_weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            backend=self.backend,
            **self.margin_options,
        )

    def predictions(self, embeddings: Tensor) -> Tensor:
        """Logits (B, C) without the margin: what accuracy is computed from."""
        similarity = self.margin_options["similarity"]
        return margin_logits(embeddings, self.weight, scale=self.scale, similarity=similarity, backend=self.backend)

    def extra_repr(self) -> str:
        margin, scale = torch.as_tensor(self.margin).detach(), torch.as_tensor(self.scale).detach()
        parts = {
            "num_classes": self.num_classes,
            "embedding_size": self.embedding_size,
            "scale": f"{scale.item():g}",
            "margin": tuple(margin.shape) if margin.dim() else f"{margin.item():g}",
            "margin_type": repr(self.margin_options["margin_type"]),
            "similarity": repr(self.margin_options["similarity"]),
            "label_smoothing": f"{self.label_smoothing:g}",
            "backend": repr(self.backend),
        }
        return ", ".join(f"{name}={value}" for name, value in parts.items())


class NormalizedSoftmaxLoss(MarginSoftmaxLoss):
    """Softmax on scaled cosines, without a margin.

        z_j = s cos(x_i, w_j)

    Args, call, raises, gradients: as `MarginSoftmaxLoss`.

    Source: Wang et al., NormFace: L2 hypersphere embedding for face verification, 2017, scaled cosine softmax.

    >>> from fused_margins import NormalizedSoftmaxLoss
    >>> NormalizedSoftmaxLoss(num_classes=10, embedding_size=64).scale
    30.0
    """

    def __init__(self, num_classes: int, embedding_size: int, scale: float = 30.0, **options) -> None:  # type: ignore[no-untyped-def]
        super().__init__(num_classes, embedding_size, scale, **options)


class CosFaceLoss(MarginSoftmaxLoss):
    """Large-margin cosine loss: a positive additive margin.

        z_{y_i} = s (cos(x_i, w_{y_i}) - m)

    Args, call, raises, gradients: as `MarginSoftmaxLoss`.

    Source: Wang et al., CosFace: Large margin cosine loss for deep face recognition, 2018, eq. 4.

    >>> from fused_margins import CosFaceLoss
    >>> CosFaceLoss(num_classes=10, embedding_size=64).margin
    0.35
    """

    def __init__(  # type: ignore[no-untyped-def]
        self,
        num_classes: int,
        embedding_size: int,
        scale: float = 64.0,
        margin: float | Tensor = 0.35,
        **options,
    ) -> None:
        super().__init__(num_classes, embedding_size, scale, margin, **options)


class ArcFaceLoss(MarginSoftmaxLoss):
    """Additive angular margin, in radians, with the exact gradient.

        z_{y_i} = s cos(theta_{i,y_i} + m)

    Args, call, raises, gradients: as `MarginSoftmaxLoss`.

    Source: Deng et al., ArcFace: Additive angular margin loss for deep face recognition, 2019, eq. 3.

    >>> from fused_margins import ArcFaceLoss
    >>> ArcFaceLoss(num_classes=10, embedding_size=64).margin  # radians
    0.5
    """

    def __init__(  # type: ignore[no-untyped-def]
        self,
        num_classes: int,
        embedding_size: int,
        scale: float = 64.0,
        margin: float | Tensor = 0.5,
        **options,
    ) -> None:
        super().__init__(num_classes, embedding_size, scale, margin, margin_type="angular", **options)


class NegativeMarginLoss(MarginSoftmaxLoss):
    """Cosine softmax with a negative margin, for features that are to transfer to new classes.

        z_{y_i} = s (cos(x_i, w_{y_i}) - m),   m < 0

    Args, call, raises, gradients: as `MarginSoftmaxLoss`.

    Source: Liu et al., Negative Margin Matters: Understanding Margin in Few-shot Classification, 2020, neg-cosine.

    >>> from fused_margins import NegativeMarginLoss
    >>> NegativeMarginLoss(num_classes=10, embedding_size=64).margin
    -0.05
    """

    def __init__(  # type: ignore[no-untyped-def]
        self,
        num_classes: int,
        embedding_size: int,
        scale: float = 30.0,
        margin: float | Tensor = -0.05,
        **options,
    ) -> None:
        super().__init__(num_classes, embedding_size, scale, margin, **options)


class NegativeSoftmaxLoss(MarginSoftmaxLoss):
    """Inner-product softmax with a negative margin ("neg-softmax"): nothing is normalised.

        z_{y_i} = s (<x_i, w_{y_i}> - m),   m < 0

    Args, call, raises, gradients: as `MarginSoftmaxLoss`.

    Source: Liu et al., Negative Margin Matters: Understanding Margin in Few-shot Classification, 2020, neg-softmax.

    >>> from fused_margins import NegativeSoftmaxLoss
    >>> NegativeSoftmaxLoss(num_classes=10, embedding_size=64).margin
    -0.3
    """

    def __init__(  # type: ignore[no-untyped-def]
        self,
        num_classes: int,
        embedding_size: int,
        scale: float = 5.0,
        margin: float | Tensor = -0.3,
        **options,
    ) -> None:
        super().__init__(num_classes, embedding_size, scale, margin, similarity="dot", **options)
