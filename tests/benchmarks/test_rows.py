"""A row: who has a figure, who has none and why, captured graphs, memory."""

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import memory
from benchmarks.rows import measure
from benchmarks.workload import Contestant, captured, ours
from benchmarks.workloads import margin_softmax
from fused_margins.ops import registry

from .samples import WITH, smallest_row, tampered


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


@pytest.mark.skipif(not memory.available(), reason="needs /proc/self/clear_refs and malloc_trim")
def test_peak_memory_of_a_contestant_in_its_own_process() -> None:
    row_id = "cluster_distances-batch-2048x128x2000-float32"
    matrix, sides = 4 * 2048 * 2000, 4 * 128 * (2048 + 2000)
    # The matrix and the gradients of both sides are returned; nobody needs ten matrices.
    assert matrix + sides <= memory.measure_in_child(row_id, "matmul form") < 10 * matrix
    with pytest.raises(memory.MemoryMeasurementError, match=r"nobody, cluster_distances.*: StopIteration"):
        memory.measure_in_child(row_id, "nobody")
