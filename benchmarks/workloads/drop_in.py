"""Losses of the drop-in for pytorch-metric-learning beside theirs, wrappers and reducers included."""

import importlib
from functools import partial

import torch
from torch import Generator

from ..correctness import check_values
from ..implementations import on_device, unless_installed
from ..workload import Implementation, Inputs, Outputs, Size, Step, Workload

THEIRS, OURS = "pytorch_metric_learning.losses", "fused_margins.compat.pytorch_metric_learning.losses"
CLASSES, PER_CLASS = 1000, 4
HEADS = (
    "ArcFaceLoss", "CosFaceLoss", "NormalizedSoftmaxLoss", "SubCenterArcFaceLoss", "ProxyAnchorLoss", "ProxyNCALoss"
)  # fmt: skip
PAIRS = ("NTXentLoss", "SupConLoss", "MultiSimilarityLoss", "TripletMarginLoss")
MOST_BYTES = 6 * 10**9
LARGE = 2048  # rows from which on it takes long


def _size(name: str, rows: int, width: int) -> Size:
    def make(dtype: torch.dtype, g: Generator) -> Inputs:
        labels = torch.arange(rows, device=g.device) // PER_CLASS
        if name in HEADS:
            labels = torch.randint(CLASSES, (rows,), generator=g, device=g.device)
        return {"embeddings": on_device(rows, width, generator=g).to(dtype), "labels": labels, "loss": name}

    return Size(name, (rows, width), make, rows >= LARGE or (name, rows) == ("NTXentLoss", 512), devices=("cpu",))


def _step(library: str, inputs: Inputs) -> Step:
    embeddings, labels = inputs["embeddings"].detach().requires_grad_(), inputs["labels"]
    options = {"num_classes": CLASSES, "embedding_size": embeddings.shape[1]} if inputs["loss"] in HEADS else {}
    loss = getattr(importlib.import_module(library), inputs["loss"])(**options)
    parameters = dict(loss.named_parameters())
    for parameter in parameters.values():
        generator = torch.Generator().manual_seed(1)
        parameter.data = torch.randn(parameter.shape, generator=generator).to(embeddings)

    def step() -> Outputs:
        value = loss(embeddings, labels)
        gradients = torch.autograd.grad(value, [embeddings, *parameters.values()])
        names = ["grad_embeddings", *(f"grad_{name}" for name in parameters)]
        return {"loss": value.detach()} | dict(zip(names, gradients))

    return step


def _asks_for_too_much(inputs: Inputs) -> str | None:
    """Of theirs: a mask of positives by negatives, a byte an entry; or three indices a triplet, held twice."""
    rows = inputs["embeddings"].shape[0]
    positives, others = rows * (PER_CLASS - 1), rows - PER_CLASS
    of_loss = {"NTXentLoss": positives * rows * others, "TripletMarginLoss": 48 * positives * others}
    asked = of_loss.get(inputs["loss"], 0)
    return f"asks for {asked / 1e9:.0f} GB" if asked > MOST_BYTES else unless_installed("pytorch_metric_learning")({})


WORKLOADS = (
    Workload(
        "drop_in",
        f"Losses of pytorch-metric-learning and gradients of embeddings and parameters; heads of {CLASSES} classes, "
        f"{PER_CLASS} samples a class for the others",
        "B x D",
        tuple(_size(n, b, d) for n in (*HEADS, *PAIRS) for d in (128, 512) for b in (32, 128, 512, 2048, 8192)),
        (
            Implementation("PML", partial(_step, THEIRS), "as it comes", refuses=_asks_for_too_much),
            Implementation(
                "drop-in",
                partial(_step, OURS),
                "fused_margins.compat.pytorch_metric_learning",
                backend="auto",
                refuses=unless_installed("pytorch_metric_learning"),
            ),
        ),
        partial(check_values, truth=partial(_step, OURS)),
    ),
)
