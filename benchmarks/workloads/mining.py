"""Easy positives, hardest and distance-weighted negatives: finding them, and the triplet loss with its gradient."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from fused_margins.functional import mine_negatives, mine_positives
from fused_margins.losses import EasyPositiveTripletLoss
from fused_margins.ops.sample import sample

from ..correctness import check_choice, check_sample, check_values
from ..implementations import differentiated, graphs, metric_learning, on_device, ours, peer, returned, usual
from ..workload import Inputs, Outputs, Series, Size, Step, Workload
from .clusters import by_class

MARGIN = 0.2  # of squared distances
SHAPES = ((512, 128, 4), (2048, 512, 16), (8192, 128, 4), (8192, 512, 64))


def _size(shape: tuple[int, int, int], *devices: str, name: str = "batch", offset: float = 0.0) -> Size:
    rows, width, per_class = shape
    dtypes = (torch.float32, torch.bfloat16) if devices == ("cuda",) else None

    def make(dtype: torch.dtype, g: Generator) -> Inputs:
        labels = torch.arange(rows, device=g.device) // per_class
        embeddings = on_device(rows, width, generator=g).to(dtype) + offset
        return {"embeddings": embeddings, "labels": labels[torch.randperm(rows, generator=g, device=g.device)]}

    return Size(name, shape, make, products=rows * rows * width, devices=devices, dtypes=dtypes)


POSITIVE_SIZES = (*(_size(shape, "cpu") for shape in SHAPES), _size((8192, 512, 4), "cuda"))
NEGATIVE_SIZES = (_size((8192, 512, 4), "cpu"), _size((32768, 512, 4), "cuda"))
# The offset makes cosines near 0.2, within the cut-off, as they are while a network learns.
SAMPLED = (*((shape, "cpu") for shape in SHAPES[:3]), ((8192, 512, 4), "cuda"))


def _search(inputs: Inputs) -> Inputs:
    x, labels = inputs["embeddings"], inputs["labels"]
    sides = {"x": x, "y": x, "row_labels": labels, "column_labels": labels}
    itself = torch.arange(len(x), device=x.device)
    return sides | {"self_index": itself, "similarity": "cosine", "relation": "same"}


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
    """One small matrix product a class."""
    x, member, group, place = by_class(F.normalize(embeddings.float()), labels, int(labels.max()) + 1)
    u = x @ x.mT  # (classes, most, most)
    itself = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
    best, mate = u.masked_fill_((member < 0)[:, None] | itself, -torch.inf).max(2)
    similarity, index = best[group, place], member[group, mate[group, place]]
    return similarity, torch.where(similarity > -torch.inf, index, -1)


def _easy_hard() -> Any:
    from pytorch_metric_learning import distances, miners

    return miners.BatchEasyHardMiner(pos_strategy="easy", neg_strategy="hard", distance=distances.CosineSimilarity())


def _distance_weighted(inputs: Inputs) -> Step:
    from pytorch_metric_learning import miners

    return _mined(miners.DistanceWeightedMiner(), 2, inputs)


def _mined(miner: Any, output: int, inputs: Inputs) -> Step:
    """What the miner returns beside the anchors: positives are its second output, negatives the third."""
    labels = inputs["labels"]

    def step() -> Outputs:
        mined = miner(inputs["embeddings"].float(), labels)  # it compares in the dtype of the embeddings
        return {"index": torch.full_like(labels, -1).scatter(0, mined[0], mined[output])}

    return step


def _search_negatives(inputs: Inputs) -> Inputs:
    return _search(inputs) | {"relation": "different", "self_index": None}


def eager_negatives(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(_cosines(embeddings).masked_fill_(labels[:, None] == labels, -torch.inf).max(1))  # type: ignore[return-value]


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


def our_triplet(embeddings: Tensor, labels: Tensor, backend: str) -> Tensor:
    return EasyPositiveTripletLoss(MARGIN, negatives="hard", backend=backend)(embeddings, labels)


def _metric_learning_triplet(inputs: Inputs) -> Step:
    from pytorch_metric_learning import distances, losses, reducers

    miner, squared = _easy_hard(), distances.LpDistance(power=2)
    loss = losses.TripletMarginLoss(MARGIN, distance=squared, reducer=reducers.MeanReducer())
    return triplet(lambda embeddings, labels: loss(embeddings, labels, miner(embeddings, labels)), inputs)


def eager_sample(embeddings: Tensor, labels: Tensor) -> Tensor:
    """Every row has a negative within the cut-off here; without one multinomial would raise."""
    squared, width = 2 - 2 * _cosines(embeddings), embeddings.shape[1]
    near = squared.clamp(0.25, 1.96)
    log_weight = (2 - width) / 2 * near.log() - (width - 3) / 2 * torch.log1p(-near / 4)
    closed = (squared >= 1.96) | (labels[:, None] == labels)
    return torch.multinomial(log_weight.masked_fill(closed, -torch.inf).softmax(1), 1)[:, 0]


def our_sample(embeddings: Tensor, labels: Tensor, backend: str) -> Tensor:
    seed = torch.tensor(1, device=embeddings.device)
    return sample(embeddings, embeddings, labels, labels, seed, backend=backend)


def _sample_call(inputs: Inputs) -> Inputs:
    search = _search_negatives(inputs) | {"seed": torch.tensor(1, device=inputs["embeddings"].device)}
    return {name: value for name, value in search.items() if name != "similarity"}


choice, index, triplet = returned("similarity", "index"), returned("index"), differentiated("loss", "embeddings")
POSITIVES = usual(choice, eager_positives)
MINES_BOTH = "; it mines the hardest negatives, too, and cannot do without"
MANY = "; it draws a random positive with each negative, and as many of both for an anchor as its class has samples"
MEAN = " with its BatchEasyHardMiner; the mean is over all triplets, as ours"

WORKLOADS = (
    Workload(
        "easy_positives",
        "Easy positives within a batch, cosine, no gradient",
        "B x D x samples a class",
        POSITIVE_SIZES,
        (
            *POSITIVES,
            peer("sorted bmm", choice, sorted_positives, "rows sorted by label, a product a class"),
            metric_learning("BatchEasyHardMiner", lambda inputs: _mined(_easy_hard(), 1, inputs), MINES_BOTH),
            *ours(choice, mine_positives, most_products=2**34),
            *graphs(POSITIVES, choice, mine_positives),
        ),
        partial(check_choice, search=_search),
    ),
    Workload(
        "hardest_negatives",
        "Hardest negatives within a batch, cosine, no gradient",
        "B x D x samples a class",
        NEGATIVE_SIZES,
        (*usual(choice, eager_negatives), *ours(choice, mine_negatives, most_products=2**34)),
        partial(check_choice, search=_search_negatives),
    ),
    Workload(
        "sample",
        "Distance-weighted negatives within a batch, one an anchor, no gradient",
        "B x D x samples a class",
        tuple(_size(shape, device, offset=0.5) for shape, device in SAMPLED),
        (
            *usual(index, eager_sample, "softmax and torch.multinomial"),
            metric_learning("DistanceWeightedMiner", _distance_weighted, MANY, most=2**32),
            *ours(index, our_sample, most_products=2**32),
        ),
        partial(check_sample, search=_sample_call),
    ),
    Workload(
        "easy_positive_triplet",
        "Triplet loss on easy positives and hard negatives: loss and gradient",
        "B x D x samples a class",
        tuple(_size(shape, "cpu", "cuda") for shape in SHAPES[:2]),
        (
            *usual(triplet, eager_triplet),
            metric_learning("TripletMarginLoss", _metric_learning_triplet, MEAN),
            *ours(triplet, our_triplet, most_products=2**30),
        ),
        partial(check_values, truth=partial(triplet, eager_triplet)),  # in float64: the reference would take minutes
    ),
)


def _series(name: str, values: tuple[int, ...], workload: Workload) -> Series:
    sizes = tuple(_size((rows, 128, 4), "cpu", name="rows") for rows in values)
    return Series(name, "rows B", values, replace(workload, sizes=sizes))


BATCHES = (128, 512, 2048, 8192, 16_384, 32_768, 65_536)
SERIES = (
    _series("easy-positives-rows", BATCHES, WORKLOADS[0]),
    _series("hardest-negatives-rows", BATCHES, WORKLOADS[1]),
)
