"""Margin softmax: one module, and the published losses that are settings of it."""

from typing import Any

import torch
from torch import Tensor, nn

from ..backends import registry
from ..core import checks
from ..core.enums import Reduction
from ..core.margins import check_margin_options
from ..core.modules import WithUserValues
from ..functional import margin_logits, margin_softmax_loss
from .heads import LinearHead, check_device, check_radians, linear_head


class MarginSoftmaxLoss(WithUserValues):
    """Softmax cross entropy over class similarities, with a margin of any sign on the own class.

        loss_i = -log softmax(z)_{y_i},   z_j = s u_ij  (j != y_i),   z_{y_i} = s psi(u_{i,y_i})

    Args:
        num_classes: C. embedding_size: D.
        scale: s > 0. learnable_scale: make it a parameter.
        margin: m, a number or a (C,) tensor, of any sign; radians for "angular". learnable_margin: make it a parameter,
            which a margin that is one is anyway.
        similarity, margin_type, angular_margin_rad, angular_multiplier, beyond_pi, margin_gradient, label_smoothing,
            ignore_index, reduction, backend: as for `fused_margins.functional.margin_softmax_loss`.
        class_weight, logit_bias: (C,) tensors or None; kept as buffers. `predictions` are without the bias.
        centers_per_class: K. center_temperature: of several centers, see the function.

    Attributes:
        weight: (C, D) parameter, one row a class; (C, K, D) where a class has K > 1 centers.
        scale: a number, or a parameter where it learns.
        margin: likewise; one that was a tensor and does not learn is a buffer.

    `reset_parameters` draws the weight anew and gives scale and margin what they began with. Buffers keep their values;
    after `to_empty`, which takes them, a call is refused until a state dict has been loaded.

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
    logit_bias: Tensor | None
    initial_scale: float | None = None  # of a module that an earlier version pickled
    initial_margin: float | Tensor | None = None
    centers_per_class: int = 1
    center_temperature: float = 0.0
    _of_user = ("margin", "class_weight", "logit_bias")

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        *,
        scale: float = 30.0,
        margin: float | Tensor = 0.0,
        similarity: str = "cosine",
        margin_type: str = "additive",
        angular_margin_rad: float = 0.0,
        angular_multiplier: float = 1.0,
        beyond_pi: str = "standard",
        margin_gradient: str = "exact",
        label_smoothing: float = 0.0,
        class_weight: Tensor | None = None,
        centers_per_class: int = 1,
        center_temperature: float = 0.0,
        logit_bias: Tensor | None = None,
        ignore_index: int = -100,
        learnable_scale: bool = False,
        learnable_margin: bool = False,
        reduction: str = "mean",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        num_classes = checks.integer("num_classes", num_classes, 1)
        embedding_size = checks.integer("embedding_size", embedding_size, 1)
        self.num_classes, self.embedding_size = num_classes, embedding_size
        self.centers_per_class = checks.integer("centers_per_class", centers_per_class, 1)
        self.center_temperature = checks.number("center_temperature", center_temperature)
        if not 0 <= self.center_temperature < float("inf"):
            raise ValueError(f"center_temperature: expected a number of at least 0, got {center_temperature}")
        if self.centers_per_class == 1 and self.center_temperature != 0:
            raise ValueError(f"center_temperature: expected 0 with one center a class, got {center_temperature}")
        centers = () if self.centers_per_class == 1 else (self.centers_per_class,)
        self.weight = nn.Parameter(self._empty(num_classes, *centers, embedding_size))
        self.initial_scale = checks.positive_number("scale", scale)
        learns = checks.flag("learnable_scale", learnable_scale)
        self.scale: float | Tensor = nn.Parameter(torch.empty(())) if learns else self.initial_scale
        self._set_margin(margin, checks.flag("learnable_margin", learnable_margin))
        for name, values in (("class_weight", class_weight), ("logit_bias", logit_bias)):
            if values is not None:
                values = self._kept(checks.values(name, values, (num_classes,)).detach().clone())
            self.register_buffer(name, values)
        self.margin_options: dict[str, Any] = {
            "similarity": similarity,
            "margin_type": margin_type,
            "angular_margin_rad": checks.number("angular_margin_rad", angular_margin_rad),
            "angular_multiplier": angular_multiplier,
            "beyond_pi": beyond_pi,
            "margin_gradient": margin_gradient,
        }
        check_margin_options(margin=margin, **self.margin_options)
        if isinstance(margin, Tensor) and margin_type == "angular":
            check_radians("margin", margin)
        checks.choice("reduction", reduction, Reduction)
        self.label_smoothing = checks.number("label_smoothing", label_smoothing)
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing}")
        if logit_bias is not None and self.centers_per_class > 1:
            raise ValueError("logit_bias: expected None where a class has several centers, got a tensor")
        if self.label_smoothing and self.centers_per_class > 1:
            raise ValueError(f"label_smoothing: expected 0 where a class has several centers, got {label_smoothing}")
        self.ignore_index = checks.integer("ignore_index", ignore_index)
        self.reduction, self.backend = reduction, registry.known(backend)
        self.reset_parameters()

    def _empty(self, *shape: int) -> Tensor:
        """Memory for values (C, ...) of the classes, as the module keeps them."""
        return torch.empty(*shape)

    def _kept(self, values: Tensor) -> Tensor:
        """Values (C,) of the classes, as the module keeps them."""
        return values

    def _draw(self) -> None:
        nn.init.normal_(self.weight, std=self.embedding_size**-0.5)

    def _set_margin(self, margin: float | Tensor, learns: bool) -> None:
        """A number, a buffer, or a parameter and what it begins with."""
        if isinstance(margin, Tensor):
            margin = checks.values("margin", margin, () if margin.dim() == 0 else (self.num_classes,))
            learns = learns or isinstance(margin, nn.Parameter)
            margin = self._kept(margin) if margin.dim() else margin
        else:
            margin = checks.finite_number("margin", margin, "a number or a tensor")
        if learns:
            self.initial_margin = margin.detach().clone() if isinstance(margin, Tensor) else margin
            is_parameter = isinstance(margin, nn.Parameter)
            self.margin: float | Tensor = margin if is_parameter else nn.Parameter(torch.as_tensor(margin).clone())
        elif isinstance(margin, Tensor):
            self.register_buffer("margin", margin.detach().clone())
        else:
            self.margin = margin

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The weight drawn anew, scale and margin as they began.

        Rows are of about unit length: a cosine head's step size is relative to the length of its rows.
        """
        self._draw()
        if isinstance(self.scale, Tensor) and self.initial_scale is not None:
            self.scale.fill_(self.initial_scale)
        if isinstance(begins := self.initial_margin, Tensor) and begins.is_meta:
            self._lost |= {"margin"}  # made on the meta device: nobody knows the values
        elif begins is not None and isinstance(self.margin, Tensor):
            self.margin.copy_(begins) if isinstance(begins, Tensor) else self.margin.fill_(begins)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return self._softmax(embeddings, labels)

    def _softmax(self, embeddings: Tensor, labels: Tensor, **of_samples: Any) -> Tensor:
        """The loss of the module's settings but for those that a subclass makes of the samples."""
        self.require_values()
        check_device(embeddings, self.weight)
        settings = {"scale": self.scale, "margin": self.margin, **self.margin_options, **of_samples}
        return margin_softmax_loss(
            embeddings,
            self.weight,
            labels,
            label_smoothing=self.label_smoothing,
            class_weight=self.class_weight,
            center_temperature=self.center_temperature,
            logit_bias=self.logit_bias,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            backend=self.backend,
            **settings,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._buffers.setdefault("logit_bias", None)  # of a version that had none

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        differ = set()
        for name in ("scale", "margin"):
            saved, own = state_dict.get(prefix + name), getattr(self, name)
            if isinstance(saved, Tensor) != isinstance(own, Tensor) and prefix + "weight" in state_dict:
                here, there = (
                    f"a tensor of shape {tuple(t.shape)}" if isinstance(t, Tensor) else "a number" for t in (own, saved)
                )
                error_msgs.append(f"{prefix}{name}: expected {here}, as this module has, got {there} in the state dict")
                differ.add(prefix + name)
        state_dict = {name: t for name, t in state_dict.items() if name not in differ}
        rest = local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        super()._load_from_state_dict(state_dict, prefix, *rest)
        missing_keys[:] = [name for name in missing_keys if name not in differ]

    def predictions(self, embeddings: Tensor) -> Tensor:
        """Logits (B, C) without the margin: what accuracy is computed from."""
        similarity = self.margin_options["similarity"]
        options = {"similarity": similarity, "center_temperature": self.center_temperature, "backend": self.backend}
        return margin_logits(embeddings, self.weight, scale=self.scale, **options)

    def to_linear(self) -> LinearHead:
        """`predictions` as a module of plain torch, for inference and export: normalise, multiply by a matrix.

        It holds copies of the weight, as they are now, with the scale multiplied in, and nothing of it learns.

        >>> import torch
        >>> from fused_margins import CosFaceLoss
        >>> loss, embeddings = CosFaceLoss(num_classes=3, embedding_size=4), torch.randn(2, 4)
        >>> head = loss.to_linear()
        >>> torch.testing.assert_close(head(embeddings), loss.predictions(embeddings).detach())
        >>> head.linear
        Linear(in_features=4, out_features=3, bias=False)
        """
        return linear_head(self.weight, self.scale, self.margin_options["similarity"], self.center_temperature)

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

    def __init__(self, num_classes: int, embedding_size: int, *, scale: float = 30.0, **options) -> None:  # type: ignore[no-untyped-def]
        super().__init__(num_classes, embedding_size, scale=scale, **options)


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
        *,
        scale: float = 64.0,
        margin: float | Tensor = 0.35,
        **options,
    ) -> None:
        super().__init__(num_classes, embedding_size, scale=scale, margin=margin, **options)


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
        *,
        scale: float = 64.0,
        margin: float | Tensor = 0.5,
        **options,
    ) -> None:
        super().__init__(num_classes, embedding_size, scale=scale, margin=margin, margin_type="angular", **options)


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
        *,
        scale: float = 30.0,
        margin: float | Tensor = -0.05,
        **options,
    ) -> None:
        super().__init__(num_classes, embedding_size, scale=scale, margin=margin, **options)


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
        *,
        scale: float = 5.0,
        margin: float | Tensor = -0.3,
        **options,
    ) -> None:
        super().__init__(num_classes, embedding_size, scale=scale, margin=margin, similarity="dot", **options)
