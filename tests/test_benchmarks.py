"""The benchmark harness: its gate must close, its turns alternate, its memory figures be true, its files whole."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import memory, results, tables, timing
from benchmarks.gate import judge_choice
from benchmarks.machine import ROOT, Gpu, Machine, RunsWith
from benchmarks.results import Figure, Results, ResultsError, RowResult
from benchmarks.rows import measure
from benchmarks.workload import Contestant, Row, Workload, captured, ours, unless_installed
from benchmarks.workloads import ROWS, WORKLOADS, clusters, find_row, margin_softmax, ops, rows_on
from fused_margins.ops import registry

WITH = RunsWith(commit="abc", versions={"torch": "2.9"}, load_before=0.5)
GPU_VERSIONS = {"torch": "2.11", "cuda": "13.0", "driver": "580.1", "triton": "3.6", "processor": "A CPU, 8 CPUs"}
GPU = Gpu(gpu="NVIDIA H100 80GB HBM3")
MACHINE = Machine(processor="Some CPU(R) 9", cpus=8, threads=2, instruction_set="v3")


def workload(name: str) -> Workload:
    return next(w for w in WORKLOADS if w.name == name)


def smallest_row(name: str) -> Row:
    """The workload's least row in float32."""
    rows = [row for row in ROWS if row.workload.name == name and row.dtype == torch.float32]
    return min(rows, key=lambda row: sum(t.numel() for t in row.inputs().values() if isinstance(t, torch.Tensor)))


def faults(row: Row, contestant: Contestant) -> list[str]:
    inputs = row.inputs()
    return row.workload.judge(inputs)(contestant, contestant.step(inputs)())


def tampered(contestant: Contestant, output: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Contestant:
    """`contestant` with one of its outputs changed."""

    def prepare(inputs: dict[str, Any]) -> Callable[[], dict[str, torch.Tensor]]:
        step = contestant.prepare(inputs)

        def wrong() -> dict[str, torch.Tensor]:
            outputs = step()
            return outputs | {output: change(outputs[output])}

        return wrong

    return dataclasses.replace(contestant, prepare=prepare)


# The gate


@pytest.mark.parametrize("name", [w.name for w in WORKLOADS if w.name != "nearest_cluster"])
def test_every_contestant_passes_the_gate(name: str) -> None:
    row = smallest_row(name)
    for contestant in row.contestants:
        if contestant.name != "torch.compile" and contestant.refuses(row.inputs()) is None:
            assert faults(row, contestant) == [], contestant.name


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


# Workloads follow the registry


def test_every_op_and_backend_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {w.name for w in WORKLOADS} >= set(registry.OPS)
    for w in WORKLOADS:
        assert {c.backend for c in w.contestants} - {None} == {b.name for b in registry.BACKENDS} | (
            {"auto"} if w.name in ("magnet", "margin_softmax") else set()
        ), w.name
    new = registry.Backend("new", lambda problem: "has no such device", lambda problem: "")
    monkeypatch.setattr(registry, "BACKENDS", [*registry.BACKENDS, new])
    monkeypatch.setattr(registry, "_HAS_KERNEL", registry._HAS_KERNEL | {("contrast", "new"): True})
    contestant = ops._workload("contrast").contestant("new")
    assert contestant.refuses(smallest_row("contrast").inputs()) == "has no such device"


def test_an_op_without_eager_code_is_measured_against_its_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    assert workload("contrast").baseline == "eager"
    monkeypatch.delitem(ops.EAGER, "contrast")
    assert ops._workload("contrast").baseline == "reference"


def test_rows_have_names_of_their_own() -> None:
    assert len({row.id for row in ROWS}) == len(ROWS)
    assert all(find_row(row.id) is row for row in ROWS)
    with pytest.raises(LookupError, match="no row magnet-1x1"):
        find_row("magnet-1x1")


def test_a_gpu_has_its_own_sizes_and_contestants() -> None:
    on_gpu = {row.id: row for row in rows_on("cuda")}
    assert len(on_gpu) == len(rows_on("cuda"))
    assert all(row.device == "cuda" for row in on_gpu.values())
    assert "margin_softmax-huge-512x512x100000-float32" not in on_gpu
    largest = [row for name, row in on_gpu.items() if name.startswith("margin_softmax-many_classes-1024x512x1000000-")]
    assert [row.dtype for row in largest] == [torch.bfloat16]
    for name in ("nearest_of_all-index-1000000x128x4096-bfloat16", "hardest_negatives-batch-32768x512x4-float32"):
        assert name in on_gpu
        assert name not in {row.id for row in ROWS}

    def names(row: Row) -> set[str]:
        return {c.name for c in row.contestants}

    gpu_alone = {"cut-cross-entropy", "Liger", "three products alone"}
    graphs = {f"{name}, CUDA graph" for name in ("eager", "torch.compile", "auto")}
    few_shot = "margin_softmax-few_shot-256x512x64-float32"
    assert gpu_alone | graphs <= names(on_gpu[few_shot])
    assert gpu_alone <= names(largest[0])
    assert not graphs & names(largest[0])
    assert graphs <= names(on_gpu["magnet-batch-12x16x1024-float32"])
    assert not (gpu_alone | graphs) & names(find_row(few_shot))
    assert "cpu, no memory" not in names(on_gpu[few_shot])


def test_a_peer_that_is_not_installed_is_refused() -> None:
    assert unless_installed("torch", "no_such_module")({}) == "no_such_module not installed"
    assert unless_installed("torch")({}) is None
    assert smallest_row("margin_softmax").workload.contestant("Liger").devices == ("cuda",)


def test_inputs_are_the_same_every_time() -> None:
    row = smallest_row("margin_softmax")
    once, again = row.inputs(), row.inputs()
    assert all(torch.equal(t, again[n]) for n, t in once.items() if isinstance(t, torch.Tensor))


# Turns


class Runners:
    """Steps that move a clock and write down their names."""

    def __init__(self, **seconds: float) -> None:
        self.now, self.order = 0.0, ""
        self.steps = {name: lambda name=name, s=s: self.run(name, s) for name, s in seconds.items()}

    def run(self, name: str, seconds: float) -> None:
        self.now += seconds
        self.order += name

    def times(self, seconds_each: float) -> dict[str, timing.Times]:
        return timing.take_turns(self.steps, seconds_each, clock=lambda: self.now)


def test_turns_alternate_and_the_times_are_those_of_the_clock() -> None:
    runners = Runners(a=0.01, b=0.02, c=0.03)
    times = runners.times(0.2)
    warm_up = "a" * 6 + "b" * 4 + "c" * 3  # the first call, and what fills WARM_UP_S
    assert runners.order == warm_up + "abc" * 10  # 0.6 s, 0.06 s a round
    assert {n: t.median for n, t in times.items()} == pytest.approx({"a": 0.01, "b": 0.02, "c": 0.03})
    assert all(len(t.seconds) == 10 and t.calls_per_turn == 1 for t in times.values())


def test_short_calls_are_timed_several_at_once() -> None:
    times = Runners(a=1e-5, b=5e-4).times(0.0)
    assert (times["a"].calls_per_turn, times["b"].calls_per_turn) == (100, 2)
    assert times["a"].median == pytest.approx(1e-5)


def test_rounds_are_at_least_and_at_most() -> None:
    assert len(Runners(a=10.0).times(0.0)["a"].seconds) == timing.LEAST_ROUNDS
    assert len(Runners(a=0.01).times(1e9)["a"].seconds) == timing.MOST_ROUNDS


def test_who_is_far_behind_leaves_after_the_least_rounds() -> None:
    times = Runners(fast=0.01, slow=0.5).times(10.0)
    assert len(times["slow"].seconds) == timing.LEAST_ROUNDS
    assert len(times["fast"].seconds) == timing.MOST_ROUNDS


def test_quartiles_surround_the_median() -> None:
    times = timing.Times((1.0, 2.0, 3.0, 4.0, 50.0), 1)
    assert (times.quartiles[0], times.median) == (1.5, 3.0)
    assert times.quartiles[1] > 4


def test_a_turn_ends_when_the_device_has_nothing_left_to_do() -> None:
    """Calls return at once and are done 10 us later each; a wait costs 20 us of its own."""
    now, done, waits = 0.0, 0.0, 0

    def step() -> None:
        nonlocal done
        done = max(done, now) + 1e-5

    def wait() -> None:
        nonlocal now, waits
        now, waits = max(now, done) + 2e-5, waits + 1

    times = timing.take_turns({"a": step}, 0.0, clock=lambda: now, wait=wait)["a"]
    assert times.calls_per_turn * times.median >= timing.TURN_S
    assert times.median == pytest.approx(1e-5, rel=0.05)  # the wait hardly shows
    assert waits > len(times.seconds)


def test_the_fastest_setting_is_one_that_fits_into_memory() -> None:
    def too_large() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert timing.fastest([too_large, dict], 1e-6) is dict


# A row


def test_a_row_without_figures_for_the_wrong_the_failing_and_the_refused() -> None:
    magnet = smallest_row("magnet")
    eager = magnet.workload.contestant("eager")

    def fails(inputs: dict[str, Any]) -> Callable[[], dict[str, torch.Tensor]]:
        raise RuntimeError("out of luck\nand more")

    contestants = (
        eager,
        dataclasses.replace(tampered(eager, "loss", lambda t: t + 1), name="wrong"),
        Contestant("failing", fails),
        Contestant("refused", fails, refuses=lambda inputs: "not today"),
        dataclasses.replace(eager, name="left out"),
    )
    row = dataclasses.replace(magnet, workload=dataclasses.replace(magnet.workload, contestants=contestants))
    result, times = measure(row, 0.0, WITH, without=frozenset({"left out", "memory"}))

    assert list(times) == ["eager"]
    by_name = {f.contestant: f for f in result.figures}
    assert by_name["eager"].speedup == 1
    assert by_name["eager"].median_s is not None
    assert by_name["wrong"].red
    assert by_name["wrong"].reason.startswith("loss: relative error")
    assert (by_name["failing"].red, by_name["failing"].reason) == (True, "RuntimeError: out of luck")
    assert (by_name["refused"].red, by_name["refused"].reason) == (False, "not today")
    assert by_name["left out"].reason == "left out"
    assert all(f.median_s is None and f.speedup is None for n, f in by_name.items() if n != "eager")
    assert result.runs_with == WITH


def test_too_much_memory_is_a_reason_and_no_error() -> None:
    magnet = smallest_row("magnet")
    eager = magnet.workload.contestant("eager")

    def too_large(inputs: dict[str, Any]) -> Callable[[], dict[str, torch.Tensor]]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")

    contestants = (eager, Contestant("large", too_large))
    row = dataclasses.replace(magnet, workload=dataclasses.replace(magnet.workload, contestants=contestants))
    figure = measure(row, 0.0, WITH, without=frozenset({"memory"}))[0].figure("large")
    assert (figure.red, figure.reason, figure.median_s) == (False, "out of memory", None)


def test_a_floor_passes_no_gate_and_has_a_figure() -> None:
    magnet = smallest_row("magnet")
    eager = magnet.workload.contestant("eager")
    floor = Contestant("floor", lambda inputs: dict, floor=True)
    row = dataclasses.replace(magnet, workload=dataclasses.replace(magnet.workload, contestants=(eager, floor)))
    figure = measure(row, 0.0, WITH, without=frozenset({"memory"}))[0].figure("floor")
    assert figure.floor
    assert figure.median_s is not None


def test_the_three_products_are_those_of_the_loss() -> None:
    """Of logits, and of logits with both sides: chunks of columns add up to the whole."""
    inputs = smallest_row("margin_softmax").inputs()
    x, y = inputs["embeddings"], inputs["weight"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(margin_softmax, "CHUNK_BYTES", 5 * 4 * len(x))  # 5 columns at once
        outputs = margin_softmax._three_products(inputs)()
    z = x @ y.T
    torch.testing.assert_close(outputs["grad_embeddings"], z @ y, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(outputs["grad_weight"], z.T @ x, rtol=1e-4, atol=1e-3)


def test_a_step_is_captured_after_a_warm_up_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's steps, with everything of the GPU replaced."""
    said: list[str] = []
    within = SimpleNamespace(
        __enter__=None, wait_stream=lambda other: said.append("wait"), replay=lambda: said.append("replay")
    )

    class Context:
        def __enter__(self) -> None:
            said.append("enter")

        def __exit__(self, *_: Any) -> None:
            said.append("leave")

    monkeypatch.setattr(torch.cuda, "Stream", lambda: within)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: within)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: within)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: Context())
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: Context())

    def step() -> dict[str, torch.Tensor]:
        said.append("step")
        return {}

    contestant = captured(Contestant("eager", lambda inputs: step), ("few_shot",))
    assert (contestant.name, contestant.devices) == ("eager, CUDA graph", ("cuda",))
    replay = contestant.step({})
    assert " ".join(said) == "wait enter step step step leave wait enter step leave"
    assert replay() == {}
    assert said[-1] == "replay"


def test_without_a_baseline_there_is_no_ratio() -> None:
    magnet = smallest_row("magnet")
    eager = magnet.workload.contestant("eager")
    contestants = (tampered(eager, "loss", lambda t: t + 1), dataclasses.replace(eager, name="other"))
    row = dataclasses.replace(magnet, workload=dataclasses.replace(magnet.workload, contestants=contestants))
    result, _ = measure(row, 0.0, WITH, without=frozenset({"memory"}))
    other = result.figure("other")
    assert other.median_s is not None
    assert other.speedup is None


def test_ours_says_why_a_backend_is_not_worth_it() -> None:
    problem = registry.Problem("contrast", "cpu", torch.float32, 2, 2, 2)
    slow = ours(lambda inputs, backend: dict, lambda inputs: problem, lambda inputs, backend: f"{backend} is slow")
    assert next(c for c in slow if c.name == "reference").refuses({}) == "reference is slow"


# Memory


@pytest.mark.skipif(not memory.available(), reason="needs /proc/self/clear_refs and malloc_trim")
def test_peak_memory_of_a_contestant_in_its_own_process() -> None:
    row_id = "cluster_distances-batch-2048x128x2000-float32"
    matrix, sides = 4 * 2048 * 2000, 4 * 128 * (2048 + 2000)
    # The matrix and the gradients of both sides are returned; nobody needs ten matrices.
    assert matrix + sides <= memory.measure_in_child(row_id, "matmul form") < 10 * matrix
    with pytest.raises(memory.MemoryMeasurementError, match=r"nobody, cluster_distances.*: StopIteration"):
        memory.measure_in_child(row_id, "nobody")


# Results


def row_result(size: str = "2 x 3", **changes: Any) -> RowResult:
    figures = [
        Figure(contestant="eager", ours=False, median_s=2e-3, speedup=1.0, extra_memory_bytes=3 * 2**20),
        Figure(contestant="peer", ours=False, note="no margin", red=True, reason="loss: relative error 0.5"),
        Figure(contestant="cpu", ours=True, median_s=1e-3, speedup=2.0, extra_memory_bytes=2**19),
        Figure(contestant="far", ours=True, reason="no such device"),
    ]
    values = {
        "id": f"magnet-{size}",
        "workload": "magnet",
        "title": "The title",
        "symbols": "B x D",
        "size_name": "batch",
        "size": size,
        "dtype": "float32",
        "baseline": "eager",
        "multiply_adds": 10**9,
        "compulsory_bytes": None,
        "figures": figures,
        "date": "2025-02-03T04:05:06+00:00",
        "runs_with": WITH,
    }
    return RowResult(**(values | changes))


def test_a_row_measured_again_takes_the_place_of_the_old(tmp_path: Path) -> None:
    path = results.store(tmp_path, MACHINE, row_result("2 x 3"))
    assert path.name == "cpu-some-cpu-r-9-v3-2t.json"
    results.store(tmp_path, MACHINE, row_result("4 x 5"))
    results.store(tmp_path, MACHINE, row_result("2 x 3", runs_with=WITH.model_copy(update={"commit": "def"})))
    assert [(r.size, r.runs_with.commit) for r in results.read(path).rows] == [("2 x 3", "def"), ("4 x 5", "abc")]
    assert os.listdir(tmp_path) == [path.name]


def test_a_gpu_has_a_folder_of_its_own(tmp_path: Path) -> None:
    path = results.store(tmp_path, GPU, row_result())
    assert path == tmp_path / "nvidia-h100-80gb-hbm3" / "results.json"
    results.store(tmp_path, MACHINE, row_result())
    results.store(tmp_path, GPU, row_result("4 x 5"))
    stored = [results.read(p) for p in results.files(tmp_path)]
    assert [(type(s.machine), len(s.rows)) for s in stored] == [(Machine, 1), (Gpu, 2)]


def test_another_machine_of_the_same_kind_is_refused(tmp_path: Path) -> None:
    path = results.store(tmp_path, MACHINE, row_result())
    before = path.read_bytes()
    with pytest.raises(ResultsError, match="measured on another machine"):
        results.store(tmp_path, MACHINE.model_copy(update={"cpus": 64}), row_result())
    assert path.read_bytes() == before


def test_a_damaged_results_file_is_named_and_left_alone(tmp_path: Path) -> None:
    path = results.store(tmp_path, MACHINE, row_result())
    path.write_text(path.read_text()[:-20])
    before = path.read_bytes()
    with pytest.raises(ResultsError, match=r"cpu-some-cpu-r-9-v3-2t\.json: not a results file"):
        results.store(tmp_path, MACHINE, row_result())
    assert path.read_bytes() == before


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = results.store(tmp_path, MACHINE, row_result())
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        results.store(tmp_path, MACHINE, row_result("4 x 5"))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_the_committed_results_can_be_read() -> None:
    for path in results.files(results.FOLDER):
        stored = results.read(path)
        assert path == results.FOLDER / stored.machine.file
        assert not [f.contestant for row in stored.rows for f in row.figures if f.ours and f.red]


# Tables


def test_tables_are_aligned_and_show_who_has_no_figure() -> None:
    text = tables.render("magnet", [Results(machine=MACHINE, rows=[row_result("2 x 3"), row_result("40 x 50000")])])
    lines = text.splitlines()
    blocks = [
        [line for line in lines if line.startswith("|")][:4],
        [line for line in lines if line.startswith("|")][4:],
    ]
    for block in blocks:
        assert len(block) == 4
        assert len({len(line) for line in block}) == 1
    cells = [cell.strip() for cell in blocks[0][2].strip("|").split("|")]
    assert cells == ["batch", "2 x 3", "float32", "2", "1.00×", "wrong", "**2.00×**", "—", "2000"]
    assert [c.strip() for c in blocks[1][2].strip("|").split("|")] == [
        "batch",
        "2 x 3",
        "float32",
        "3.0",
        "—",
        "0.5",
        "—",
    ]
    assert "- peer: no margin." in lines
    assert "- far at batch, 2 x 3, float32: no such device." in lines
    assert "- Measured 2025-02-03, commit abc, torch 2.9." in lines
    assert lines[-1] == "- The machine was not idle: load 0.5 before the run."


def test_tables_show_a_floor_as_one_and_name_a_gpus_software() -> None:
    figures = [
        *row_result().figures,
        Figure(contestant="products", ours=False, floor=True, median_s=1e-4, speedup=20.0),
    ]
    row = row_result(figures=figures, runs_with=WITH.model_copy(update={"versions": GPU_VERSIONS}))
    lines = tables.render("magnet", [Results(machine=GPU, rows=[row])]).splitlines()
    assert lines[0] == "The title. NVIDIA H100 80GB HBM3."
    speed = [line for line in lines if line.startswith("|")][:3]
    assert "| floor: products |" in speed[0]
    assert " 20.00× |" in speed[2]
    assert "**2.00×**" in speed[2]  # the best is the best of those that compute the loss
    software = "torch 2.11, CUDA 13.0, driver 580.1, Triton 3.6, beside A CPU, 8 CPUs"
    assert f"- Measured 2025-02-03, commit abc, {software}." in lines


def test_tables_of_an_idle_machine_say_nothing_of_it() -> None:
    idle = row_result(runs_with=WITH.model_copy(update={"load_before": 0.1}))
    assert "not idle" not in tables.render("magnet", [Results(machine=MACHINE, rows=[idle])])


def test_the_readme_is_rewritten_in_its_regions_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme, folder = tmp_path / "README.md", tmp_path / "results"
    other = "<!-- table:somebody-elses -->\nkeep\n<!-- end:somebody-elses -->\n"
    readme.write_text(f"before\n<!-- table:magnet -->\n<!-- end:magnet -->\n{other}after\n")
    results.store(folder, MACHINE, row_result())

    with pytest.raises(SystemExit, match="not the tables of"):
        tables.main(readme, folder, check=True)
    tables.main(readme, folder)
    written = readme.read_text()
    assert written.startswith("before\n<!-- table:magnet -->\n\nThe title. Some CPU(R) 9, 2 of 8 CPUs")
    assert written.endswith(f"<!-- end:magnet -->\n{other}after\n")
    tables.main(readme, folder, check=True)
    assert readme.read_text() == written
    output = capsys.readouterr().out
    assert "left alone, no workloads of these names: somebody-elses\n" in output
    assert output.endswith("up to date\n")


def test_a_region_that_is_not_closed_is_an_error(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("<!-- table:magnet -->\n")
    with pytest.raises(SystemExit, match="1 regions opened by <!-- table:NAME -->, 0 closed"):
        tables.main(readme, tmp_path)


# The whole of it


def test_a_short_run_from_the_command_line(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark", reason="needs the bench extra")
    command = [sys.executable, "-m", "pytest", "benchmarks", "-v", "-k", "magnet and 12x4x128", "--seconds=0.01"]
    command += ["--without=torch.compile", "--without=memory", f"--results={tmp_path}"]
    command += [f"--benchmark-json={tmp_path / 'pytest-benchmark.json'}"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "3 passed, 3 skipped" in run.stdout
    assert os.listdir(tmp_path) == ["pytest-benchmark.json"]  # incomplete rows are not stored
    stored = json.loads((tmp_path / "pytest-benchmark.json").read_text())["benchmarks"]
    medians = {b["params"]["contestant"]: b["stats"]["median"] for b in stored}
    for b in stored:  # what was played back is what was measured
        ratio = medians["eager"] / medians[b["params"]["contestant"]]
        assert b["extra_info"]["speedup"] == pytest.approx(ratio)


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said_at_once() -> None:
    result = run("-m", "pytest", "benchmarks", "--device", "cuda")
    assert result.returncode == 4
    assert "--device cuda: no GPU is at hand" in result.stderr


def test_rows_are_measured_without_pytest_benchmark_and_pytorch_metric_learning(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['pytorch_metric_learning'] = None\n")
    (tmp_path / "results").mkdir()
    command = ["-m", "pytest", "-p", "no:benchmark", "benchmarks", "-k", "magnet and 12x4x128", "--seconds=0.01"]
    command += ["--without=torch.compile", "--dry-run", f"--results={tmp_path / 'results'}", "--without=memory"]
    result = run(*command, PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "3 passed, 3 skipped" in result.stdout


@pytest.mark.parametrize(
    "script", [("sanitize", "--backend"), ("determinism", "--ops", "magnet", "--repeats", "2", "--backends")]
)
def test_the_scripts_for_a_gpu_run_on_a_cpu(script: tuple[str, ...]) -> None:
    name, *options = script
    result = run("-m", f"tests.gpu.{name}", "--device", "cpu", *options, "reference")
    assert result.returncode == 0, result.stdout + result.stderr
    nothing = run("-m", f"tests.gpu.{name}", "--device", "cpu", *options, "cuda")
    assert nothing.returncode == 1
    assert "cuda ran nothing on cpu" in nothing.stderr
