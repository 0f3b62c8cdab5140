"""Workloads follow the registry, and each row is one that can be measured again."""

import pytest
import torch

from benchmarks.implementations import unless_installed
from benchmarks.workload import Row
from benchmarks.workloads import ROWS, WORKLOADS, find_row, ops, rows_on
from fused_margins.backends import registry

from .samples import smallest_row, workload


def test_every_op_and_backend_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {w.name for w in WORKLOADS} >= set(registry.OPS)
    for w in WORKLOADS:
        backends = {i.backend for i in w.implementations if i.devices != ("cuda",)} - {None}
        # The drop-in takes no backend: "auto" chooses.
        assert backends == ({"auto"} if w.name == "drop_in" else {b.name for b in registry.BACKENDS}), w.name
    new = registry.Backend("new", lambda device: "has no such device", lambda: "")
    monkeypatch.setattr(registry, "BACKENDS", [*registry.BACKENDS, new])
    assert ops.workload("contrast").implementation("new").backend == "new"


def test_an_op_without_eager_code_is_measured_against_its_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    assert workload("contrast").baseline == "eager"
    monkeypatch.delitem(ops.EAGER, "contrast")
    assert ops.workload("contrast").baseline == "reference"


def test_rows_have_names_of_their_own() -> None:
    assert len({row.id for row in ROWS}) == len(ROWS)
    assert all(find_row(row.id) is row for row in ROWS)


def test_a_gpu_has_its_own_sizes_and_implementations() -> None:
    on_gpu = {row.id: row for row in rows_on("cuda")}
    assert len(on_gpu) == len(rows_on("cuda"))
    assert all(row.device == "cuda" for row in on_gpu.values())
    assert "margin_softmax-huge-512x512x100000-float32" not in on_gpu
    largest = [row for name, row in on_gpu.items() if name.startswith("margin_softmax-million_classes-")]
    assert [row.dtype for row in largest] == [torch.bfloat16]
    for name in ("nearest_of_all-index-1000000x128x4096-bfloat16", "hardest_negatives-batch-32768x512x4-float32"):
        assert name in on_gpu
        assert name not in {row.id for row in ROWS}

    def names(row: Row) -> set[str]:
        return {c.name for c in row.implementations}

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
    assert unless_installed("no_such_module")({}) == "no_such_module not installed"
    assert unless_installed("torch")({}) is None
    assert smallest_row("margin_softmax").workload.implementation("Liger").devices == ("cuda",)


def test_inputs_are_the_same_every_time() -> None:
    row = smallest_row("margin_softmax")
    once, again = row.inputs(), row.inputs()
    assert all(torch.equal(t, again[n]) for n, t in once.items() if isinstance(t, torch.Tensor))
