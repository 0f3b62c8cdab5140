"""The heads of insightface's `arcface_torch` on fused kernels: change the import, and nothing else.

`ArcFace`, `CosFace` and `CombinedMarginLoss` are functions of cosines, as theirs, and serve in their `PartialFC_V2` as
its `margin_loss`. `PartialFC_V2` with one of the three makes no matrix of cosines at all. insightface is not needed.

Source: https://github.com/deepinsight/insightface, recognition/arcface_torch, `losses.py` and `partial_fc_v2.py`.

>>> import torch
>>> from fused_margins.compat.insightface import CosFace, PartialFC_V2
>>> head = PartialFC_V2(CosFace(s=64.0, m=0.4), embedding_size=8, num_classes=100)
>>> head(torch.randn(4, 8), torch.tensor([3, 1, 4, 1])).backward()
>>> head.weight.grad.shape
torch.Size([100, 8])
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..core import checks
from ..core.enums import Reduction
from ..core.indices import ABSENT, IGNORED, INVALID, UNADMITTED, check_index
from ..core.ranks import num_ranks, own_rank, together
from ..core.reductions import log_odds, masked_logsumexp, reduce_loss, softplus
from ..core.similarity import accumulation_dtype, unit_rows
from ..functional import margin_logits
from ..losses.heads import check_device
from ..ops.contrast.op import Contrast, contrast
from .calls import is_hooked

__all__ = ["ArcFace", "CombinedMarginLoss", "CosFace", "PartialFC_V2"]


class _Head(nn.Module):
    """Scaled logits, with a margin on the own class's; what the margin is, is `psi` of a subclass."""

    s: float
    interclass_filtering_threshold: float = 0.0

    def psi(self, u: Tensor) -> Tensor:
        """What becomes of the cosines (n,) of samples with their own class."""
        raise NotImplementedError

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        checks.matrices(logits, logits, ("logits", "logits"), autocast=False)
        of_row = _vector("labels", labels, logits)
        of_row = check_index(of_row, logits.shape[1], IGNORED, "labels")
        if not logits.shape[1]:
            return logits * self.s
        column, here = of_row.clamp(min=0)[:, None], of_row[:, None] != IGNORED
        u = logits.gather(1, column)
        moved = self.psi(u.to(accumulation_dtype(u.dtype))).to(u.dtype)
        moved = torch.where(of_row[:, None] == INVALID, torch.nan, torch.where(here, moved, u))
        if self.interclass_filtering_threshold > 0:
            too_near = logits > self.interclass_filtering_threshold
            too_near = too_near.scatter(1, column, too_near.gather(1, column) & ~here)
            logits = torch.where(too_near, 0.0, logits)
            moved = torch.where(here, moved, logits.gather(1, column))
        return logits.scatter(1, column, moved) * self.s


def _vector(argument: str, labels: Tensor, x: Tensor) -> Tensor:
    """(B,) labels of (B,) or (B, 1)."""
    if isinstance(labels, Tensor) and labels.dim() == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    checks.labels(argument, labels, x.shape[0], x)
    return labels.long()


def _shifted(u: Tensor, margin: float) -> Tensor:
    """cos(theta + margin), whose derivative is taken as 1; finite for cosines that rounding brought beyond 1."""
    v = u.detach()
    v = v * math.cos(margin) - ((1 - v) * (1 + v)).clamp(min=0).sqrt() * math.sin(margin)
    return u + (v - u.detach())


class ArcFace(_Head):
    """Additive angular margin, as insightface has it: straight through, and turning back beyond pi.

        z_{y_i} = s cos(theta_{i,y_i} + m),   d z_{y_i} / d cos(theta_{i,y_i}) = s

    Args:
        s: the scale, positive.
        margin: m in radians.

    Call: head(logits (B, C) of cosines, labels (B,) or (B, 1), -1 for a class that is not among the columns) gives the
    logits (B, C), scaled, in the dtype of the cosines. Neither argument is written to, as theirs does to both.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, a margin beyond pi. IndexError: a label out of range.

    Gradients: logits.

    Source: Deng et al., ArcFace: Additive angular margin loss for deep face recognition, 2019, eq. 3.

    >>> import torch
    >>> from fused_margins.compat.insightface import ArcFace
    >>> ArcFace(s=64.0, margin=0.5)(torch.tensor([[1.0, 0.0], [0.0, 0.5]]), torch.tensor([0, -1]))
    tensor([[56.1653,  0.0000],
            [ 0.0000, 32.0000]])
    """

    def __init__(self, s: float = 64.0, margin: float = 0.5) -> None:
        super().__init__()
        self.s, self.margin = checks.positive_number("s", s), _radians("margin", margin)

    def psi(self, u: Tensor) -> Tensor:
        return _shifted(u, self.margin)

    def extra_repr(self) -> str:
        return f"s={self.s:g}, margin={self.margin:g}"


class CosFace(_Head):
    """Additive margin on the cosine, as insightface has it.

        z_{y_i} = s (cos(theta_{i,y_i}) - m)

    Args:
        s: the scale, positive. m: in units of cosine, of any sign.

    Call, raises, gradients: as `ArcFace`, with the exact gradient.

    Source: Wang et al., CosFace: Large margin cosine loss for deep face recognition, 2018, eq. 4.

    >>> import torch
    >>> from fused_margins.compat.insightface import CosFace
    >>> CosFace(s=10.0, m=0.4)(torch.tensor([[1.0, 0.0], [0.0, 0.5]]), torch.tensor([0, -1]))
    tensor([[6., 0.],
            [0., 5.]])
    """

    def __init__(self, s: float = 64.0, m: float = 0.40) -> None:
        super().__init__()
        self.s, self.m = checks.positive_number("s", s), checks.finite_number("m", m)

    def psi(self, u: Tensor) -> Tensor:
        return u - self.m

    def extra_repr(self) -> str:
        return f"s={self.s:g}, m={self.m:g}"


class CombinedMarginLoss(_Head):
    """ArcFace where m1 = 1 and m3 = 0, CosFace where m3 > 0, and no other combination, as insightface has it.

        m1 = 1, m3 = 0:   z_{y_i} = s cos(theta_{i,y_i} + m2), straight through
        m3 > 0:           z_{y_i} = s (cos(theta_{i,y_i}) - m3); m1 and m2 are ignored

    Args:
        s: the scale, positive. m1, m2, m3: above; m2 in radians. `fused_margins.MarginSoftmaxLoss` with `margin_type`
            "combined" takes all three together, which theirs refuses when it is called.
        interclass_filtering_threshold: above 0, cosines with other classes that exceed it are set to 0, as those of
            noisy labels.

    Call, raises, gradients: as `ArcFace`; for m3 > 0 the exact gradient.

    Source: Deng et al., ArcFace, 2019, eq. 4; An et al., Killing two birds with one stone: Efficient and robust
    training of face recognition CNNs by Partial FC, 2022, the filtering.

    >>> import torch
    >>> from fused_margins.compat.insightface import CombinedMarginLoss
    >>> head = CombinedMarginLoss(16.0, 1.0, 0.0, 0.25, interclass_filtering_threshold=0.8)
    >>> head(torch.tensor([[1.0, 0.9], [0.5, 0.75]]), torch.tensor([0, 1]))
    tensor([[12.,  0.],
            [ 8.,  8.]])
    """

    def __init__(self, s: float, m1: float, m2: float, m3: float, interclass_filtering_threshold: float = 0) -> None:
        super().__init__()
        self.s = checks.positive_number("s", s)
        self.m1, self.m2, self.m3 = (checks.finite_number(n, m) for n, m in (("m1", m1), ("m2", m2), ("m3", m3)))
        if self.m3 <= 0 and (self.m1, self.m3) != (1, 0):
            raise ValueError(
                f"m1, m3: expected m1 = 1 with m3 = 0 (ArcFace) or m3 > 0 (CosFace), got m1 = {m1} with m3 = {m3}; "
                "fused_margins.MarginSoftmaxLoss with margin_type='combined' takes any"
            )
        if self.m3 == 0:
            _radians("m2", m2)
        threshold = checks.finite_number("interclass_filtering_threshold", interclass_filtering_threshold)
        self.interclass_filtering_threshold = threshold

    def psi(self, u: Tensor) -> Tensor:
        return u - self.m3 if self.m3 > 0 else _shifted(u, self.m2)

    def extra_repr(self) -> str:
        margins = f"s={self.s:g}, m1={self.m1:g}, m2={self.m2:g}, m3={self.m3:g}"
        return f"{margins}, interclass_filtering_threshold={self.interclass_filtering_threshold:g}"


def _radians(argument: str, value: float) -> float:
    if not abs(checks.number(argument, value)) <= math.pi:
        raise ValueError(
            f"{argument}: expected radians within [-pi, pi], got {value}; degrees become radians by math.radians"
        )
    return float(value)


class PartialFC_V2(nn.Module):
    """Class centres, and the cross entropy of the logits that a head makes of cosines with them; maybe with some alone.

        loss = mean_i -log softmax_j(z_ij)_{y_i},   z = margin_loss(cos(x, w), y)

    With exactly one of this module's three heads, and no filtering, the loss is made from two vectors of the op
    `contrast`, and no matrix (B, C) exists; another callable gets the matrix. In a process group every rank has classes
    of its own, as theirs has: C // W, one more on the first C mod W of W ranks; and the loss is the mean over the rows
    of all ranks, the same on each, with W times its gradient for the embeddings, which DDP divides by W. It runs
    without a process group too, without CUDA if there is none, and on batches of any sizes. Theirs cannot return the
    loss of a sample above 69.08, this can; a label that is no class is an error, where theirs pushes the sample away
    from every class.

    Args:
        margin_loss: takes cosines (B, C) and labels (B, 1) and gives scaled logits (B, C).
        embedding_size: D. num_classes: C.
        sample_rate: r in (0, 1]; below 1 a step uses the centres of the batch's classes and, drawn at random, as many
            others as make int(r C) together, if that many are left. torch's global generator of the CPU draws.
        fp16: cosines of unit embeddings and centres that are rounded to float16.

    Attributes:
        weight: (C_local, D) parameter, the class centres of this rank. It is all that the state dict holds, as theirs,
            so that a file of a rank loads; `fused_margins.compat.convert` joins those of several, and
            `load_partial_fc` reads them into a loss of any number of ranks.
        weight_index: of the last sampled step, the centres that it used, ascending.

    Call: head(embeddings (B, D), labels (B,) or (B, 1) integers in [0, C)) gives a scalar.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, a sample rate out of range. IndexError: a label out of range.
        Those of one rank are raised on all, with its number; so are options, dtypes and gradients that differ.

    Gradients: embeddings and weight (dense, (C, D), also where centres are sampled).

    Source: An et al., Killing two birds with one stone: Efficient and robust training of face recognition CNNs by
    Partial FC, 2022, section 3.

    >>> import torch
    >>> from fused_margins.compat.insightface import CombinedMarginLoss, PartialFC_V2
    >>> head = PartialFC_V2(CombinedMarginLoss(64.0, 1.0, 0.5, 0.0), 8, 100, sample_rate=0.1)
    >>> loss = head(torch.randn(4, 8), torch.tensor([[3], [1], [4], [1]]))
    >>> len(head.weight_index), bool(torch.isin(torch.tensor([1, 3, 4]), head.weight_index).all())
    (10, True)
    """

    _version = 2
    weight_index: Tensor

    def __init__(
        self,
        margin_loss: Callable[[Tensor, Tensor], Tensor],
        embedding_size: int,
        num_classes: int,
        sample_rate: float = 1.0,
        fp16: bool = False,
    ) -> None:
        super().__init__()
        with together("PartialFC_V2") as own:
            if not callable(margin_loss):
                got = type(margin_loss).__name__
                raise TypeError(f"margin_loss: expected a callable of cosines and labels, got {got}")
            self.margin_softmax = margin_loss
            self.embedding_size = checks.integer("embedding_size", embedding_size, 1)
            self.num_classes = checks.integer("num_classes", num_classes, 1)
            rank, ranks = own_rank(), num_ranks()
            of_each, more = divmod(self.num_classes, ranks)  # one more on each of the first ranks
            self.num_local, self.class_start = of_each + (rank < more), of_each * rank + min(rank, more)
            self.sample_rate, self.fp16 = checks.number("sample_rate", sample_rate), checks.flag("fp16", fp16)
            if not 0 < self.sample_rate <= 1:
                raise ValueError(f"sample_rate: expected a number in (0, 1], got {sample_rate}")
            own.same = {"embedding_size": embedding_size, "num_classes": num_classes, "sample_rate": self.sample_rate}
            own.same |= {"fp16": fp16, "margin_loss": str(margin_loss) if isinstance(margin_loss, _Head) else None}
        self.num_sample = int(self.sample_rate * self.num_local)
        self.weight = nn.Parameter(torch.empty(self.num_local, self.embedding_size))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The centres drawn anew, as theirs are."""
        nn.init.normal_(self.weight, std=0.01)

    def forward(self, local_embeddings: Tensor, local_labels: Tensor) -> Tensor:
        embeddings, labels, group = self._rows(local_embeddings, local_labels)
        weight: Tensor = self.weight
        here = (labels >= self.class_start) & (labels < self.class_start + self.num_local)
        column = torch.where(here, labels - self.class_start, torch.where(labels < 0, labels, ABSENT))
        if self.sample_rate < 1:
            self.weight_index = self._sampled(column)
            weight, at = weight[self.weight_index], torch.searchsorted(self.weight_index, column)
            column = torch.where(column < 0, column, at)
        embeddings = embeddings.to(weight.dtype)
        if self.fp16:  # unit rows, as theirs rounds them: others may be beyond what 16 bits hold
            embeddings, weight = (unit_rows(t).half() for t in (embeddings, weight))
        with torch.autocast(embeddings.device.type, enabled=False):
            head = self.margin_softmax
            z, negative_lse = (_fused if _is_plain(head) else _by_matrix)(head, embeddings, weight, column)
            if group is not None:
                negative_lse, z = group.combine(negative_lse, z)
        counted = labels != IGNORED
        loss = torch.where(counted, softplus(log_odds(negative_lse, z)), 0.0)
        return reduce_loss(loss, counted.to(loss.dtype), Reduction.MEAN)

    def _rows(self, local_embeddings: Tensor, local_labels: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Rows and labels of all ranks, checked, and the exchanges between ranks, None in one process."""
        with together("forward") as own:
            check_device(local_embeddings, self.weight)
            names = ("local_embeddings", "local_embeddings")
            checks.matrices(local_embeddings, local_embeddings, names, autocast=False)
            own.rows, width = local_embeddings.shape
            if width != self.embedding_size:
                raise ValueError(f"local_embeddings: expected width {self.embedding_size} as weight has, got {width}")
            labels = _vector("local_labels", local_labels, local_embeddings)
            # -1 is no label here: it is that of a class that lives elsewhere, and there is no elsewhere.
            labels = check_index(labels, self.num_classes, UNADMITTED, "local_labels")
            learns = torch.is_grad_enabled() and local_embeddings.requires_grad
            own.same = {"dtype of local_embeddings": local_embeddings.dtype, "a gradient of local_embeddings": learns}
        if num_ranks() == 1:
            return local_embeddings, labels, None
        from ..distributed import collectives  # on demand: it imports DTensor

        labels = collectives.gather_rows(labels, own.counts)
        # As theirs: DDP will divide the backbone's gradient by as many.
        local_embeddings = collectives.scale_gradient(local_embeddings, num_ranks())
        return collectives.gather_rows(local_embeddings, own.counts), labels, collectives

    @torch.no_grad()
    def _sampled(self, labels: Tensor) -> Tensor:
        """The classes of a step, ascending: those of the batch, and others at random up to `num_sample`."""
        of_batch = labels[labels >= 0].unique()
        if len(of_batch) >= self.num_sample:
            return of_batch
        drawn = torch.rand(self.num_local, device="cpu").to(labels.device)
        drawn[of_batch] = 2.0  # before every other
        return drawn.topk(self.num_sample).indices.sort().values

    def extra_repr(self) -> str:
        sizes = f"embedding_size={self.embedding_size}, num_classes={self.num_local}"
        return f"{sizes}, sample_rate={self.sample_rate:g}, fp16={self.fp16}"


def _is_plain(head: Any) -> bool:
    """Whether a callable is one of the three heads, with nothing that looks at single cosines."""
    if type(head) not in _HEADS or head.interclass_filtering_threshold > 0:
        return False
    return not is_hooked(head) and not vars(head).keys() & {"forward", "psi"}


def _fused(head: Any, x: Tensor, weight: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """The logit (B,) of each row's own class, and the log-sum-exp (B,) of its others, without a matrix of cosines."""
    names = {"x": "local_embeddings", "y": "weight", "target": "local_labels"}
    u, negative_lse = contrast.run(Contrast(x, weight, column, scale=head.s), "auto", names, valid=False)
    return torch.where(column == ABSENT, 0.0, head.s * head.psi(u)), negative_lse


def _by_matrix(head: Any, x: Tensor, weight: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """The same by any callable of cosines; -1 is its label for a class that is not among the columns."""
    cosines = margin_logits(x, weight, scale=1.0).to(accumulation_dtype(x.dtype)).clamp(-1, 1)
    here = column >= 0
    z = head(cosines, torch.where(here, column, -1)[:, None]).to(cosines.dtype)
    own = (torch.arange(z.shape[1], device=z.device) == column[:, None]) & here[:, None]
    return torch.where(column == INVALID, torch.nan, torch.where(own, z, 0.0).sum(1)), masked_logsumexp(z, ~own)


_HEADS = (ArcFace, CombinedMarginLoss, CosFace)
