"""Rows, machines and wrong implementations that the tests of the benchmarks share."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.machine import Machine, RunsWith
from benchmarks.results import Figure, RowResult
from benchmarks.workload import Implementation, Row, Workload
from benchmarks.workloads import ROWS, WORKLOADS

WITH = RunsWith(date="2025-02-03", commit="abc", load_before=0.5, versions={"torch": "2.9"})
GPU_VERSIONS = {"torch": "2.11", "cuda": "13.0", "triton": "3.6", "processor": "A CPU, 8 CPUs"}
GPU = Machine(name="NVIDIA H100 80GB HBM3", kind="nvidia-h100-80gb-hbm3")
MACHINE = Machine(name="Some CPU(R) 9, 2 of 8 CPUs, kernels for v3", kind="cpu-some-cpu-r-9-v3-2t")


def workload(name: str) -> Workload:
    return next(w for w in WORKLOADS if w.name == name)


def smallest_row(name: str) -> Row:
    """The workload's least row in float32."""
    rows = [row for row in ROWS if row.workload.name == name and row.dtype == torch.float32]
    return min(rows, key=lambda row: sum(t.numel() for t in row.inputs().values() if isinstance(t, torch.Tensor)))


def faults(row: Row, implementation: Implementation) -> list[str]:
    inputs = row.inputs()
    return row.workload.check(inputs)(implementation, implementation.step(inputs)())


def tampered(
    implementation: Implementation, output: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> Implementation:
    """`implementation` with one of its outputs changed."""

    def prepare(inputs: dict[str, Any]) -> Callable[[], dict[str, torch.Tensor]]:
        step = implementation.prepare(inputs)

        def wrong() -> dict[str, torch.Tensor]:
            outputs = step()
            return outputs | {output: change(outputs[output])}

        return wrong

    return dataclasses.replace(implementation, prepare=prepare)


def row_result(size: str = "2x3", **changes: Any) -> RowResult:
    figures = {
        "eager": Figure(2e-3, 1e-4, 3 * 2**20),
        "peer": Figure(reason="wrong: loss: relative error 0.5"),
        "cpu": Figure(1e-3, 1e-5, 2**19),
        "far": Figure(reason="no such device"),
    }
    return RowResult(**({"id": f"magnet-batch-{size}-float32", "runs_with": WITH, "figures": figures} | changes))
