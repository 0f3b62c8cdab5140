"""The loss over many ranks against the loss of one process on the rows of all of them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from fused_margins import MarginSoftmaxLoss
from fused_margins.distributed import ShardedMarginSoftmaxLoss
from fused_margins.functional import margin_softmax_loss

from . import ranks

WIDTH = 6


class Case(NamedTuple):
    """A call: classes, rows of each rank, the module's options, and which values are one a sample."""

    classes: int
    counts: tuple[int, ...]
    options: dict[str, Any]
    of_samples: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float64

    def draw(self) -> "Inputs":
        draws = torch.Generator().manual_seed(3)
        rows, centers = sum(self.counts), self.options.get("centers_per_class", 1)
        shape = (self.classes, centers, WIDTH) if centers > 1 else (self.classes, WIDTH)
        labels = torch.randint(self.classes, (rows,), generator=draws)
        if rows > 2:
            labels[1] = -100
        x, weight = (torch.randn(s, dtype=self.dtype, generator=draws) for s in ((rows, WIDTH), shape))
        values = {n: torch.rand(rows, 1, dtype=self.dtype, generator=draws) + 0.1 for n in self.of_samples}
        return Inputs(x, weight, labels, values)


class Inputs(NamedTuple):
    x: Tensor
    weight: Tensor
    labels: Tensor
    of_samples: dict[str, Tensor]


def per_class(classes: int) -> Tensor:
    return torch.linspace(-0.3, 0.5, classes, dtype=torch.float64)


ANGULAR = {"margin_type": "angular", "margin": 0.5, "scale": 8.0}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"margin": -0.2, "scale": 8.0},
    "angular": ANGULAR,
    "straight through, easy": ANGULAR | {"margin_gradient": "straight_through", "beyond_pi": "easy"},
    "combined": {"margin_type": "combined", "margin": 0.2, "angular_margin_rad": 0.3, "angular_multiplier": 1.5},
    "dot": {"similarity": "dot", "margin": 0.1, "scale": 0.5},
    "distance": {"similarity": "negative_squared_euclidean", "scale": 0.5, "label_smoothing": 0.1},
    "learnable": {"learnable_scale": True, "learnable_margin": True, "margin": 0.1, "scale": 4.0},
    "learnable angle": ANGULAR | {"learnable_margin": True},
    "smooth": {"label_smoothing": 0.2, "margin": 0.3},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none", "label_smoothing": 0.1},
    "centers": ANGULAR | {"centers_per_class": 3},
    "soft centers": {"centers_per_class": 3, "center_temperature": 0.2, "scale": 8.0},
}
OF_CLASSES: dict[str, Callable[[Tensor], dict[str, Any]]] = {
    "a margin a class": lambda v: {"margin": v},
    "that learns": lambda v: {"margin": v, "learnable_margin": True, "margin_type": "angular"},
    "class weights": lambda v: {"class_weight": v + 1, "label_smoothing": 0.1, "logit_bias": 2 * v},
    "a bias": lambda v: {"logit_bias": v, "margin": -0.1, "scale": 8.0},
}
SHAPES = {
    1: [(7, (5,))],
    2: [(7, (3, 0))],
    3: [(5, (2, 4, 1)), (2, (2, 2, 2))],
    4: [(5, (0, 3, 1, 2)), (3, (1, 2, 0, 3))],
}


def cases(num_ranks: int) -> Iterator[tuple[str, Case]]:
    for classes, counts in SHAPES[num_ranks]:
        where = f"{classes} classes, rows {counts}"
        for name, options in OPTIONS.items():
            yield f"{name}, {where}", Case(classes, counts, options)
        for name, make in OF_CLASSES.items():
            yield f"{name}, {where}", Case(classes, counts, make(per_class(classes)))
        yield f"of samples, {where}", Case(classes, counts, {"label_smoothing": 0.1}, ("scale", "margin"))
        combined = Case(classes, counts, OPTIONS["combined"], ("angular_margin_rad", "margin"))
        yield f"combined of samples, {where}", combined
        yield f"float32, {where}", Case(classes, counts, ANGULAR, dtype=torch.float32)
    yield "no rows at all", Case(5, (0,) * num_ranks, {"margin": 0.1})


def gradients(loss: MarginSoftmaxLoss, x: Tensor, values: dict[str, Tensor], value: Tensor) -> dict[str, Tensor]:
    """The loss and every gradient, those of DTensors here alone."""
    found = {"loss": value.detach(), "embeddings": x.grad} | {name: v.grad for name, v in values.items()}
    for name, parameter in loss.named_parameters():
        grad = parameter.grad
        found[f"module's {name}"] = grad.to_local() if isinstance(grad, DTensor) else grad
    return found


def made(kind: Callable[..., MarginSoftmaxLoss], case: Case, **more: Any) -> MarginSoftmaxLoss:
    torch.manual_seed(0)
    with torch.random.fork_rng():
        return kind(case.classes, WIDTH, **case.options, **more).to(case.dtype)


def step(loss: MarginSoftmaxLoss, x: Tensor, labels: Tensor, of_samples: dict[str, Tensor]) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    of_samples = {name: v.clone().requires_grad_() for name, v in of_samples.items()}
    if isinstance(loss, ShardedMarginSoftmaxLoss):
        value = loss(x, labels, **of_samples)
    else:
        value = loss._softmax(x, labels, **of_samples)
    (value * torch.arange(1, len(value) + 1) if value.dim() else value * 3).sum().backward()
    return gradients(loss, x, of_samples, value)


def on_ranks(rank: int, num_ranks: int) -> list[dict[str, Tensor]]:
    found = []
    for name, case in cases(num_ranks):
        try:
            inputs, loss = case.draw(), made(ShardedMarginSoftmaxLoss, case)
            loss.equal_batches = len(set(case.counts)) == 1  # then nothing is compared, and nothing else is different
            with torch.no_grad():
                loss.weight.to_local().copy_(loss._shards.part(inputs.weight).to_local())
            x, labels = (t.split(case.counts)[rank] for t in (inputs.x, inputs.labels))
            found.append(step(loss, x, labels, {n: v.split(case.counts)[rank] for n, v in inputs.of_samples.items()}))
        except BaseException as error:
            raise RuntimeError(f"in case {name!r}") from error
    return found


def in_one_process(case: Case) -> dict[str, Tensor]:
    inputs, loss = case.draw(), made(MarginSoftmaxLoss, case)
    with torch.no_grad():
        loss.weight.copy_(inputs.weight)
    if case.options.get("reduction") == "none":  # the weights of `step` begin anew on each rank
        x = inputs.x.clone().requires_grad_()
        value = loss(x, inputs.labels)
        (value * torch.cat([torch.arange(1, n + 1) for n in case.counts])).sum().backward()
        return gradients(loss, x, {}, value)
    return step(loss, inputs.x, inputs.labels, inputs.of_samples)


@pytest.mark.parametrize("num_ranks", SHAPES)
def test_loss_and_gradients_are_those_of_one_process(num_ranks: int, tmp_path: Path) -> None:
    found = ranks.run(on_ranks, num_ranks, tmp_path, num_ranks)
    for i, (name, case) in enumerate(cases(num_ranks)):
        expected = in_one_process(case)
        of_each = -(-case.classes // num_ranks)
        for rank in range(num_ranks):
            rows = sum(case.counts[:rank]), sum(case.counts[: rank + 1])
            assert found[rank][i].keys() == expected.keys(), name
            for what, want in expected.items():
                if what in ("embeddings", *case.of_samples) or (what == "loss" and want.dim()):
                    want = want[rows[0] : rows[1]]
                elif what.startswith("module's") and want.dim():
                    want = want[rank * of_each : (rank + 1) * of_each]
                torch.testing.assert_close(
                    found[rank][i][what],
                    want,
                    rtol=1e-10 if case.dtype == torch.float64 else 2e-5,
                    atol=1e-12 if case.dtype == torch.float64 else 1e-6,
                    msg=lambda text, w=what, n=name, r=rank: f"{w} of {n} on rank {r}: {text}",
                )


def others(rank: int) -> dict[str, Any]:
    """Predictions, the values that a seed gives, and a loss over two of four ranks."""
    torch.manual_seed(1)
    loss = ShardedMarginSoftmaxLoss(5000, WIDTH, scale=4.0)
    x = torch.randn(8, WIDTH)
    with pytest.raises(RuntimeError, match="to_linear: expected a loss of one process, got one over many ranks"):
        loss.to_linear()
    found = {"weight": loss.weight.full_tensor().detach(), "logits": loss.predictions(x.split(2)[rank]).full_tensor()}
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "classes"))
    with pytest.raises(ValueError, match=r"mesh: expected one dimension of ranks, as mesh\['name'\] is, got 2"):
        ShardedMarginSoftmaxLoss(5, WIDTH, mesh=mesh)
    of_two = ShardedMarginSoftmaxLoss(5, WIDTH, mesh=mesh["classes"])
    found["two"] = of_two(x.split(2)[rank], torch.tensor([rank, 4])).detach()
    return found | {"two's weight": of_two.weight.full_tensor().detach()}


def test_predictions_seeds_and_a_mesh_of_some_ranks(tmp_path: Path) -> None:
    found = ranks.run(others, 4, tmp_path)
    torch.manual_seed(1)
    torch.randint(2**62, ())  # as the loss draws its seed
    x = torch.randn(8, WIDTH)
    one = MarginSoftmaxLoss(5000, WIDTH, scale=4.0)
    (alone,) = ranks.run(only_weight, 1, tmp_path)
    for rank, of_rank in enumerate(found):
        assert torch.equal(of_rank["weight"], alone)
        with torch.no_grad():
            one.weight.copy_(alone)
            torch.testing.assert_close(of_rank["logits"], one.predictions(x))
        pair = rank // 2
        labels = torch.tensor([2 * pair, 4, 2 * pair + 1, 4])
        of_two = margin_softmax_loss(x[4 * pair : 4 * pair + 4], of_rank["two's weight"], labels)
        torch.testing.assert_close(of_rank["two"], of_two)
    assert alone.std() == pytest.approx(WIDTH**-0.5, rel=0.02)
    assert len(alone[:, 0].unique()) > 4990, "blocks of classes are drawn apart"


def only_weight(rank: int) -> Tensor:
    torch.manual_seed(1)
    return ShardedMarginSoftmaxLoss(5000, WIDTH).weight.full_tensor().detach()
