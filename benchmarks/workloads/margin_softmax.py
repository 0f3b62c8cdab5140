"""Margin softmax and its gradients: additive margins (CosFace, negative margins) and angular ones (ArcFace)."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from fused_margins.backends import budget
from fused_margins.functional import margin_softmax_loss

from ..correctness import check_values
from ..implementations import differentiated, graphs, metric_learning, on_device, ours, usual
from ..workload import DEVICES, Implementation, Inputs, Outputs, Series, Size, Step, Workload
from . import cross_entropy

SHAPES = (
    ("few_shot", (32, 32, 16), ("cpu",)),
    ("few_shot", (256, 64, 64), ("cpu",)),
    ("few_shot", (256, 512, 64), DEVICES),
    ("few_shot", (256, 1600, 200), DEVICES),  # flattened Conv4 features, all classes of CUB
    ("many_classes", (128, 512, 10_000), ("cpu",)),
    ("huge", (512, 512, 100_000), ("cpu",)),
    ("many_classes", (1024, 512, 10_000), ("cuda",)),
    ("many_classes", (1024, 512, 100_000), ("cuda",)),
    ("many_classes", (1024, 512, 100_096), ("cuda",)),  # 256 divides it: for the peers in CuTe DSL
    ("million_classes", (1024, 512, 1_000_000), ("cuda",)),
)
CAPTURED = ("few_shot", "many_classes")  # sizes that a GPU computes about as fast as Python launches them, or faster
BFLOAT16_ONLY = 1_000_000  # classes: the logits alone have 4 GB in float32
SMOOTHING = 0.1
CHUNK_BYTES = 16 * 2**20  # of logits: they stay in the L2 cache of a large GPU, 40 to 50 MB


def _size(
    name: str, shape: tuple[int, int, int], devices: tuple[str, ...], margin: float, margin_type: str, **options: float
) -> Size:
    rows, width, classes = shape

    def make(dtype: torch.dtype, g: Generator) -> Inputs:
        return {
            "embeddings": on_device(rows, width, generator=g).to(dtype),
            "weight": on_device(classes, width, generator=g).to(dtype),
            "labels": torch.randint(classes, (rows,), generator=g, device=g.device),
            "scale": 30.0,
            "margin": margin,
            "margin_type": margin_type,
            **options,
        }

    dtypes = (torch.bfloat16,) if classes >= BFLOAT16_ONLY else None
    return Size(name, shape, make, name == "huge", 0, 3 * rows * width * classes, devices, dtypes)


def eager_additive(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: float,
    margin: float,
    label_smoothing: float = 0.0,
    **_: str,
) -> Tensor:
    # The scale on the embeddings, the margin by scatter_add: the fastest of the usual forms (one-hot, index_put, in
    # place).
    z = F.linear(scale * F.normalize(embeddings), F.normalize(weight))
    z = z.scatter_add(1, labels[:, None], z.new_full((1, 1), -scale * margin).expand(len(labels), 1))
    return F.cross_entropy(z, labels, label_smoothing=label_smoothing)


def eager_angular(embeddings: Tensor, weight: Tensor, labels: Tensor, scale: float, margin: float, **_: str) -> Tensor:
    cosine = F.linear(F.normalize(embeddings), F.normalize(weight))
    own = cosine.gather(1, labels[:, None])
    sine = (1 - own.square()).clamp(min=1e-12).sqrt()
    shifted = own * math.cos(margin) - sine * math.sin(margin)
    beyond = own - margin * math.sin(margin)  # theta + margin > pi
    shifted = torch.where(own > -math.cos(margin), shifted, beyond)
    return F.cross_entropy(scale * cosine.scatter(1, labels[:, None], shifted), labels)


prepare = differentiated("loss", "embeddings", "weight")


truth = partial(prepare, partial(margin_softmax_loss, backend="reference"))


def _call(inputs: Inputs) -> tuple[str, Inputs]:
    angular = inputs["margin_type"] == "angular"
    margins = {"margin": 0.0, "angle_rad": inputs["margin"]} if angular else {"margin": inputs["margin"]}
    sides = {"x": inputs["embeddings"], "y": inputs["weight"], "target": inputs["labels"]}
    return "contrast", sides | {"scale": inputs["scale"], "epilogue": "margin_softmax"} | margins


def _without_memory(inputs: Inputs) -> Step:
    step = prepare(partial(margin_softmax_loss, backend="cpu"), inputs)

    def within_nothing() -> Outputs:
        with budget.within_memory_budget(0):
            return step()

    return within_nothing


def _normalised(loss_of: cross_entropy.LossOf, inputs: Inputs) -> Step:
    """`loss_of` embeddings, weight and labels has no margin; both sides are normalised for it, within its time."""

    def loss(embeddings: Tensor, weight: Tensor, labels: Tensor, scale: float, **_: float | str) -> Tensor:
        return loss_of(scale * F.normalize(embeddings), F.normalize(weight), labels)

    return prepare(loss, inputs)


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


def _metric_learning(loss_name: str, margin: Callable[[float], float], inputs: Inputs) -> Step:
    from pytorch_metric_learning import losses

    weight, embeddings = inputs["weight"], inputs["embeddings"].detach().requires_grad_()
    options = {"margin": margin(inputs["margin"]), "scale": inputs["scale"]}
    loss = getattr(losses, loss_name)(*weight.shape, **options)
    loss.W = torch.nn.Parameter(weight.T.contiguous())  # it keeps (D, C)

    def step() -> Outputs:
        value = loss(embeddings, inputs["labels"])
        grad_embeddings, grad_weight = torch.autograd.grad(value, [embeddings, loss.W])
        return {"loss": value.detach(), "grad_embeddings": grad_embeddings, "grad_weight": grad_weight.T}

    return step


USUAL = usual(prepare, eager_additive)
PRODUCTS = "not a loss: logits and both gradients as matrix products, by cuBLAS in chunks that fit L2; a lower bound"
AGAIN = "ours with a memory budget of 0: softmax weights are computed twice"
NO_MARGIN = "margin 0, it has none; both sides are normalised for it within its time; "
ADDITIVE = (
    *USUAL,
    *cross_entropy.peers(_normalised, NO_MARGIN, changes={"margin": 0.0}),
    metric_learning("CosFaceLoss", partial(_metric_learning, "CosFaceLoss", float), " as it comes"),
    *ours(prepare, margin_softmax_loss),
    *graphs(USUAL, prepare, margin_softmax_loss, CAPTURED),
    Implementation("three products alone", _three_products, PRODUCTS, devices=("cuda",), lower_bound=True),
    Implementation("cpu, no memory", _without_memory, AGAIN, backend="cpu", devices=("cpu",)),
)
ANGULAR = (
    *usual(prepare, eager_angular),
    metric_learning("ArcFaceLoss", partial(_metric_learning, "ArcFaceLoss", math.degrees), " as it comes"),
    *ours(prepare, margin_softmax_loss),
)

WORKLOADS = (
    Workload(
        "margin_softmax",
        "Margin softmax, additive margin 0.35 at scale 30: loss and gradients of embeddings and weight",
        "B x D x C",
        tuple(_size(*shape, 0.35, "additive") for shape in SHAPES),
        ADDITIVE,
        partial(check_values, truth=truth, call=_call),
        (torch.float32, torch.bfloat16),
    ),
    Workload(
        "angular_margin_softmax",
        "Margin softmax, angular margin of 0.5 rad at scale 30: loss and gradients of embeddings and weight",
        "B x D x C",
        tuple(_size(*shape, 0.5, "angular") for shape in SHAPES[1:5:2]),
        ANGULAR,
        partial(check_values, truth=truth, call=_call),
    ),
    Workload(
        "smoothed_margin_softmax",
        f"Margin softmax, additive margin 0.35 at scale 30, label smoothing {SMOOTHING:g}: loss and gradients of both",
        "B x D x C",
        tuple(_size(*shape, 0.35, "additive", label_smoothing=SMOOTHING) for shape in SHAPES[1:5]),
        (*USUAL, *ours(prepare, margin_softmax_loss)),
        partial(check_values, truth=truth),
    ),
)


def _series(name: str, axis: str, values: tuple[int, ...], shape: Callable[[int], tuple[int, int, int]]) -> Series:
    sizes = tuple(_size(name, shape(value), ("cpu",), 0.35, "additive") for value in values)
    workload = replace(WORKLOADS[0], sizes=sizes, dtypes=(torch.float32,))
    return Series(f"margin-softmax-{name}", axis, values, workload)


CLASSES = (64, 256, 1024, 4096, 16_384, 65_536, 262_144, 1_000_000)
SERIES = (
    _series("classes", "classes C", CLASSES, lambda classes: (128, 128, classes)),
    _series("rows", "rows B", (64, 256, 1024, 4096, 16_384, 65_536), lambda rows: (rows, 128, 1024)),
)
