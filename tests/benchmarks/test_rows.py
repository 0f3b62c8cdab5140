"""A row: who has a figure, who has none and why, captured graphs, memory."""

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import memory
from benchmarks.implementations import captured, ours
from benchmarks.results import Figure
from benchmarks.rows import measure
from benchmarks.workload import Implementation
from benchmarks.workloads import margin_softmax

from .samples import WITH, smallest_row, tampered


def test_a_row_without_figures_for_the_wrong_the_failing_and_the_refused() -> None:
    magnet = smallest_row("magnet")
    eager = magnet.workload.implementation("eager")

    def fails(inputs: dict[str, Any]) -> Callable[[], dict[str, torch.Tensor]]:
        raise RuntimeError("out of luck\nand more")

    implementations = (
        eager,
        dataclasses.replace(tampered(eager, "loss", lambda t: t + 1), name="wrong"),
        Implementation("failing", fails),
        Implementation("refused", fails, refuses=lambda inputs: "not today"),
        dataclasses.replace(eager, name="left out"),
    )
    row = dataclasses.replace(magnet, workload=dataclasses.replace(magnet.workload, implementations=implementations))
    figures = measure(row, 0.0, WITH, without={"left out": "left out", "memory": "left out"}).figures
    assert [name for name, figure in figures.items() if figure.median_s is not None] == ["eager"]
    assert figures["wrong"].reason.startswith("wrong: loss: relative error")
    assert figures["failing"] == Figure(reason="wrong: RuntimeError: out of luck")
    assert figures["refused"] == Figure(reason="not today")
    assert figures["left out"] == Figure(reason="left out")
    assert {name for name, figure in figures.items() if figure.wrong} == {"wrong", "failing"}


def test_a_backend_that_is_not_here_is_not_in_the_row() -> None:
    magnet = smallest_row("magnet")
    figures = measure(magnet, 0.0, WITH, without={"torch.compile": "left out", "memory": "left out"}).figures
    assert not {"triton", "cuda"} & figures.keys()
    assert figures["reference"].median_s is not None


def test_too_much_memory_is_a_reason_and_no_error() -> None:
    magnet = smallest_row("magnet")
    eager = magnet.workload.implementation("eager")

    def too_large(inputs: dict[str, Any]) -> Callable[[], dict[str, torch.Tensor]]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")

    implementations = (eager, Implementation("large", too_large))
    row = dataclasses.replace(magnet, workload=dataclasses.replace(magnet.workload, implementations=implementations))
    figures = measure(row, 0.0, WITH, without={"memory": "left out"}).figures
    assert figures["large"] == Figure(reason="out of memory")


def test_a_lower_bound_is_not_checked_and_has_a_figure() -> None:
    magnet = smallest_row("magnet")
    eager = magnet.workload.implementation("eager")
    bound = Implementation("bound", lambda inputs: dict, lower_bound=True)
    row = dataclasses.replace(magnet, workload=dataclasses.replace(magnet.workload, implementations=(eager, bound)))
    assert measure(row, 0.0, WITH, without={"memory": "left out"}).figures["bound"].median_s is not None


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

    implementation = captured(Implementation("eager", lambda inputs: step), ("few_shot",))
    assert (implementation.name, implementation.devices) == ("eager, CUDA graph", ("cuda",))
    replay = implementation.step({})
    assert " ".join(said) == "wait enter step step step leave wait enter step leave"
    assert replay() == {}
    assert said[-1] == "replay"


def test_the_reference_is_not_measured_where_it_takes_seconds() -> None:
    made = ours(lambda function, inputs: dict, lambda backend: {}, most_products=10)
    reference = next(i for i in made if i.name == "reference")
    row = smallest_row("magnet")
    small, large = (dataclasses.replace(row, size=dataclasses.replace(row.size, products=n)) for n in (10, 11))
    assert small.refusal(reference, {}) is None
    assert large.refusal(reference, {}) == "seconds a call: it forms all B x N x D products"


@pytest.mark.skipif(not memory.available(), reason="needs /proc/self/clear_refs and malloc_trim")
def test_peak_memory_of_an_implementation_in_its_own_process() -> None:
    row_id = "cluster_distances-batch-2048x128x2000-float32"
    matrix, sides = 4 * 2048 * 2000, 4 * 128 * (2048 + 2000)
    # The matrix and the gradients of both sides are returned; nobody needs ten matrices.
    assert matrix + sides <= memory.measure_in_child(row_id, "matmul form") < 10 * matrix
    with pytest.raises(StopIteration):  # what is raised there
        memory.measure_in_child(row_id, "nobody")
