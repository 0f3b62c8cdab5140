"""Rows, machines and wrong contestants that the tests of the benchmarks share."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.machine import Gpu, Machine, RunsWith
from benchmarks.results import Figure, RowResult
from benchmarks.workload import Contestant, Row, Workload
from benchmarks.workloads import ROWS, WORKLOADS

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
