"""Margin softmax and its gradients: additive margins (CosFace, negative margins) and angular ones (ArcFace)."""

import math
from collections.abc import Callable

import torch
from pytorch_metric_learning import losses
from torch import Generator, Tensor
from torch.nn import functional as F

from fused_margins.functional import margin_softmax_loss
from fused_margins.ops import registry
from fused_margins.ops.registry import Problem

from ..gate import judge_loss
from ..timing import fastest
from ..workload import Contestant, Inputs, Outputs, Size, Step, Workload, compiled, forward_backward, ours

WRT = ("embeddings", "weight")
SHAPES = (
    ("few_shot", 32, 32, 16),
    ("few_shot", 256, 64, 64),
    ("few_shot", 256, 512, 64),
    ("few_shot", 256, 1600, 200),  # flattened Conv4 features, all classes of CUB
    ("many_classes", 128, 512, 10_000),
    ("huge", 512, 512, 100_000),
)


def _size(name: str, rows: int, width: int, classes: int, margin: float, angular: bool) -> Size:
    def make(dtype: torch.dtype, g: Generator) -> Inputs:
        return {
            "embeddings": torch.randn(rows, width, generator=g).to(dtype),
            "weight": torch.randn(classes, width, generator=g).to(dtype),
            "labels": torch.randint(classes, (rows,), generator=g),
            "scale": 30.0,
            "margin": margin,
            "margin_type": "angular" if angular else "additive",
        }

    return Size(name, f"{rows} x {width} x {classes}", make, large=name == "huge")


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


def _without_memory(inputs: Inputs) -> Step:
    step = _our_step(inputs, "cpu")

    def within_nothing() -> Outputs:
        before = registry.memory_budget()
        registry.set_memory_budget(0)
        try:
            return step()
        finally:
            registry.set_memory_budget(before)

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

    return fastest([with_options(chosen) for chosen in candidates])


def _metric_learning(loss_name: str, inputs: Inputs, margin: float) -> Step:
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


ADDITIVE = (
    *_usual(eager_additive),
    Contestant(
        "F.linear_cross_entropy",
        _linear_cross_entropy,
        note="margin 0, it has none; both sides are normalised for it within its time; its fastest chunk setting",
        changes={"margin": 0.0},
        refuses=lambda inputs: None if hasattr(F, "linear_cross_entropy") else "this torch does not have it",
    ),
    Contestant(
        "PML CosFaceLoss",
        lambda inputs: _metric_learning("CosFaceLoss", inputs, inputs["margin"]),
        note="pytorch-metric-learning as it comes",
    ),
    *ours(_our_step, _problem),
    Contestant(
        "cpu, no memory",
        _without_memory,
        note="ours with a memory budget of 0: softmax weights are computed twice",
        backend="cpu",
        refuses=lambda inputs: registry.refusal(registry.BACKENDS[0], _problem(inputs)),
    ),
)
ANGULAR = (
    *_usual(eager_angular),
    Contestant(
        "PML ArcFaceLoss",
        lambda inputs: _metric_learning("ArcFaceLoss", inputs, math.degrees(inputs["margin"])),
        note="pytorch-metric-learning as it comes",
    ),
    *ours(_our_step, _problem),
)

WORKLOADS = (
    Workload(
        "margin_softmax",
        "Margin softmax, additive margin 0.35 at scale 30: loss and gradients of embeddings and weight",
        "B x D x C",
        tuple(_size(*shape, margin=0.35, angular=False) for shape in SHAPES),
        (torch.float32, torch.bfloat16),
        ADDITIVE,
        judge_loss(_our_step),
    ),
    Workload(
        "angular_margin_softmax",
        "Margin softmax, angular margin of 0.5 rad at scale 30: loss and gradients of embeddings and weight",
        "B x D x C",
        tuple(_size(*shape, margin=0.5, angular=True) for shape in SHAPES[1:5:2]),
        (torch.float32,),
        ANGULAR,
        judge_loss(_our_step),
    ),
)
