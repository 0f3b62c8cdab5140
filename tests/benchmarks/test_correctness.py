"""The correctness check fails for who is wrong, and for nobody else."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.correctness import check_choice, check_sample
from benchmarks.workload import Implementation, Workload
from benchmarks.workloads import ROWS, WORKLOADS
from fused_margins.backends import registry
from fused_margins.ops.sample import sample

from .samples import faults, smallest_row, tampered, workload

PEER = Implementation("peer", lambda inputs: dict)


FEW = {"easy_positives", "hardest_negatives", "sample", "easy_positive_triplet"}  # a batch of fewer rows will do


def outputs_of(implementation: Implementation, inputs: dict[str, Any]) -> dict[str, torch.Tensor] | None:
    """None for a backend that is not here."""
    try:
        return implementation.step(inputs)()
    except RuntimeError as error:
        if f"backend {implementation.backend!r} cannot run" not in str(error):
            raise
        return None


def assert_all_pass(w: Workload, inputs: dict[str, Any]) -> None:
    check = w.check(inputs)  # once: what it compares with takes longer than most implementations
    for implementation in w.implementations:
        here = implementation.name != "torch.compile" and "cpu" in implementation.devices
        if here and implementation.refuses(inputs) is None:
            outputs = outputs_of(implementation, inputs)
            assert outputs is None or check(implementation, outputs) == [], implementation.name


@pytest.mark.parametrize("name", [w.name for w in WORKLOADS if not w.name.startswith("nearest_")])
def test_every_implementation_passes(name: str) -> None:
    inputs = smallest_row(name).inputs()
    if name in FEW:
        inputs = {"embeddings": inputs["embeddings"][:128], "labels": torch.arange(128) % 32}
    assert_all_pass(workload(name), inputs)


@pytest.mark.parametrize(
    ("name", "output"),
    [
        ("contrast", "negative_lse"),
        ("contrast", "grad_y"),
        ("margin_softmax", "loss"),
        ("margin_softmax", "grad_weight"),
        ("magnet", "grad_embeddings"),
        ("cluster_distances", "distances"),
    ],
)
def test_a_peer_off_by_a_thousandth_is_wrong(name: str, output: str) -> None:
    row = smallest_row(name)
    wrong = tampered(row.workload.implementation("eager"), output, lambda t: t * 1.001)
    (line,) = faults(row, wrong)
    assert line.startswith(f"{output}: relative error 0.001")


@pytest.mark.parametrize("name", ["eager", "reference"])
def test_a_missing_or_misshapen_gradient_is_wrong(name: str) -> None:
    row = smallest_row("magnet")
    implementation = row.workload.implementation(name)
    inputs = row.inputs()
    check, outputs = row.workload.check(inputs), implementation.step(inputs)()
    gradient = outputs.pop("grad_embeddings")
    assert check(implementation, outputs) == ["grad_embeddings: expected shape (48, 128), got None"]
    outputs["grad_embeddings"] = gradient[:1]
    assert check(implementation, outputs) == ["grad_embeddings: expected shape (48, 128), got (1, 128)"]


@pytest.mark.parametrize(
    ("name", "op"), [("contrast", "contrast"), ("margin_softmax", "contrast"), ("magnet", "magnet")]
)
def test_a_kernel_off_by_a_hundred_thousandth_is_wrong(name: str, op: str) -> None:
    """By the rule of the tests: a peer could be."""
    row = smallest_row(name)
    cpu = row.workload.implementation("cpu")
    if outputs_of(cpu, row.inputs()) is None:
        pytest.skip("no C++ kernels")
    kernel = registry.kernel(op, "cpu")

    def forward(*args: Any) -> Any:
        *outputs, saved = kernel.forward(*args)
        return *(None if t is None else 1.00001 * t for t in outputs), saved

    assert faults(row, cpu) == []
    with registry.substitute(op, "cpu", SimpleNamespace(**(vars(kernel) | {"forward": forward}))):
        assert any("error" in line for line in faults(row, cpu))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda index: index.roll(1), "index: off by inf"),  # mostly another class
        (lambda index: index.new_full(index.shape, -1), "index: a choice where there is none"),
        (lambda index: torch.arange(len(index)), "index: off by inf"),  # the row itself
    ],
)
def test_a_wrong_choice_is_wrong(change: Callable[[torch.Tensor], torch.Tensor], says: str) -> None:
    row = smallest_row("easy_positives")
    (line,) = faults(row, tampered(row.workload.implementation("sorted bmm"), "index", change))
    assert line.startswith(says)


def test_a_choice_that_is_not_the_best_is_wrong() -> None:
    """Of the same class, so that only its similarity tells."""
    row = smallest_row("easy_positives")
    labels = row.inputs()["labels"]

    def second_best(index: torch.Tensor) -> torch.Tensor:
        everyone = torch.arange(len(labels))
        others = (labels == labels[0]) & (everyone != 0) & (everyone != index[0])
        return index.clone().index_fill_(0, torch.tensor([0]), int(others.nonzero()[0, 0]))

    (line,) = faults(row, tampered(row.workload.implementation("eager"), "index", second_best))
    assert line.startswith("index: off by 0.")


@pytest.mark.parametrize("relation", ["same", "different", "any"])
@pytest.mark.parametrize("similarity", ["cosine", "negative_squared_euclidean"])
def test_choices_are_checked_some_rows_at_a_time(
    relation: str, similarity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(23, 5, generator=torch.Generator().manual_seed(0))
    unit = torch.nn.functional.normalize(x.double())
    u = unit @ unit.T if similarity == "cosine" else -torch.cdist(x.double(), x.double()).square()
    labels, itself = torch.arange(23) % 4, torch.arange(23)
    problem = {"x": x, "y": x, "row_labels": labels, "column_labels": labels, "similarity": similarity}
    problem |= {"relation": relation, "self_index": itself}
    same = labels[:, None] == labels
    mask = {"same": same, "different": ~same, "any": torch.ones_like(same)}[relation].clone().fill_diagonal_(False)
    ranked = u.masked_fill(~mask, -torch.inf).argsort(1, descending=True)
    for entries in (1, 100, 10**6):
        monkeypatch.setattr("benchmarks.correctness.ENTRIES_AT_ONCE", entries)
        check = check_choice({}, lambda inputs: problem)
        assert check(PEER, {"index": ranked[:, 0]}) == []
        assert check(PEER, {"index": ranked[:, 1]}) != []
        (line,) = check(PEER, {"index": ranked[:, -1]})
        assert line.startswith("index: off by inf")


def test_samples_are_checked_by_their_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels = torch.randn(300, 16, generator=torch.Generator().manual_seed(0)) + 1.5, torch.arange(300) % 5
    problem = {"x": x, "y": x, "row_labels": labels, "column_labels": labels, "relation": "different"}
    problem |= {"self_index": None, "seed": torch.tensor(1)}
    sampled = sample(x, x, labels, labels, torch.tensor(1))
    open_to_row = (labels[:, None] != labels).float()
    evenly = torch.multinomial(open_to_row, 1, generator=torch.Generator().manual_seed(0))[:, 0]
    for entries in (1000, 10**6):
        monkeypatch.setattr("benchmarks.correctness.ENTRIES_AT_ONCE", entries)
        check = check_sample({}, lambda inputs: problem)
        assert check(PEER, {"index": sampled}) == []
        assert check(PEER, {"index": evenly})[0].startswith("index: the mean of log weights is off by ")
        (line,) = check(PEER, {"index": sample(x, x, labels, labels, torch.tensor(1), relation="same")})
        assert line.endswith(" columns that are not open to their row")
        for index in (sampled[:-1], sampled - 1000):
            assert check(PEER, {"index": index}) == ["index: expected a column for every row"]


@pytest.mark.parametrize("name", ["nearest_cluster", "nearest_of_all"])
def test_nearest_centres_of_few_points(name: str) -> None:
    """Also in bfloat16: they are found as exactly as others."""
    row = next(row for row in ROWS if row.workload.name == name)
    whole = row.inputs()
    for dtype in (torch.float32, torch.bfloat16):
        inputs = {n: t[:100].to(dtype) if t.is_floating_point() else t[:100] for n, t in whole.items()}
        if "labels" in inputs:
            inputs["labels"] = inputs["centroid_labels"].clone()
        assert_all_pass(workload(name), inputs)
