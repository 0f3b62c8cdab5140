"""Peers that need a GPU, through stand-ins with their signatures: what is asked, what they return, their guards."""

import sys
import types

import pytest
import torch
from torch.nn import functional as F

from benchmarks.rows import checked

from .samples import smallest_row, workload

LIGER = "liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy"


def chunked_linear_cross_entropy(
    x, weight, target, chunk_size=4096, ignore_index=-100, reduction="mean", tuned=True, use_scaled_exp=None
):
    if x.dtype == torch.float64:
        raise AssertionError("x: Only float16, bfloat16 and float32 are supported\nand more")
    return F.cross_entropy(x @ weight.T, target, ignore_index=ignore_index, reduction=reduction)


class LigerFusedLinearCrossEntropyFunction:
    @staticmethod
    def apply(x, weight, target, bias=None):
        return F.cross_entropy(x @ weight.T, target), None, None, None


def euclid_assign_triton(x, centroids, x_sq, out=None, c_sq=None):
    assert x_sq.shape == x.shape[:2]
    assert x_sq.dtype == torch.float32
    return torch.cdist(x.float(), centroids.float()).argmin(2).int()


STAND_INS = {
    "quack.linear_cross_entropy": chunked_linear_cross_entropy,
    LIGER: LigerFusedLinearCrossEntropyFunction,
    "flash_kmeans.assign_euclid_triton": euclid_assign_triton,
    "cutlass": None,
}


@pytest.fixture
def installed(monkeypatch):
    """The stand-ins can be imported, and are found where somebody looks whether they are installed."""
    for path, member in STAND_INS.items():
        parts = path.split(".")
        for depth in range(1, len(parts) + 1):
            name = ".".join(parts[:depth])
            module = types.ModuleType(name)
            module.__spec__, module.__path__ = types.SimpleNamespace(name=name), []
            monkeypatch.setitem(sys.modules, name, module)
        if member is not None:
            setattr(module, member.__name__, member)


@pytest.mark.parametrize("of", ["cross_entropy", "margin_softmax"])
@pytest.mark.parametrize("name", ["QuACK", "Liger, CuTe DSL"])
def test_cross_entropies_in_cute_dsl(installed, of, name):
    row, implementation = smallest_row(of), workload(of).implementation(name)
    inputs = row.inputs()
    assert row.refusal(implementation, inputs) is None
    step, reason = checked(implementation, inputs, row.workload.check(inputs))
    assert (step is not None, reason) == (True, None)


def test_what_a_guard_of_a_peer_says_is_its_reason(installed):
    row, quack = smallest_row("cross_entropy"), workload("cross_entropy").implementation("QuACK")
    inputs = {name: t.double() if t.is_floating_point() else t for name, t in row.inputs().items()}
    expected = "it refuses: x: Only float16, bfloat16 and float32 are supported"
    assert row.refusal(quack, inputs) == expected


@pytest.mark.parametrize("name", ["QuACK", "Liger, CuTe DSL"])
def test_a_peer_whose_compiler_is_missing_says_so(installed, monkeypatch, name):
    monkeypatch.delitem(sys.modules, "cutlass")
    row, implementation = smallest_row("cross_entropy"), workload("cross_entropy").implementation(name)
    assert row.refusal(implementation, row.inputs()) == "cutlass not installed"


def test_nearest_centres_of_flash_kmeans(installed):
    nearest = workload("nearest_of_all")
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 8, generator=generator), torch.randn(7, 8, generator=generator)
    inputs = {"embeddings": x, "centroids": y}
    step, reason = checked(nearest.implementation("flash-kmeans"), inputs, nearest.check(inputs))
    assert (step is not None, reason) == (True, None)
