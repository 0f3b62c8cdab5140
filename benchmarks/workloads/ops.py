"""Every op of the registry at the sizes of its ``cases.py``, on every backend, beside the usual PyTorch code where it
is written here."""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_margins.backends import registry
from fused_margins.ops import cases

from ..correctness import check_values
from ..implementations import Function, forward_backward, ours, usual
from ..workload import Inputs, Outputs, Size, Step, Workload


def eager_contrast(x: Tensor, y: Tensor, target: Tensor, scale: float) -> Outputs:
    z = F.linear(scale * F.normalize(x), F.normalize(y))
    own = target[:, None]
    return {"positive": z.gather(1, own)[:, 0] / scale, "negative_lse": z.scatter(1, own, -torch.inf).logsumexp(1)}


def eager_nearest(
    x: Tensor, y: Tensor, row_labels: Tensor, column_labels: Tensor, relation: str, self_index: Tensor
) -> Outputs:
    same = row_labels[:, None] == column_labels
    closed = ~same if relation == "same" else same
    u = F.linear(F.normalize(x), F.normalize(y)).masked_fill(closed, -torch.inf)
    similarity, index = u.scatter(1, self_index[:, None], -torch.inf).max(1, keepdim=True)
    return {"similarity": similarity, "index": torch.where(similarity > -torch.inf, index, -1)}


def eager_scores(x: Tensor, y: Tensor, target: Tensor, scale: float, margin: float) -> Outputs:
    z = F.linear(scale * F.normalize(x), F.normalize(y))
    taken = z.new_full((1, 1), -scale * margin).expand(len(target), 1)
    return {"scores": z.scatter_add(1, target[:, None], taken)}


# An op without an entry is measured against its reference.
EAGER = {"contrast": eager_contrast, "nearest": eager_nearest, "scores": eager_scores}


def workload(name: str) -> Workload:
    op = cases.load(name)

    def prepare(function: Function, inputs: Inputs) -> Step:
        return forward_backward(lambda arguments: function(**arguments), inputs, op.DIFFERENTIABLE)

    def run(backend: str, **arguments: object) -> Outputs:
        return op.run(arguments, backend)

    def size(shape: cases.Shape) -> Size:
        sizes, large = (shape.rows, shape.width, shape.columns), shape.rows * shape.columns > 2**24
        make = partial(op.make_benchmark, shape)
        return Size(shape.name, sizes, make, large, multiply_adds=op.multiply_adds(shape))

    truth = partial(prepare, partial(run, backend="reference"))
    eager = EAGER.get(name)
    gradients = ", with gradients" if op.DIFFERENTIABLE else ""
    return Workload(
        name,
        f"The op `{name}`{gradients}",
        "B x D x N",
        tuple(size(shape) for shape in op.SHAPES),
        (*(usual(prepare, eager) if eager else ()), *ours(prepare, run)),
        partial(check_values, truth=truth, call=lambda inputs: (name, inputs), observed=op.observed),
        (torch.float32, torch.bfloat16),
    )


# An op that is the whole of what it is for is measured as that, beside its peers.
ELSEWHERE = ("kmeans", "magnet", "sample")
WORKLOADS = tuple(workload(name) for name in registry.OPS if name not in ELSEWHERE)
