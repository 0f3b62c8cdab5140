"""Losses on proxies: a vector a class that learns, in the place of the class's samples."""

from typing import Any

import torch
from torch import Tensor, nn

from ..backends import registry
from ..core import checks
from ..core.enums import Reduction, Similarity
from ..core.indices import INVALID, UNADMITTED, check_index
from ..core.reductions import softplus
from ..core.similarity import pair_similarity, take_rows
from ..functional import margin_logits
from ..ops.contrast.op import Contrast, contrast
from .heads import LinearHead, check_device, linear_head
from .margin_softmax import MarginSoftmaxLoss


class ProxyNCALoss(MarginSoftmaxLoss):
    """Softmax over negative squared distances of unit vectors to proxies, which is one over cosines of twice the scale.

        loss_i = -log softmax_j(-c |x_i - w_j|^2)_{y_i} = -log softmax_j(2 c cos(x_i, w_j))_{y_i}

    The own proxy is part of the sum, as in pytorch-metric-learning and in ProxyNCA++; the source leaves it out.

    Args:
        num_classes: C. embedding_size: D.
        softmax_scale: c > 0, in units of inverse squared distance.
        options: as for `MarginSoftmaxLoss`, but for the scale, which is 2 c.

    Attributes: weight: (C, D) parameter, the proxies.

    Call, raises, gradients: as `MarginSoftmaxLoss`.

    Source: Movshovitz-Attias et al., No fuss distance metric learning using proxies, 2017, eq. 5; Teh et al.,
    ProxyNCA++, 2020, eq. 5. Arguments and numbers are those of pytorch-metric-learning.

    >>> from fused_margins import ProxyNCALoss
    >>> ProxyNCALoss(num_classes=10, embedding_size=64).scale
    2.0
    """

    def __init__(self, num_classes: int, embedding_size: int, *, softmax_scale: float = 1.0, **options: Any) -> None:
        scale = 2 * checks.positive_number("softmax_scale", softmax_scale)
        super().__init__(num_classes, embedding_size, scale=scale, **options)


class ProxyAnchorLoss(nn.Module):
    """Every proxy against the whole batch: soft maxima over its samples that are far and over the others that are near.

        loss = mean_{c in batch} log(1 + sum_{i: y_i = c} exp(-alpha (u_ic - m)))
             + mean_c log(1 + sum_{i: y_i != c} exp(alpha (u_ic + m))),   u_ic = cos(x_i, w_c)

    The first mean is over classes that the batch has, the second over all C.

    Args:
        num_classes: C. embedding_size: D.
        margin: m, in units of cosine. alpha: positive, in units of inverse cosine.
        ignore_index: label of samples that count for nothing; so does -2**63, which is reserved.
        reduction: "mean", the sum of both means; "sum", of all terms; or "none", both terms of each class, (C,).
        backend: "auto", or the name of one; see `fused_margins.explain`.

    Attributes: weight: (C, D) parameter, the proxies.

    Call: loss(embeddings (B, D), labels (B,) integers) gives a scalar, or (C,) for reduction "none".

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, unknown names, an alpha that is not positive.
        IndexError: a label out of range (on a GPU the loss is NaN).

    Gradients: embeddings and weight.

    Source: Kim et al., Proxy anchor loss for deep metric learning, 2020, eq. 4. Arguments and numbers are those of
    pytorch-metric-learning.

    >>> import torch
    >>> from fused_margins import ProxyAnchorLoss
    >>> loss = ProxyAnchorLoss(num_classes=10, embedding_size=64)
    >>> loss(torch.randn(8, 64), torch.randint(0, 10, (8,))).backward()
    >>> loss.weight.grad.shape
    torch.Size([10, 64])
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 0.1,
        alpha: float = 32.0,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.num_classes = checks.integer("num_classes", num_classes, 1)
        self.embedding_size = checks.integer("embedding_size", embedding_size, 1)
        self.margin, self.alpha = checks.number("margin", margin), checks.positive_number("alpha", alpha)
        self.ignore_index = checks.integer("ignore_index", ignore_index)
        checks.choice("reduction", reduction, Reduction)
        self.reduction, self.backend = reduction, registry.known(backend)
        self.weight = nn.Parameter(torch.empty(self.num_classes, self.embedding_size))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The proxies drawn anew, of about unit length."""
        nn.init.normal_(self.weight, std=self.embedding_size**-0.5)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        check_device(embeddings, self.weight)
        embeddings, weight = checks.matrices(embeddings, self.weight, ("embeddings", "weight"))
        checks.labels("labels", labels, embeddings.shape[0], embeddings)
        of_sample = torch.where(labels.long() == UNADMITTED, self.ignore_index, labels.long())
        of_sample = check_index(of_sample, self.num_classes, self.ignore_index, "labels")
        counted, own = of_sample >= 0, of_sample.clamp(min=0)
        u = pair_similarity(embeddings, take_rows(weight, own), Similarity.COSINE)
        far = softplus(_log_sum_exp_by(own, torch.where(counted, self.alpha * (self.margin - u), -torch.inf), weight))
        near = softplus(self._others(embeddings, weight, torch.where(counted, of_sample, UNADMITTED)))
        far = torch.where((of_sample == INVALID).any(), torch.nan, far)
        reduction = checks.choice("reduction", self.reduction, Reduction)
        if reduction == Reduction.NONE:
            return far + near
        if reduction == Reduction.SUM:
            return far.sum() + near.sum()
        present = own.new_zeros(self.num_classes).index_add(0, own, counted.long()) > 0
        return far.sum() / present.sum().clamp(min=1) + near.mean()

    def _others(self, embeddings: Tensor, weight: Tensor, of_sample: Tensor) -> Tensor:
        """For every proxy (C,) the log-sum-exp of alpha (u + margin) over the samples of other classes."""
        classes = torch.arange(self.num_classes, device=weight.device)
        target = torch.full_like(classes, 0 if embeddings.shape[0] else -1)  # any will do
        call = Contrast(weight, embeddings, target, classes, of_sample, None, self.alpha)
        return contrast.run(call, self.backend, valid=False)[1] + self.alpha * self.margin

    def predictions(self, embeddings: Tensor) -> Tensor:
        """Logits (B, C): alpha times the cosines with the proxies."""
        return margin_logits(embeddings, self.weight, scale=self.alpha, backend=self.backend)

    def to_linear(self) -> LinearHead:
        """`predictions` as a module of plain torch; see `MarginSoftmaxLoss.to_linear`."""
        return linear_head(self.weight, self.alpha, "cosine")

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, embedding_size={self.embedding_size}, margin={self.margin:g}, "
            f"alpha={self.alpha:g}, reduction={self.reduction!r}, backend={self.backend!r}"
        )


def _log_sum_exp_by(group: Tensor, z: Tensor, like: Tensor) -> Tensor:
    """(G,) of the values z (n,) of each group, G the rows of `like`; -inf for a group whose values are all that."""
    size = like.shape[0]
    peak = z.new_full((size,), -torch.inf).scatter_reduce(0, group, z.detach(), "amax")
    peak = torch.where(peak == -torch.inf, 0.0, peak)
    total = z.new_zeros(size).index_add(0, group, (z - peak[group]).exp())
    empty = total == 0
    return torch.where(empty, -torch.inf, torch.where(empty, 1.0, total).log() + peak)
