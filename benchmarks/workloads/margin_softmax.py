"""Margin softmax and its gradients: additive margins (CosFace, negative margins) and angular ones (ArcFace)."""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from fused_margins.functional import margin_softmax_loss
from fused_margins.ops import registry
from fused_margins.ops.registry import Problem

from ..gate import judge_loss
from ..timing import fastest, waiting_for
from ..workload import (
    Contestant,
    Inputs,
    Outputs,
    Series,
    Size,
    Step,
    Workload,
    auto,
    captured,
    compiled,
    forward_backward,
    on_device,
    ours,
    unless_installed,
)

WRT = ("embeddings", "weight")
SHAPES = (
    ("few_shot", 32, 32, 16),
    ("few_shot", 256, 64, 64),
    ("few_shot", 256, 512, 64),
    ("few_shot", 256, 1600, 200),  # flattened Conv4 features, all classes of CUB
    ("many_classes", 128, 512, 10_000),
    ("huge", 512, 512, 100_000),
)
GPU_SHAPES = (
    ("few_shot", 256, 512, 64),
    ("few_shot", 256, 1600, 200),
    ("many_classes", 1024, 512, 10_000),
    ("many_classes", 1024, 512, 100_000),
    ("million_classes", 1024, 512, 1_000_000),
)
CAPTURED = ("few_shot", "many_classes")  # sizes that a GPU computes about as fast as Python launches them, or faster
BFLOAT16_ONLY = 1_000_000  # classes: the logits alone have 4 GB in float32
TRUTH_AT_ONCE = 1 << 27  # logits in float64: 1 GiB
CHUNK_BYTES = 16 * 2**20  # of logits: they stay in the L2 cache of a large GPU, 40 to 50 MB


def _size(
    name: str, rows: int, width: int, classes: int, margin: float, angular: bool, devices: tuple[str, ...]
) -> Size:
    def make(dtype: torch.dtype, g: Generator) -> Inputs:
        return {
            "embeddings": on_device(rows, width, generator=g).to(dtype),
            "weight": on_device(classes, width, generator=g).to(dtype),
            "labels": torch.randint(classes, (rows,), generator=g, device=g.device),
            "scale": 30.0,
            "margin": margin,
            "margin_type": "angular" if angular else "additive",
        }

    return Size(
        name,
        f"{rows} x {width} x {classes}",
        make,
        large=name == "huge",
        multiply_adds=3 * rows * width * classes,
        devices=devices,
        dtypes=(torch.bfloat16,) if classes >= BFLOAT16_ONLY else None,
    )


def eager_additive(embeddings: Tensor, weight: Tensor, labels: Tensor, scale: float, margin: float, **_: str) -> Tensor:
    # The scale on the embeddings, the margin by scatter_add: the fastest of the usual forms (one-hot, index_put, in
    # place).
    z = F.linear(scale * F.normalize(embeddings), F.normalize(weight))
    z = z.scatter_add(1, labels[:, None], z.new_full((1, 1), -scale * margin).expand(len(labels), 1))
    return F.cross_entropy(z, labels)


def eager_angular(embeddings: Tensor, weight: Tensor, labels: Tensor, scale: float, margin: float, **_: str) -> Tensor:
    cosine = F.linear(F.normalize(embeddings), F.normalize(weight))
    own = cosine.gather(1, labels[:, None])
    sine = (1 - own.square()).clamp(min=1e-12).sqrt()
    shifted = own * math.cos(margin) - sine * math.sin(margin)
    beyond = own - margin * math.sin(margin)  # theta + margin > pi
    shifted = torch.where(own > -math.cos(margin), shifted, beyond)
    return F.cross_entropy(scale * cosine.scatter(1, labels[:, None], shifted), labels)


def _step(function: Callable[..., Tensor], inputs: Inputs) -> Step:
    return forward_backward(lambda arguments: {"loss": function(**arguments)}, inputs, WRT)


def _our_step(inputs: Inputs, backend: str) -> Step:
    return _step(margin_softmax_loss, inputs | {"backend": backend})


def _problem(inputs: Inputs) -> Problem:
    x, y = inputs["embeddings"], inputs["weight"]
    return Problem("margin_softmax", x.device.type, x.dtype, x.shape[0], y.shape[0], x.shape[1])


def truth(inputs: Inputs, entries_at_once: int = TRUTH_AT_ONCE) -> Step:
    """Our step on "reference"; beyond `entries_at_once` logits, of an additive margin, the same formulas in blocks of
    classes."""
    rows, classes = inputs["embeddings"].shape[0], inputs["weight"].shape[0]
    if rows * classes <= entries_at_once or inputs["margin_type"] != "additive":
        return _our_step(inputs, "reference")
    return lambda: _in_blocks(**inputs, block=max(1, entries_at_once // rows))


@torch.no_grad()
def _in_blocks(
    embeddings: Tensor, weight: Tensor, labels: Tensor, scale: float, margin: float, block: int, **_: str
) -> Outputs:
    rows, length = len(embeddings), embeddings.norm(dim=1, keepdim=True)
    x = embeddings / length
    own = scale * ((x * F.normalize(weight[labels])).sum(1) - margin)

    def blocks() -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor]]:
        """Columns, the length and direction of their weights, logits, and which of them are a row's own."""
        for start in range(0, len(weight), block):
            columns = slice(start, start + block)
            lengths = weight[columns].norm(dim=1, keepdim=True)
            y = weight[columns] / lengths
            is_own = labels[:, None] == torch.arange(start, start + len(y), device=labels.device)
            yield columns, lengths, y, torch.where(is_own, own[:, None], scale * x @ y.T), is_own

    lse = torch.full_like(own, -torch.inf)
    for _columns, _lengths, _y, z, _is_own in blocks():
        lse = torch.logaddexp(lse, z.logsumexp(1))
    grad_x, grad_weight = torch.zeros_like(x), torch.empty_like(weight)
    for columns, lengths, y, z, is_own in blocks():
        grad_u = scale / rows * ((z - lse[:, None]).exp() - is_own.double())
        grad_x += grad_u @ y
        grad_weight[columns] = _of_length(grad_u.T @ x, y, lengths)
    return {
        "loss": (lse - own).mean(),
        "grad_embeddings": _of_length(grad_x, x, length),
        "grad_weight": grad_weight,
    }


def _of_length(grad: Tensor, direction: Tensor, length: Tensor) -> Tensor:
    """The gradient of vectors from that of their directions."""
    return (grad - direction * (direction * grad).sum(1, keepdim=True)) / length


def _without_memory(inputs: Inputs) -> Step:
    step = _our_step(inputs, "cpu")

    def within_nothing() -> Outputs:
        with registry.within_memory_budget(0):
            return step()

    return within_nothing


def _linear_cross_entropy(inputs: Inputs) -> Step:
    rows = inputs["embeddings"].shape[0]
    options = torch.nn.LinearCrossEntropyOptions
    candidates = [None, options(), options(batch_chunk_size=rows), options(batch_chunk_size=max(1, rows // 4))]

    def with_options(chosen: torch.nn.LinearCrossEntropyOptions | None) -> Step:
        def loss(embeddings: Tensor, weight: Tensor, labels: Tensor, scale: float, **_: float | str) -> Tensor:
            x, y = scale * F.normalize(embeddings), F.normalize(weight)
            return F.linear_cross_entropy(x, y, labels, options=chosen)

        return _step(loss, inputs)

    return fastest([with_options(chosen) for chosen in candidates], wait=waiting_for(inputs["embeddings"].device.type))


def _normalised(loss_of: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: Inputs) -> Step:
    """The step of a linear cross entropy without margins, `loss_of` embeddings, weight and labels: it gets both sides
    normalised, within its time."""

    def loss(embeddings: Tensor, weight: Tensor, labels: Tensor, scale: float, **_: float | str) -> Tensor:
        return loss_of(scale * F.normalize(embeddings), F.normalize(weight), labels)

    return _step(loss, inputs)


def _cut_cross_entropy(inputs: Inputs, **options: str | None) -> Step:
    from cut_cross_entropy import linear_cross_entropy

    return _normalised(lambda x, y, labels: linear_cross_entropy(x, y, labels, impl="cce", **options), inputs)


def _liger(inputs: Inputs) -> Step:
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction as Fused

    def with_budget(chunk: int | None) -> Step:
        # Of the options that have positions, those between the labels and the chunk's are as they come.
        def loss_of(x: Tensor, y: Tensor, labels: Tensor) -> Tensor:
            return Fused.apply(x, y, labels, *(() if chunk is None else (*LIGER_OPTIONS, chunk)))[0]

        return _normalised(loss_of, inputs)

    classes, width = inputs["weight"].shape
    whole = -(-classes // width)  # all rows in one chunk
    names = list(inspect.signature(Fused.forward).parameters)
    has_budget = names[-1] == "chunk_mem_const"
    budgets = [None, *(sorted({min(4, whole), min(32, whole), whole}) if has_budget else ())]
    return fastest([with_budget(b) for b in budgets], wait=torch.cuda.synchronize)


def _three_products(inputs: Inputs) -> Step:
    x, y = inputs["embeddings"], inputs["weight"]
    chunk = max(1, CHUNK_BYTES // (len(x) * x.element_size()))

    def step() -> Outputs:
        grad_x, grad_y = torch.zeros_like(x), torch.empty_like(y)
        for start in range(0, len(y), chunk):
            columns = slice(start, start + chunk)
            z = x @ y[columns].T
            grad_x.addmm_(z, y[columns])
            torch.mm(z.T, x, out=grad_y[columns])
        return {"grad_embeddings": grad_x, "grad_weight": grad_y}

    return step


def _metric_learning(loss_name: str, inputs: Inputs, margin: float) -> Step:
    from pytorch_metric_learning import losses

    weight, embeddings = inputs["weight"], inputs["embeddings"].detach().requires_grad_()
    loss = getattr(losses, loss_name)(weight.shape[0], weight.shape[1], margin=margin, scale=inputs["scale"])
    loss.W = torch.nn.Parameter(weight.T.contiguous())  # it keeps (D, C)

    def step() -> Outputs:
        value = loss(embeddings, inputs["labels"])
        grad_embeddings, grad_weight = torch.autograd.grad(value, [embeddings, loss.W])
        return {"loss": value.detach(), "grad_embeddings": grad_embeddings, "grad_weight": grad_weight.T}

    return step


def _usual(eager: Callable[..., Tensor]) -> tuple[Contestant, ...]:
    return (
        Contestant("eager", lambda inputs: _step(eager, inputs)),
        Contestant("torch.compile", lambda inputs: _step(compiled(eager), inputs), note="of the eager code"),
    )


USUAL = _usual(eager_additive)
# Of LigerFusedLinearCrossEntropyFunction, its defaults: bias, ce_weight, ignore_index, lse_square_scale,
# label_smoothing, reduction; softcap, return_z_loss, accum_dtype, use_token_scaling; return_token_accuracy,
# return_predicted_tokens, ce_impl, ce_mode.
LIGER_OPTIONS = (None, None, -100, 0.0, 0.0, "mean", None, False, None, False, False, False, None, None)
NO_MARGIN = "margin 0, it has none; both sides are normalised for it within its time"

ADDITIVE = (
    *USUAL,
    Contestant(
        "F.linear_cross_entropy",
        _linear_cross_entropy,
        note=f"{NO_MARGIN}; its fastest chunk setting",
        changes={"margin": 0.0},
        refuses=lambda inputs: None if hasattr(F, "linear_cross_entropy") else "this torch does not have it",
    ),
    Contestant(
        "cut-cross-entropy",
        _cut_cross_entropy,
        note=f"{NO_MARGIN}; as it comes, gradients of logits below a threshold left out",
        changes={"margin": 0.0},
        refuses=unless_installed("cut_cross_entropy"),
        devices=("cuda",),
    ),
    Contestant(
        "cut-cross-entropy, all gradients",
        lambda inputs: _cut_cross_entropy(inputs, filter_eps=None),
        note=f"{NO_MARGIN}; filter_eps=None: nothing left out",
        changes={"margin": 0.0},
        refuses=unless_installed("cut_cross_entropy"),
        devices=("cuda",),
    ),
    Contestant(
        "Liger",
        _liger,
        note=f"{NO_MARGIN}; LigerFusedLinearCrossEntropy, its fastest chunk setting",
        changes={"margin": 0.0},
        refuses=unless_installed("liger_kernel"),
        devices=("cuda",),
    ),
    Contestant(
        "PML CosFaceLoss",
        lambda inputs: _metric_learning("CosFaceLoss", inputs, inputs["margin"]),
        note="pytorch-metric-learning as it comes",
        refuses=unless_installed("pytorch_metric_learning"),
    ),
    *ours(_our_step, _problem),
    *(captured(contestant, CAPTURED) for contestant in (*USUAL, auto(_our_step))),
    Contestant(
        "three products alone",
        _three_products,
        note="not a loss: the three matrix products, logits and both gradients, by cuBLAS in chunks that fit L2; the "
        "floor",
        devices=("cuda",),
        floor=True,
    ),
    Contestant(
        "cpu, no memory",
        _without_memory,
        note="ours with a memory budget of 0: softmax weights are computed twice",
        backend="cpu",
        refuses=lambda inputs: registry.refusal(registry.BACKENDS[0], _problem(inputs)),
        devices=("cpu",),
    ),
)
ANGULAR = (
    *_usual(eager_angular),
    Contestant(
        "PML ArcFaceLoss",
        lambda inputs: _metric_learning("ArcFaceLoss", inputs, math.degrees(inputs["margin"])),
        note="pytorch-metric-learning as it comes",
        refuses=unless_installed("pytorch_metric_learning"),
    ),
    *ours(_our_step, _problem),
)


def _sizes(shapes: Sequence[tuple[str, int, int, int]], margin: float, angular: bool) -> tuple[Size, ...]:
    """On the devices whose shapes they are."""
    places = (("cpu", SHAPES), ("cuda", GPU_SHAPES))
    return tuple(
        _size(*shape, margin, angular, tuple(device for device, measured in places if shape in measured))
        for shape in shapes
    )


WORKLOADS = (
    Workload(
        "margin_softmax",
        "Margin softmax, additive margin 0.35 at scale 30: loss and gradients of embeddings and weight",
        "B x D x C",
        _sizes(tuple(dict.fromkeys(SHAPES + GPU_SHAPES)), margin=0.35, angular=False),
        (torch.float32, torch.bfloat16),
        ADDITIVE,
        judge_loss(_our_step, truth),
    ),
    Workload(
        "angular_margin_softmax",
        "Margin softmax, angular margin of 0.5 rad at scale 30: loss and gradients of embeddings and weight",
        "B x D x C",
        _sizes(SHAPES[1:5:2], margin=0.5, angular=True),
        (torch.float32,),
        ANGULAR,
        judge_loss(_our_step),
    ),
)


def _series(name: str, axis: str, values: tuple[int, ...], shape: Callable[[int], tuple[int, int, int]]) -> Series:
    sizes = tuple(_size(name, *shape(value), margin=0.35, angular=False, devices=("cpu",)) for value in values)
    workload = replace(WORKLOADS[0], sizes=sizes, dtypes=(torch.float32,))
    return Series(f"margin-softmax-{name}", axis, values, workload)


CLASSES = (64, 256, 1024, 4096, 16_384, 65_536, 262_144, 1_000_000)
SERIES = (
    _series("classes", "classes C", CLASSES, lambda classes: (128, 128, classes)),
    _series("rows", "rows B", (64, 256, 1024, 4096, 16_384, 65_536), lambda rows: (rows, 128, 1024)),
)
