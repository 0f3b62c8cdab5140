"""Fine-tuned cosine heads of few-shot episodes, as an evaluation trains them: 100 passes of SGD for each episode."""

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from fused_margins.fewshot import episodes

from ..workload import Contestant, Inputs, Judge, Outputs, Size, Step, Workload, on_device

WAYS = 5
# Episodes, shots, width of the embeddings.
SHAPES = ((10, 1, 64), (200, 1, 640), (100, 5, 640))
LARGE = 10_000  # steps of all episodes: half a minute a call, one episode at a time
# Rounding goes through hundreds of steps; heads are of length 1 or so.
GRANTED = 1e-4


def _episodes(count: int, shots: int, width: int, g: Generator) -> Inputs:
    """Support sets around a centre for each class, unit length, first heads and the order of each pass."""
    support = on_device(count, WAYS, 1, width, generator=g) + on_device(count, WAYS, shots, width, generator=g)
    num_support = WAYS * shots
    return {
        "support": F.normalize(support.flatten(1, 2), dim=2),
        "labels": torch.arange(WAYS).repeat_interleave(shots),
        "weight": on_device(count, WAYS, width, generator=g) / math.sqrt(width),
        "order": torch.rand(episodes.PASSES, count, num_support, generator=g).argsort(dim=2),
    }


def _size(count: int, shots: int, width: int) -> Size:
    text = f"{count} x {WAYS} x {shots} x {width}"
    large = count * episodes.PASSES * math.ceil(WAYS * shots / episodes.HEAD_BATCH) > LARGE
    return Size("episodes", text, lambda _, g: _episodes(count, shots, width, g), large, devices=("cpu",))


def _train_one(support: Tensor, labels: Tensor, weight: Tensor, order: Tensor) -> Tensor:
    """One episode's head (ways, D) after its passes."""
    head = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.SGD(
        [head],
        lr=episodes.LEARNING_RATE,
        momentum=episodes.MOMENTUM,
        dampening=episodes.DAMPENING,
        weight_decay=episodes.WEIGHT_DECAY,
    )
    for permutation in order:
        for chosen in permutation.split(episodes.HEAD_BATCH):
            optimizer.zero_grad()
            logits = episodes.HEAD_SCALE * F.linear(support[chosen], F.normalize(head))
            F.cross_entropy(logits, labels[chosen]).backward()
            optimizer.step()
    return head.detach()


def _one_at_a_time(inputs: Inputs) -> Step:
    def step() -> Outputs:
        support, weight, order = inputs["support"], inputs["weight"], inputs["order"]
        heads = [_train_one(support[i], inputs["labels"], weight[i], order[:, i]) for i in range(len(support))]
        return {"heads": torch.stack(heads)}

    return step


def _all_at_once(inputs: Inputs) -> Step:
    return lambda: {"heads": episodes.train_heads(**inputs)}


def judge_heads(inputs: Inputs) -> Judge:
    """Against one episode at a time in float64."""
    exact = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
    expected = _one_at_a_time(exact)()["heads"]

    def judge(contestant: Contestant, outputs: Outputs) -> list[str]:
        heads = outputs["heads"]
        if heads.shape != expected.shape:
            return [f"heads: expected shape {tuple(expected.shape)}, got {tuple(heads.shape)}"]
        error = float((heads - expected).abs().max())
        return [] if error <= GRANTED else [f"heads: off by {error:.3g}, granted {GRANTED:g}"]

    return judge


WORKLOADS = (
    Workload(
        "heads",
        f"Cosine heads of few-shot episodes: {episodes.PASSES} passes of SGD in batches of {episodes.HEAD_BATCH}",
        "episodes x ways x shots x D",
        tuple(_size(*shape) for shape in SHAPES),
        (torch.float32,),
        (
            Contestant(
                "one at a time", _one_at_a_time, "autograd and torch.optim.SGD, as the papers' code trains them"
            ),
            Contestant("all at once", _all_at_once, backend="all at once"),
        ),
        judge_heads,
    ),
)
