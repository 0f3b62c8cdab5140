"""`kmeans`: its formula, what its checks read, and the two ways in which a CPU runs it."""

import pytest
import torch
from torch import Tensor

from fused_margins.ops import cases
from fused_margins.ops.cases import Inputs
from fused_margins.ops.kmeans import kernel_cpu, kmeans
from tests.conftest import backends

OP = cases.load("kmeans")
on_cpu = pytest.mark.parametrize("backend", [b for b in backends("kmeans") if b == "cpu"])


def inputs_of(name: str = "heaps") -> Inputs:
    return next(c for c in OP.CASES if c.name == name).make(torch.Generator().manual_seed(0))


def by_hand(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Centroids and assignments: a class after the other, a sample after the other."""
    x, waiting, centroids = inputs["x"], inputs["waiting"], []
    assignments = torch.full((len(x),), -1)
    members = inputs["members"].split(inputs["sizes"].tolist())
    for own, slots in zip(members, inputs["slots"].tolist()):
        own = own.sort().values
        seeds = [own[waiting[0, own].argmin()]]
        while len(seeds) < slots:
            squared = (x[own, None] - x[torch.stack(seeds)]).square().sum(2).min(1).values
            time = torch.where(squared > 0, waiting[len(seeds), own] / squared, torch.inf)
            seeds.append(own[time.argmin()])
        means = x[torch.stack(seeds)]
        for step in range(inputs["num_iterations"] + 1):
            nearest = torch.cdist(x[own], means).argmin(1)
            if step < inputs["num_iterations"]:
                means = torch.stack([x[own[nearest == m]].mean(0) for m in range(slots)])
        assignments[own] = nearest + sum(len(c) for c in centroids)
        centroids.append(means)
    return torch.cat(centroids), assignments


@pytest.mark.parametrize("name", [c.name for c in OP.CASES if c.name != "equal"])  # there clusters are empty
def test_the_definition_is_its_formula(name):
    inputs = inputs_of(name)
    centroids, assignments = by_hand(inputs)
    got = OP.run(inputs, "reference")
    torch.testing.assert_close(got["centroids"], centroids, rtol=1e-10, atol=1e-10)
    assert torch.equal(got["assignments"], assignments)
    squared = (inputs["x"] - centroids[assignments]).square().sum(1)
    torch.testing.assert_close(got["squared_distances"], squared, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"sizes": torch.tensor([23, 5, 18])}, ValueError, "sizes: expected 3 numbers from 1 on, 45 together"),
        ({"sizes": torch.tensor([28, 0, 17])}, ValueError, "sizes: expected 3 numbers from 1 on, 45 together"),
        ({"slots": torch.tensor([3, 3, 4])}, ValueError, "slots: expected 3 numbers from 1 on, 9 together"),
        ({"slots": torch.tensor([1, 6, 2])}, ValueError, "slots: expected at most as many clusters as samples"),
        ({"num_clusters": 10}, ValueError, "slots: expected 3 numbers from 1 on, 10 together"),
        ({"largest_class": 24}, ValueError, "largest_class: expected the largest of sizes, got 24"),
        ({"members": torch.arange(45) + 1}, IndexError, "members: expected every one of the 45 samples once"),
        ({"members": torch.arange(45) - 1}, IndexError, "members: expected every one of the 45 samples once"),
        ({"members": torch.arange(45) // 2}, IndexError, "members: expected every one of the 45 samples once"),
        ({"waiting": torch.ones(2, 45)}, ValueError, "waiting: expected one row for each cluster of a class"),
    ],
)
def test_what_kernels_index_memory_by_is_read_first(change, error, message):
    with pytest.raises(error, match=f"^{message}"):
        kmeans(**inputs_of() | change)


@pytest.mark.parametrize("backend", backends("kmeans"))
def test_so_many_updates_as_were_asked_for(backend):
    """Of samples without heaps, whose clusters still move: the cases have settled before their last update."""
    inputs = inputs_of() | {"x": torch.randn(45, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)}
    before = None
    for num_iterations in range(4):
        centroids, assignments = by_hand(inputs | {"num_iterations": num_iterations})
        got = OP.run(inputs | {"num_iterations": num_iterations}, backend)
        torch.testing.assert_close(got["centroids"], centroids, rtol=1e-10, atol=1e-10)
        assert torch.equal(got["assignments"], assignments)
        assert before is None or not torch.allclose(before, centroids)
        before = centroids


@pytest.mark.parametrize("name", [c.name for c in OP.CASES])
@on_cpu
def test_in_one_call_and_in_passes(name, backend, monkeypatch):
    """A class that fits a core's cache takes another way: the same clusters."""
    inputs = cases.convert(inputs_of(name), torch.float32)
    together = OP.run(inputs, backend)
    monkeypatch.setattr(kernel_cpu, "CLASS_BYTES", 0)
    in_passes = OP.run(inputs, backend)
    assert torch.equal(together["assignments"], in_passes["assignments"])
    for output in ("centroids", "squared_distances"):
        torch.testing.assert_close(together[output], in_passes[output], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("name", "values", "error"),
    [
        ("members", [0, 1, 2, 9], IndexError),
        ("members", [0, 1, 2, 2], IndexError),
        ("sizes", [4, 4], ValueError),
        ("slots", [1, 2], ValueError),
    ],
)
def test_values_are_looked_at_in_every_call(backend, name, values, error):
    inputs = {
        "x": torch.eye(4),
        "members": torch.arange(4),
        "sizes": torch.tensor([2, 2]),
        "slots": torch.tensor([1, 1]),
        "waiting": torch.ones(1, 4, dtype=torch.float64),
        "num_clusters": 2,
        "largest_class": 2,
    }
    kmeans(**inputs, backend=backend)  # a call of the same sizes, which was right
    for other in ("x", "waiting"):
        with pytest.raises(ValueError, match=f"^{other}: expected finite values"):
            kmeans(**(inputs | {other: inputs[other] * torch.nan}), backend=backend)
    with pytest.raises(error, match=f"{name}: expected"):
        kmeans(**(inputs | {name: torch.tensor(values)}), backend=backend)
