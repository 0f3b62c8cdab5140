"""Easy positives: finding them, and the triplet loss on them with its gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from fused_margins.functional import mine_negatives, mine_positives
from fused_margins.losses import EasyPositiveTripletLoss
from fused_margins.losses.sampling import distance_weighted_negatives
from fused_margins.ops.registry import Problem

from ..gate import judge_choice, judge_draw, judge_loss
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
    cosine_products,
    euclidean_differences,
    forward_backward,
    on_device,
    ours,
    unless_installed,
)

if TYPE_CHECKING:
    from pytorch_metric_learning import miners

MARGIN = 0.2  # of squared distances
SHAPES = ((512, 128, 4), (2048, 512, 16), (8192, 128, 4), (8192, 512, 64))


def _size(
    rows: int,
    width: int,
    per_class: int,
    *devices: str,
    name: str = "batch",
    dtypes: tuple[torch.dtype, ...] | None = None,
) -> Size:
    def make(dtype: torch.dtype, g: Generator) -> Inputs:
        labels = torch.arange(rows, device=g.device) // per_class
        return {
            "embeddings": on_device(rows, width, generator=g).to(dtype),
            "labels": labels[torch.randperm(rows, generator=g, device=g.device)],
        }

    return Size(name, f"{rows} x {width} x {per_class}", make, devices=devices, dtypes=dtypes)


ON_GPU = (torch.float32, torch.bfloat16)
POSITIVE_SIZES = (*(_size(*shape, "cpu") for shape in SHAPES), _size(8192, 512, 4, "cuda", dtypes=ON_GPU))
NEGATIVE_SIZES = (_size(8192, 512, 4, "cpu"), _size(32768, 512, 4, "cuda", dtypes=ON_GPU))
TRIPLET_SIZES = tuple(_size(*shape, "cpu", "cuda") for shape in SHAPES[:2])


def _near(size: Size) -> Size:
    """Cosines near 0.2, within the cut-off, as they are while a network learns."""

    def make(dtype: torch.dtype, g: Generator) -> Inputs:
        inputs = size.make(dtype, g)
        return inputs | {"embeddings": inputs["embeddings"] + 0.5}

    return replace(size, make=make)


DRAW_SIZES = (*(_near(_size(*shape, "cpu")) for shape in SHAPES[:3]), _near(_size(8192, 512, 4, "cuda", dtypes=ON_GPU)))


def _problem(relation: str) -> Callable[[Inputs], Problem]:
    def problem(inputs: Inputs) -> Problem:
        x = inputs["embeddings"]
        return Problem("nearest", x.device.type, x.dtype, x.shape[0], x.shape[0], x.shape[1], relation)

    return problem


def _search(inputs: Inputs) -> Inputs:
    x, labels = inputs["embeddings"], inputs["labels"]
    within = {
        "x": x,
        "y": x,
        "row_labels": labels,
        "column_labels": labels,
        "self_index": torch.arange(len(x), device=x.device),
    }
    return within | {"similarity": "cosine", "relation": "same"}


def _cosines(x: Tensor) -> Tensor:
    """(B, B) in float32, by the fastest product: rounded to 16 bits similarities would choose other samples."""
    if x.dtype == torch.float32:
        x = F.normalize(x)
        return x @ x.T
    inverse = x.float().norm(dim=1).clamp(min=1e-12).reciprocal()
    return torch.mm(x, x.T, out_dtype=torch.float32).mul_(inverse[:, None]).mul_(inverse)


def eager_positives(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    same = labels[:, None] == labels
    u = _cosines(embeddings).masked_fill(~same, -torch.inf).fill_diagonal_(-torch.inf)
    similarity, index = u.max(1)
    return similarity, torch.where(similarity > -torch.inf, index, -1)


def sorted_positives(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rows sorted by label and padded to the largest class, one small matrix product a class."""
    x = F.normalize(embeddings.float())
    order = labels.argsort()
    _, group, count = torch.unique_consecutive(labels[order], return_inverse=True, return_counts=True)
    place = torch.arange(len(x), device=x.device) - (count.cumsum(0) - count)[group]  # of a row within its class
    most = int(count.max())
    padded = x.new_zeros(len(count), most, x.shape[1])
    padded[group, place] = x[order]
    u = padded @ padded.mT  # (classes, most, most)
    empty = torch.arange(most, device=x.device) >= count[:, None]
    u.masked_fill_(empty[:, None] | torch.eye(most, dtype=torch.bool, device=x.device), -torch.inf)
    best, mate = u.max(2)
    member = order.new_zeros(len(count), most)
    member[group, place] = order
    similarity, index = torch.empty_like(best[group, place]), torch.empty_like(order)
    similarity[order] = best[group, place]
    index[order] = member[group, mate[group, place]]
    return similarity, torch.where(similarity > -torch.inf, index, -1)


def _miner(positives: str, negatives: str) -> miners.BatchEasyHardMiner:
    from pytorch_metric_learning import distances, miners

    return miners.BatchEasyHardMiner(
        pos_strategy=positives, neg_strategy=negatives, distance=distances.CosineSimilarity()
    )


def _metric_learning_miner(inputs: Inputs) -> Step:
    miner, labels = _miner("easy", "hard"), inputs["labels"]

    def step() -> Outputs:
        anchor, positive, _, _ = miner(inputs["embeddings"], labels)
        return {"index": torch.full_like(labels, -1).scatter(0, anchor, positive)}

    return step


def _search_negatives(inputs: Inputs) -> Inputs:
    return _search(inputs) | {"relation": "different"}


def eager_negatives(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(_cosines(embeddings).masked_fill_(labels[:, None] == labels, -torch.inf).max(1))  # type: ignore[return-value]


def _choice(function: Callable[..., tuple[Tensor, Tensor]], inputs: Inputs) -> Step:
    return lambda: dict(zip(("similarity", "index"), function(**inputs)))


def eager_triplet(embeddings: Tensor, labels: Tensor) -> Tensor:
    """Hard negatives; of unit vectors, so that squared distances are 2 - 2 cos. Anchors without a positive do not
    occur here."""
    x = F.normalize(embeddings)
    u = x @ x.T
    same = labels[:, None] == labels
    closed = ~same | torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    positive = u.masked_fill(closed, -torch.inf).amax(1)
    negative = u.masked_fill(same, -torch.inf).amax(1)
    return F.relu(MARGIN + 2 * (negative - positive)).mean()


def _triplet(function: Callable[..., Tensor], inputs: Inputs) -> Step:
    return forward_backward(lambda arguments: {"loss": function(**arguments)}, inputs, ("embeddings",))


def _our_triplet(inputs: Inputs, backend: str) -> Step:
    return _triplet(EasyPositiveTripletLoss(MARGIN, negatives="hard", backend=backend), inputs)


def _metric_learning_triplet(inputs: Inputs) -> Step:
    from pytorch_metric_learning import distances, losses, reducers

    miner = _miner("easy", "hard")
    squared = distances.LpDistance(power=2)
    loss = losses.TripletMarginLoss(MARGIN, distance=squared, reducer=reducers.MeanReducer())
    return _triplet(lambda embeddings, labels: loss(embeddings, labels, miner(embeddings, labels)), inputs)


def eager_draw(embeddings: Tensor, labels: Tensor) -> Tensor:
    """Every row has a negative within the cut-off here; without one multinomial would raise."""
    squared, width = 2 - 2 * _cosines(embeddings), embeddings.shape[1]
    near = squared.clamp(0.25, 1.96)
    log_weight = (2 - width) / 2 * near.log() - (width - 3) / 2 * torch.log1p(-near / 4)
    closed = (squared >= 1.96) | (labels[:, None] == labels)
    return torch.multinomial(log_weight.masked_fill(closed, -torch.inf).softmax(1), 1)[:, 0]


def _draw(function: Callable[..., Tensor], inputs: Inputs) -> Step:
    return lambda: {"index": function(**inputs)}


def _our_draw(inputs: Inputs, backend: str) -> Step:
    def function(embeddings: Tensor, labels: Tensor) -> Tensor:
        return distance_weighted_negatives(embeddings, labels, embeddings, labels, backend=backend)

    return _draw(function, inputs)


def _metric_learning_draw(inputs: Inputs) -> Step:
    from pytorch_metric_learning import miners

    miner, labels = miners.DistanceWeightedMiner(), inputs["labels"]

    def step() -> Outputs:
        anchor, _, negative = miner(inputs["embeddings"], labels)
        return {"index": torch.full_like(labels, -1).scatter(0, anchor, negative)}

    return step


def _metric_learning_cannot_draw(inputs: Inputs) -> str | None:
    if inputs["embeddings"].dtype != torch.float32:
        return "it compares distances in the dtype of the embeddings"
    if len(inputs["labels"]) > 4096:
        return "minutes a call: it copies the B x N weights for every class"
    return unless_installed("pytorch_metric_learning")(inputs)


def _draw_too_slow(inputs: Inputs, backend: str) -> str | None:
    too_many = backend == "reference" and len(inputs["labels"]) > 4096
    return "seconds a call: it makes B x N random numbers in 64 bits" if too_many else None


USUAL = (
    Contestant("eager", lambda inputs: _choice(eager_positives, inputs)),
    Contestant("torch.compile", lambda inputs: _choice(compiled(eager_positives), inputs), note="of the eager code"),
)


def _our_positives(inputs: Inputs, backend: str) -> Step:
    return _choice(lambda **arguments: mine_positives(**arguments, backend=backend), inputs)


POSITIVES = (
    *USUAL,
    Contestant(
        "sorted bmm", lambda inputs: _choice(sorted_positives, inputs), note="rows sorted by label, a product a class"
    ),
    Contestant(
        "PML BatchEasyHardMiner",
        _metric_learning_miner,
        note="pytorch-metric-learning; it mines the hardest negatives, too, and cannot do without",
        refuses=lambda inputs: (
            unless_installed("pytorch_metric_learning")(inputs)
            if inputs["embeddings"].dtype == torch.float32
            else "it compares similarities in the dtype of the embeddings"
        ),
    ),
    *ours(_our_positives, _problem("same"), cosine_products),
    *(captured(contestant) for contestant in (*USUAL, auto(_our_positives))),
)
TRIPLET = (
    Contestant("eager", lambda inputs: _triplet(eager_triplet, inputs)),
    Contestant("torch.compile", lambda inputs: _triplet(compiled(eager_triplet), inputs), note="of the eager code"),
    Contestant(
        "PML TripletMarginLoss",
        _metric_learning_triplet,
        note="pytorch-metric-learning with its BatchEasyHardMiner; the mean is over all triplets, as ours",
        refuses=unless_installed("pytorch_metric_learning"),
    ),
    *ours(_our_triplet, _problem("different"), euclidean_differences),  # negatives, too
)

WORKLOADS = (
    Workload(
        "easy_positives",
        "Easy positives within a batch, cosine, no gradient",
        "B x D x samples a class",
        POSITIVE_SIZES,
        (torch.float32,),
        POSITIVES,
        judge_choice(_search),
    ),
    Workload(
        "hardest_negatives",
        "Hardest negatives within a batch, cosine, no gradient",
        "B x D x samples a class",
        NEGATIVE_SIZES,
        (torch.float32,),
        (
            Contestant("eager", lambda inputs: _choice(eager_negatives, inputs)),
            Contestant("torch.compile", lambda inputs: _choice(compiled(eager_negatives), inputs), "of the eager code"),
            *ours(
                lambda inputs, backend: _choice(
                    lambda **arguments: mine_negatives(**arguments, backend=backend), inputs
                ),
                _problem("different"),
                cosine_products,
            ),
        ),
        judge_choice(_search_negatives),
    ),
    Workload(
        "draw",
        "Distance-weighted negatives within a batch, one an anchor, no gradient",
        "B x D x samples a class",
        DRAW_SIZES,
        (torch.float32,),
        (
            Contestant("eager", lambda inputs: _draw(eager_draw, inputs), note="softmax and torch.multinomial"),
            Contestant("torch.compile", lambda inputs: _draw(compiled(eager_draw), inputs), "of the eager code"),
            Contestant(
                "PML DistanceWeightedMiner",
                _metric_learning_draw,
                note="pytorch-metric-learning; it draws a random positive with each negative, and as many of both for "
                "an anchor as its class has samples",
                refuses=_metric_learning_cannot_draw,
            ),
            *ours(_our_draw, lambda inputs: _problem("different")(inputs)._replace(op="draw"), _draw_too_slow),
        ),
        judge_draw(_search_negatives),
    ),
    Workload(
        "easy_positive_triplet",
        "Triplet loss on easy positives and hard negatives: loss and gradient",
        "B x D x samples a class",
        TRIPLET_SIZES,
        (torch.float32,),
        TRIPLET,
        # Against the eager code in float64: the reference would take minutes.
        judge_loss(lambda inputs, backend: _triplet(eager_triplet, inputs)),
    ),
)


def _series(name: str, values: tuple[int, ...], workload: Workload) -> Series:
    sizes = tuple(_size(rows, 128, 4, "cpu", name="rows") for rows in values)
    return Series(name, "rows B", values, replace(workload, sizes=sizes))


BATCHES = (128, 512, 2048, 8192, 16_384, 32_768, 65_536)
SERIES = (
    _series("easy-positives-rows", BATCHES, WORKLOADS[0]),
    _series("hardest-negatives-rows", BATCHES, WORKLOADS[1]),
)
