"""The gate must close on who is wrong, and open for all others."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fused_margins.losses.sampling import random_negatives
from fused_margins.ops.draw import draw
from fused_margins.ops.draw.reference import log_weight
from fused_margins.ops.similarity import unit_rows

from benchmarks.gate import judge_choice, judge_draw
from benchmarks.workload import Contestant
from benchmarks.workloads import WORKLOADS, clusters, margin_softmax
from fused_margins.ops import registry

from .samples import faults, smallest_row, tampered, workload


@pytest.mark.parametrize("name", [w.name for w in WORKLOADS if w.name != "nearest_cluster"])
def test_every_contestant_passes_the_gate(name: str) -> None:
    row = smallest_row(name)
    inputs = row.inputs()
    judge = row.workload.judge(inputs)  # once: what it compares with takes longer than most contestants
    for contestant in row.contestants:
        if contestant.name != "torch.compile" and contestant.refuses(inputs) is None:
            assert judge(contestant, contestant.step(inputs)()) == [], contestant.name


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
def test_a_peer_off_by_a_thousandth_is_red(name: str, output: str) -> None:
    row = smallest_row(name)
    wrong = tampered(row.workload.contestant("eager"), output, lambda t: t * 1.001)
    (line,) = faults(row, wrong)
    assert line.startswith(f"{output}: relative error 0.001")


@pytest.mark.parametrize("name", ["eager", "reference"])
def test_a_missing_or_misshapen_gradient_is_red(name: str) -> None:
    row = smallest_row("magnet")
    contestant = row.workload.contestant(name)
    inputs = row.inputs()
    judge, outputs = row.workload.judge(inputs), contestant.step(inputs)()
    gradient = outputs.pop("grad_embeddings")
    assert judge(contestant, outputs) == ["grad_embeddings: expected shape (48, 128), got None"]
    outputs["grad_embeddings"] = gradient[:1]
    assert judge(contestant, outputs) == ["grad_embeddings: expected shape (48, 128), got (1, 128)"]


@pytest.mark.parametrize("name", ["contrast", "margin_softmax"])
def test_a_kernel_off_by_a_thousandth_is_red(name: str) -> None:
    row = smallest_row(name)
    cpu = row.workload.contestant("cpu")
    if reason := cpu.refuses(row.inputs()):
        pytest.skip(f"cpu: {reason}")
    kernel = registry.kernel(name, "cpu")

    def forward(*args: Any) -> Any:
        first, *others = kernel.forward(*args)
        return 1.001 * first, *others

    assert faults(row, cpu) == []
    with registry.substitute(name, "cpu", SimpleNamespace(forward=forward, backward=kernel.backward)):
        assert any("error" in line for line in faults(row, cpu))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda index: index.roll(1), "index: off by inf"),  # mostly another class
        (lambda index: index.new_full(index.shape, -1), "index: a choice where there is none"),
        (lambda index: torch.arange(len(index)), "index: off by inf"),  # the row itself
    ],
)
def test_a_wrong_choice_is_red(change: Callable[[torch.Tensor], torch.Tensor], says: str) -> None:
    row = smallest_row("easy_positives")
    (line,) = faults(row, tampered(row.workload.contestant("sorted bmm"), "index", change))
    assert line.startswith(says)


def test_a_choice_that_is_not_the_best_is_red() -> None:
    """Of the same class, so that only its similarity tells."""
    row = smallest_row("easy_positives")
    labels = row.inputs()["labels"]

    def second_best(index: torch.Tensor) -> torch.Tensor:
        everyone = torch.arange(len(labels))
        others = (labels == labels[0]) & (everyone != 0) & (everyone != index[0])
        return index.clone().index_fill_(0, torch.tensor([0]), int(others.nonzero()[0, 0]))

    (line,) = faults(row, tampered(row.workload.contestant("eager"), "index", second_best))
    assert line.startswith("index: off by 0.")


@pytest.mark.parametrize("relation", ["same", "different", "any"])
@pytest.mark.parametrize("with_self", [False, True])
def test_choices_are_judged_some_rows_at_a_time(
    relation: str, with_self: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(23, 5, generator=g)
    u = (x.double() @ x.double().T).div_(x.double().norm(dim=1)).div_(x.double().norm(dim=1)[:, None])
    labels, itself = torch.arange(23) % 4, torch.arange(23)
    problem = {"x": x, "y": x, "row_labels": labels, "column_labels": labels, "similarity": "cosine"}
    problem |= {"relation": relation, "self_index": itself if with_self else None}
    same = labels[:, None] == labels
    mask = {"same": same, "different": ~same, "any": torch.ones_like(same)}[relation].clone()
    if with_self:
        mask.fill_diagonal_(False)
    ranked = u.masked_fill(~mask, -torch.inf).argsort(1, descending=True)
    peer = Contestant("peer", lambda inputs: dict)
    for entries in (1, 100, 10**6):
        monkeypatch.setattr("benchmarks.gate.ENTRIES_AT_ONCE", entries)
        judge = judge_choice(lambda inputs: inputs)(problem)
        assert judge(peer, {"index": ranked[:, 0]}) == []
        assert judge(peer, {"index": ranked[:, 1]}) != []
        (line,) = judge(peer, {"index": ranked[:, -1]})
        assert line.startswith("index: off by inf") == (not mask.all())


def test_draws_are_judged_by_their_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels = torch.randn(600, 16, generator=torch.Generator().manual_seed(0)) + 1.5, torch.arange(600) % 5
    problem = {"x": x, "y": x, "row_labels": labels, "column_labels": labels}
    peer, seed = Contestant("peer", lambda inputs: dict), torch.tensor(1)
    drawn = draw(x, x, labels, labels, seed)
    evenly = random_negatives(labels, labels, None, torch.Generator().manual_seed(0))
    unit = unit_rows(x.double())
    weight = log_weight(2 - 2 * unit @ unit.T, 16).masked_fill(labels[:, None] == labels, -torch.inf)
    mean = (weight.softmax(1) * weight.nan_to_num(neginf=0.0)).sum(1, keepdim=True)
    always_near_the_mean = (weight - mean).abs().argmin(1)
    for entries in (1000, 10**6):
        monkeypatch.setattr("benchmarks.gate.ENTRIES_AT_ONCE", entries)
        judge = judge_draw(lambda inputs: inputs)(problem)
        assert judge(peer, {"index": drawn}) == []
        assert judge(peer, {"index": evenly})[0].startswith("index: the mean of log weights is off by ")
        (line,) = judge(peer, {"index": always_near_the_mean})
        assert line.startswith("index: the variance of log weights is off by -")
        (line,) = judge(peer, {"index": draw(x, x, labels, labels, seed, relation="same")})
        assert line.endswith(" columns that are not open to their row")
        for index in (drawn[:-1], drawn - 1000):
            assert judge(peer, {"index": index}) == ["index: expected a column for every row"]


@pytest.mark.parametrize("margin", [0.0, 0.35])
def test_the_truth_in_blocks_is_the_reference(margin: float) -> None:
    g = torch.Generator().manual_seed(0)
    inputs = {"embeddings": torch.randn(9, 6, generator=g).double(), "weight": torch.randn(31, 6, generator=g).double()}
    inputs |= {"labels": torch.arange(9) * 3, "scale": 8.0, "margin": margin, "margin_type": "additive"}
    whole, blocks = margin_softmax.truth(inputs)(), margin_softmax.truth(inputs, entries_at_once=9 * 7)()
    assert whole.keys() == blocks.keys()
    for name, expected in whole.items():
        torch.testing.assert_close(blocks[name], expected, rtol=1e-12, atol=1e-14)


def test_sixteen_bit_centres_are_found_as_exactly_as_others() -> None:
    labelled = clusters._labelled(300, 16, 200, torch.bfloat16, torch.Generator().manual_seed(0))
    for name, inputs in (
        ("nearest_cluster", labelled),
        ("nearest_of_all", {n: labelled[n] for n in list(labelled)[:2]}),
    ):
        judge = workload(name).judge(inputs)
        for contestant in workload(name).contestants:
            if contestant.name != "torch.compile" and contestant.refuses(inputs) is None:
                assert judge(contestant, contestant.step(inputs)()) == [], (name, contestant.name)
