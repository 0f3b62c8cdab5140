"""Margin softmax whose margin or scale is made of each sample: of its length, or at random."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..core import checks
from ..core.enums import Reduction, Similarity
from ..core.indices import ABSENT
from ..core.reductions import reduce_loss
from ..core.similarity import pair_similarity, take_rows
from ..functional import margin_logits
from .heads import LinearHead, check_device, lengths, linear_head
from .margin_softmax import MarginSoftmaxLoss


class _OfSamples(MarginSoftmaxLoss):
    """A margin that is a number in the constructor, and one a sample in the call."""

    def __init__(self, num_classes: int, embedding_size: int, *, margin: float, **options: Any) -> None:
        super().__init__(num_classes, embedding_size, margin=checks.number("margin", margin), **options)
        if isinstance(self.margin, nn.Parameter):
            raise ValueError("learnable_margin: expected False, as the margin is made of each sample, got True")

    def _counted(self, labels: Tensor) -> Tensor:
        """(B,) bool: the samples that have a loss."""
        labels = labels.long()  # ignore_index need not fit a narrower dtype
        return (labels != self.ignore_index) & (labels != ABSENT)


class AdaFaceLoss(_OfSamples):
    """Margins by the quality of a sample, which its length tells: short ones are spared, long ones are pressed.

        z_{y_i} = s (cos(theta_{i,y_i} - m q_i) - m q_i - m),   q_i = clip(h (|x_i| - mean) / std, -1, 1)

    Mean and standard deviation are running ones of the lengths, which are between 0.001 and 100 here. The shifted
    angle goes on beyond [0, pi] as `beyond_pi` says, where the authors' code clips it.

    Args:
        num_classes: C. embedding_size: D. scale: s.
        margin: m, at most pi: in units of cosine, and as an angle in radians.
        concentration: h > 0: about two thirds of all q lie within [-h, h].
        momentum: in [0, 1], the share of a batch in the running statistics, as in torch's batch normalisation.
        options: as for `MarginSoftmaxLoss`.

    Attributes:
        weight: (C, D) parameter. norm_mean, norm_std: 0-d buffers, the running statistics; they begin with 20 and 100,
            and a batch in training mode moves them, but for one with a length that is not finite or of fewer than two
            samples. Samples with the label `ignore_index` do not count.

    Call, raises: as `MarginSoftmaxLoss`. RuntimeError: in training mode within a backward, as by activation
    checkpointing.

    Gradients: embeddings, weight and a scale that learns; q has none.

    Source: Kim et al., AdaFace: Quality adaptive margin for face recognition, 2022, eqs. 12 to 16; first statistics,
    bounds of the lengths and momentum as in the authors' code.

    >>> import torch
    >>> from fused_margins import AdaFaceLoss
    >>> loss = AdaFaceLoss(num_classes=10, embedding_size=64)
    >>> loss(20 * torch.randn(8, 64), torch.randint(0, 10, (8,))).backward()
    >>> bool(loss.norm_mean > 20)
    True
    """

    norm_mean: Tensor
    norm_std: Tensor

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        *,
        scale: float = 64.0,
        margin: float = 0.4,
        concentration: float = 0.333,
        momentum: float = 0.01,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, embedding_size, scale=scale, margin=margin, margin_type="combined", **options)
        if not abs(margin) <= math.pi:
            raise ValueError(
                f"margin: expected a number within [-pi, pi], of radians where it is an angle, got {margin}"
            )
        self.concentration = checks.positive_number("concentration", concentration)
        self.momentum = checks.number("momentum", momentum)
        if not 0 <= self.momentum <= 1:
            raise ValueError(f"momentum: expected a number in [0, 1], got {momentum}")

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The weight drawn anew, and the statistics as they began."""
        super().reset_parameters()
        for name, value in (("norm_mean", 20.0), ("norm_std", 100.0)):
            self.register_buffer(name, self.weight.new_full((), value))

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        check_device(embeddings, self.weight)
        length = lengths(embeddings).detach().clamp(0.001, 100)
        if self.training:
            if not torch.compiler.is_compiling():
                checks.not_in_a_backward("AdaFaceLoss")
            checks.labels("labels", labels, length.shape[0], embeddings)
            self._update(length[:, 0], self._counted(labels))
        quality = (length - self.norm_mean) / (self.norm_std + 1e-3) * self.concentration
        m = self.margin * quality.clamp(-1, 1).to(length.dtype)
        return self._softmax(embeddings, labels, angular_margin_rad=-m, margin=m + self.margin)

    @torch.no_grad()
    def _update(self, length: Tensor, counted: Tensor) -> None:
        count = counted.sum()
        mean = torch.where(counted, length, 0.0).sum() / count
        std = (torch.where(counted, length - mean, 0.0).square().sum() / (count - 1)).sqrt()
        usable = (count > 1) & mean.isfinite() & std.isfinite()
        for running, of_batch in ((self.norm_mean, mean), (self.norm_std, std)):
            running.copy_(torch.where(usable, running.lerp(of_batch.to(running.dtype), self.momentum), running))


class MagFaceLoss(_OfSamples):
    """Angular margins that grow with the length of a sample, and a regularizer that makes samples long.

        z_{y_i} = s cos(theta_{i,y_i} + m(a_i)),   loss_i = -log softmax(z)_{y_i} + lambda (a_i / u^2 + 1 / a_i)
        m(a) = m_l + (m_u - m_l) (a - l) / (u - l),   a_i = |x_i| clipped to [l, u]

    Args:
        num_classes: C. embedding_size: D. scale: s.
        lower_margin, upper_margin: m_l and m_u in radians, 0 <= m_l <= m_u <= pi.
        lower_length, upper_length: l and u, 0 < l < u.
        regularizer: lambda, at least 0. With a reduction of "mean" it is a mean over the samples that are not ignored.
        beyond_pi: "easy" as in the authors' code, or as for `MarginSoftmaxLoss`.
        options: as for `MarginSoftmaxLoss`.

    Attributes: weight: (C, D) parameter.

    Call, raises: as `MarginSoftmaxLoss`.

    Gradients: embeddings, also through their length into margin and regularizer (none where it is clipped), weight and
    a scale that learns.

    Source: Meng et al., MagFace: A universal representation for face recognition and quality assessment, 2021, eqs. 3
    to 5; numbers of the authors' code.

    >>> import torch
    >>> from fused_margins import MagFaceLoss
    >>> loss = MagFaceLoss(num_classes=10, embedding_size=64)
    >>> loss(3 * torch.randn(8, 64), torch.randint(0, 10, (8,))).backward()
    >>> loss.weight.grad.shape
    torch.Size([10, 64])
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        *,
        scale: float = 64.0,
        lower_margin: float = 0.45,
        upper_margin: float = 0.8,
        lower_length: float = 10.0,
        upper_length: float = 110.0,
        regularizer: float = 35.0,
        beyond_pi: str = "easy",
        **options: Any,
    ) -> None:
        fixed: dict[str, Any] = {"margin": 0.0, "margin_type": "angular"}
        super().__init__(num_classes, embedding_size, scale=scale, beyond_pi=beyond_pi, **fixed, **options)
        margins = checks.number("lower_margin", lower_margin), checks.number("upper_margin", upper_margin)
        if not 0 <= margins[0] <= margins[1] <= math.pi:
            raise ValueError(
                "lower_margin, upper_margin: expected radians in ascending order within [0, pi], got "
                f"{lower_margin} and {upper_margin}; degrees become radians by math.radians"
            )
        bounds = (
            checks.positive_number("lower_length", lower_length),
            checks.positive_number("upper_length", upper_length),
        )
        if not bounds[0] < bounds[1]:
            raise ValueError(
                f"lower_length, upper_length: expected ascending numbers, got {lower_length} and {upper_length}"
            )
        self.lower_margin, self.upper_margin = margins
        self.lower_length, self.upper_length = bounds
        self.regularizer = checks.number("regularizer", regularizer)
        if not 0 <= self.regularizer < float("inf"):
            raise ValueError(f"regularizer: expected a number of at least 0, got {regularizer}")

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        check_device(embeddings, self.weight)
        a = lengths(embeddings).clamp(self.lower_length, self.upper_length)
        slope = (self.upper_margin - self.lower_margin) / (self.upper_length - self.lower_length)
        loss = self._softmax(embeddings, labels, margin=self.lower_margin + slope * (a - self.lower_length))
        counted = self._counted(labels)
        g = torch.where(counted, a[:, 0] / self.upper_length**2 + 1 / a[:, 0], 0.0)
        return loss + self.regularizer * reduce_loss(
            g, counted.to(g.dtype), checks.choice("reduction", self.reduction, Reduction)
        )


class ElasticFaceLoss(_OfSamples):
    """Margins drawn from a normal distribution, anew for each sample at each step.

        z_{y_i} = s cos(theta_{i,y_i} + m_i)  or  s (cos theta_{i,y_i} - m_i),   m_i ~ N(m, std)

    Args:
        num_classes: C. embedding_size: D. scale: s.
        margin_type: "angular" (ElasticFace-Arc) or "additive" (ElasticFace-Cos).
        margin: m, in radians or in units of cosine; None for the authors' 0.5 or 0.35.
        std: at least 0, in the units of m; at most pi where those are radians.
        plus: ElasticFace+: the drawn margins are sorted, and of the batch's samples the nearest to its class weight
            gets the smallest.
        generator: draws the margins; None for torch's global one. torch.compile takes only None.
        options: as for `MarginSoftmaxLoss`.

    Attributes: weight: (C, D) parameter.

    Call, raises: as `MarginSoftmaxLoss`. In evaluation mode every margin is m. RuntimeError: with a generator, in
    training mode within a backward, as by activation checkpointing.

    Gradients: embeddings, weight and a scale that learns.

    Source: Boutros et al., ElasticFace: Elastic margin loss for deep face recognition, 2022, eqs. 6 to 8 and the
    paragraph on ElasticFace+; in their code the sorted margins meet the samples' order instead of their ranks.

    >>> import torch
    >>> from fused_margins import ElasticFaceLoss
    >>> loss = ElasticFaceLoss(num_classes=10, embedding_size=64, generator=torch.Generator().manual_seed(0))
    >>> loss(torch.randn(8, 64), torch.randint(0, 10, (8,))).backward()
    >>> loss.margin
    0.5
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        *,
        scale: float = 64.0,
        margin_type: str = "angular",
        margin: float | None = None,
        std: float = 0.0125,
        plus: bool = False,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        checks.one_of("margin_type", margin_type, ("angular", "additive"))
        if margin is None:
            margin = 0.5 if margin_type == "angular" else 0.35
        super().__init__(num_classes, embedding_size, scale=scale, margin=margin, margin_type=margin_type, **options)
        self.std = checks.number("std", std)
        if not 0 <= self.std < float("inf"):
            raise ValueError(f"std: expected a number of at least 0, got {std}")
        if margin_type == "angular" and self.std > math.pi:
            raise ValueError(f"std: expected radians of at most pi, got {std}; math.radians converts degrees")
        self.plus, self.generator = checks.flag("plus", plus), checks.generator(generator)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        if not self.training:
            return self._softmax(embeddings, labels)
        check_device(embeddings, self.weight)
        checks.matrices(embeddings, embeddings, ("embeddings", "embeddings"), autocast=False)
        if embeddings.shape[1] != self.embedding_size:
            raise ValueError(f"embeddings: expected width {self.embedding_size}, got {embeddings.shape[1]}")
        checks.labels("labels", labels, embeddings.shape[0], embeddings)
        if self.generator is not None and not torch.compiler.is_compiling():
            checks.not_in_a_backward("ElasticFaceLoss with a generator")
        return self._softmax(embeddings, labels, margin=self._drawn(embeddings.detach(), labels)[:, None])

    @torch.no_grad()
    def _drawn(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """(B,) margins of the samples."""
        source = embeddings.device if self.generator is None else self.generator.device
        drawn = torch.empty(embeddings.shape[0], device=source).normal_(generator=self.generator).to(embeddings.device)
        margin = self.margin + self.std * drawn
        if not self.plus:
            return margin
        # Those that are ignored come last in both orders, so that the others share the margins among themselves.
        counted, own = self._counted(labels), take_rows(self.weight, labels).to(embeddings.dtype)
        u = torch.where(counted, pair_similarity(embeddings, own, Similarity.COSINE), -torch.inf)
        ascending = torch.where(counted, margin, torch.inf).sort().values
        of_sample = torch.empty_like(margin).scatter_(0, u.argsort(descending=True, stable=True), ascending)
        return torch.where(counted, of_sample, 0.0)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, std={self.std:g}, plus={self.plus}"


class SphereFaceLoss(MarginSoftmaxLoss):
    """Softmax with an integer multiple of the angle to the own class; samples keep their length, weights do not.

        z_j = s |x_i| cos(theta_ij)  (j != y_i),   z_{y_i} = s |x_i| ((-1)^k cos(m theta_{i,y_i}) - 2 k)

    with k such that m theta lies within [k pi, (k + 1) pi]: falling all the way from angle 0 to pi.

    Args:
        num_classes: C. embedding_size: D.
        margin: m, an integer of at least 1; no angle, but what multiplies one.
        scale: s.
        options: as for `MarginSoftmaxLoss`.

    Attributes: weight: (C, D) parameter.

    Call, raises: as `MarginSoftmaxLoss`.

    Gradients: embeddings, also through their length, weight and a scale that learns.

    Source: Liu et al., SphereFace: Deep hypersphere embedding for face recognition, 2017, eq. 7 and the function that
    follows it; without the annealing of the authors' code. Arguments and numbers are those of pytorch-metric-learning.

    >>> import torch
    >>> from fused_margins import SphereFaceLoss
    >>> loss = SphereFaceLoss(num_classes=10, embedding_size=64)
    >>> loss(torch.randn(8, 64), torch.randint(0, 10, (8,))).backward()
    >>> loss.weight.grad.shape
    torch.Size([10, 64])
    """

    def __init__(
        self, num_classes: int, embedding_size: int, margin: int = 4, scale: float = 1.0, **options: Any
    ) -> None:
        multiplier = checks.integer("margin", margin, 1, 1000)
        fixed: dict[str, Any] = {"margin_type": "combined", "angular_multiplier": float(multiplier)}
        super().__init__(num_classes, embedding_size, scale=scale, **fixed, **options)
        self.multiplier = multiplier

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        check_device(embeddings, self.weight)
        return self._softmax(embeddings, labels, scale=self._scales(embeddings))

    def _scales(self, embeddings: Tensor) -> Tensor:
        """s |x_i| (B, 1); a zero vector has the smallest there is, as a scale is positive."""
        scale = self.scale * lengths(embeddings)
        return scale.clamp(min=torch.finfo(scale.dtype).tiny)

    def predictions(self, embeddings: Tensor) -> Tensor:
        """Logits (B, C) without the margin: s |x_i| cos(theta_ij)."""
        return margin_logits(embeddings, self.weight, scale=self._scales(embeddings), backend=self.backend)

    def to_linear(self) -> LinearHead:
        """`predictions` as a module of plain torch: products with the weights brought to unit length."""
        unit = linear_head(self.weight, 1.0, "cosine").linear.weight
        return linear_head(unit, self.scale, "dot")

    def extra_repr(self) -> str:
        sizes = f"num_classes={self.num_classes}, embedding_size={self.embedding_size}, margin={self.multiplier}"
        scale = float(torch.as_tensor(self.scale).detach())
        return f"{sizes}, scale={scale:g}, label_smoothing={self.label_smoothing:g}, backend={self.backend!r}"
