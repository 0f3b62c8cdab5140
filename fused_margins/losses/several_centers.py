"""Heads whose classes have several centers."""

import math

from ..core import checks
from .margin_softmax import MarginSoftmaxLoss


class SubCenterArcFaceLoss(MarginSoftmaxLoss):
    """ArcFace with several centers a class, of which the most similar one counts: noisy samples find one of their own.

        u_ij = max_k cos(x_i, w_jk),   z_j = s u_ij  (j != y_i),   z_{y_i} = s cos(arccos(u_{i,y_i}) + m)

    Args:
        num_classes: C. embedding_size: D.
        margin: m in degrees, as pytorch-metric-learning's class of this name takes it (`ArcFaceLoss` takes radians).
        scale: s. sub_centers: K.
        others: as `MarginSoftmaxLoss`.

    Attributes, call, raises, gradients: as `MarginSoftmaxLoss`; the weight is (C, K, D).

    Source: Deng et al., Sub-center ArcFace: Boosting face recognition by large-scale noisy web faces, 2020, eq. 3.

    >>> import torch
    >>> from fused_margins import SubCenterArcFaceLoss
    >>> loss = SubCenterArcFaceLoss(num_classes=10, embedding_size=64)
    >>> loss(torch.randn(8, 64), torch.randint(0, 10, (8,))).backward()
    >>> loss.weight.grad.shape
    torch.Size([10, 3, 64])
    """

    def __init__(  # type: ignore[no-untyped-def]
        self,
        num_classes: int,
        embedding_size: int,
        *,
        margin: float = 28.6,
        scale: float = 64.0,
        sub_centers: int = 3,
        **options,
    ) -> None:
        options |= {"centers_per_class": checks.integer("sub_centers", sub_centers, 1), "margin_type": "angular"}
        margin_rad = math.radians(checks.number("margin", margin))
        super().__init__(num_classes, embedding_size, scale=scale, margin=margin_rad, **options)


class SoftTripleLoss(MarginSoftmaxLoss):
    """Softmax over several centers a class, of which those that are near a sample count most.

        h_ij = sum_k softmax_k(cos(x_i, w_jk) / gamma) cos(x_i, w_jk)
        z_j = la h_ij  (j != y_i),   z_{y_i} = la (h_{i,y_i} - margin)

    The paper's penalty on centers of a class that are apart is left out.

    Args:
        num_classes: C. embedding_size: D.
        centers_per_class: K. la: lambda, the scale. gamma: > 0. margin: delta.
        others: as `MarginSoftmaxLoss`.

    Attributes, call, raises, gradients: as `MarginSoftmaxLoss`; the weight is (C, K, D).

    Source: Qian et al., SoftTriple loss: Deep metric learning without triplet sampling, 2019, eq. 7 and 8.

    >>> from fused_margins import SoftTripleLoss
    >>> SoftTripleLoss(num_classes=10, embedding_size=64).weight.shape
    torch.Size([10, 10, 64])
    """

    def __init__(  # type: ignore[no-untyped-def]
        self,
        num_classes: int,
        embedding_size: int,
        *,
        centers_per_class: int = 10,
        la: float = 20.0,
        gamma: float = 0.1,
        margin: float = 0.01,
        **options,
    ) -> None:
        checks.positive_number("la", la)
        temperature = checks.positive_number("gamma", gamma) if centers_per_class != 1 else 0.0  # of one its mean is it
        options |= {"centers_per_class": centers_per_class, "center_temperature": temperature}
        super().__init__(num_classes, embedding_size, scale=la, margin=margin, **options)
