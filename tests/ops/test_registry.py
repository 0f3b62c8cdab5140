"""Which backend runs a problem, how that is said, and what happens where one is missing."""

import pytest
import torch
from fused_margins.ops.registry import Backend, Problem, explain, resolve

import fused_margins
from fused_margins.ops import native, registry
from fused_margins.ops.contrast import contrast


def problem(op: str = "contrast", device: str = "cpu", dtype: torch.dtype = torch.float32) -> Problem:
    return Problem(op, device, dtype, 100, 200, 30)


@pytest.fixture
def no_native_module(monkeypatch):
    monkeypatch.setattr(native, "module", None)
    monkeypatch.setattr(native, "missing", "no C++ compiler found (looked for g++)")


def test_every_op_has_a_reference_and_every_backend_an_op():
    assert {"contrast", "nearest", "scores"} <= set(registry.OPS)
    for backend in registry.BACKENDS:
        assert any(registry._HAS_KERNEL[op, backend.name] for op in registry.OPS)
    assert all(registry._HAS_KERNEL[op, "reference"] for op in registry.OPS)


def test_auto_takes_the_first_that_can(device_for):
    device_for("contrast", "cpu")
    assert resolve("auto", problem()) == "cpu"
    assert resolve("auto", problem(device="meta")) == "reference"


def test_auto_falls_back_to_the_reference(no_native_module):
    assert resolve("auto", problem()) == "reference"
    positive, _ = contrast(torch.eye(3), torch.eye(3), torch.arange(3), scale=1.0)
    assert positive.tolist() == [1, 1, 1]


def test_an_explicit_backend_that_cannot_run_says_why(no_native_module):
    message = r"backend 'cpu' cannot run this contrast: no C\+\+ compiler found \(looked for g\+\+\)"
    with pytest.raises(RuntimeError, match=message):
        contrast(torch.eye(3), torch.eye(3), torch.arange(3), scale=1.0, backend="cpu")


def test_an_explicit_backend_refuses_another_device(device_for):
    device_for("nearest", "cpu")
    with pytest.raises(RuntimeError, match=r"backend 'cpu' cannot run this nearest: .* the tensors are on cuda"):
        resolve("cpu", problem("nearest", "cuda"))


def test_an_unknown_backend_lists_the_valid_ones():
    names = ", ".join(repr(b.name) for b in registry.BACKENDS)
    with pytest.raises(ValueError, match=f"backend: expected one of 'auto', {names}, got 'gpu'"):
        resolve("gpu", problem())


def test_a_backend_without_a_kernel_for_the_op_says_so(monkeypatch):
    row = Backend("quantum", lambda problem: None, lambda problem: "entangled")
    monkeypatch.setattr(registry, "BACKENDS", [row, *registry.BACKENDS])
    for op in registry.OPS:
        monkeypatch.setitem(registry._HAS_KERNEL, (op, "quantum"), op == "scores")
    with pytest.raises(RuntimeError, match="backend 'quantum' cannot run this contrast: has no kernel for contrast"):
        resolve("quantum", problem())
    assert resolve("auto", problem()) != "quantum"
    assert resolve("auto", problem("scores")) == "quantum"


def test_explain_prints_one_line_a_backend(device_for, capsys):
    device_for("contrast", "cpu")
    threads = torch.get_num_threads()
    explain("contrast", rows=1024, columns=1024, width=64)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(registry.BACKENDS)
    chosen = [line for line in lines if line.startswith("* ")]
    assert len(chosen) == 1
    assert f"{threads} threads; with gradients it keeps 4.5 MiB for the backward: 3.00 products" in chosen[0]
    assert native.module.instruction_set() in chosen[0]
    assert any(line.split() == ["reference", "PyTorch,", "differentiable", "to", "any", "order"] for line in lines)


def test_explain_says_recomputes_beyond_the_budget(device_for, capsys, no_memory_budget):
    device_for("contrast", "cpu")
    explain("contrast", rows=1024, columns=1024, width=64, dtype=torch.float64)
    recomputes = "MiB for the backward and computes 100% of the softmax weights again: 4.00 products"
    assert recomputes in capsys.readouterr().out


def test_explain_says_why_not(capsys, no_native_module):
    explain("scores", rows=2, columns=2, width=2)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[0] == "cpu" and "cannot run: no C++ compiler found" in line for line in lines)
    assert [line.split()[1] for line in lines if line.startswith("*")] == ["reference"]


def test_explain_refuses_unknown_ops_and_dtypes():
    with pytest.raises(ValueError, match=r"op: expected one of 'contrast', .*'scores', got 'softmax'"):
        explain("softmax", rows=1, columns=1, width=1)
    with pytest.raises(ValueError, match=r"dtype: expected one of torch.float64, .*, got torch.int64"):
        explain("scores", rows=1, columns=1, width=1, dtype=torch.int64)


def test_memory_budget(no_memory_budget):
    assert fused_margins.memory_budget() == 0
    fused_margins.set_memory_budget(12345)
    assert fused_margins.memory_budget() == 12345
    with pytest.raises(ValueError, match="num_bytes: expected at least 0, got -1"):
        fused_margins.set_memory_budget(-1)
    assert fused_margins.memory_budget() == 12345


def test_a_substitute_lasts_for_its_context(device_for):
    device_for("scores", "cpu")
    right = registry.kernel("scores", "cpu")
    outer, inner = object(), object()
    with registry.substitute("scores", "cpu", outer):
        with registry.substitute("scores", "cpu", inner):
            assert registry.kernel("scores", "cpu") is inner
        assert registry.kernel("scores", "cpu") is outer
    assert registry.kernel("scores", "cpu") is right
