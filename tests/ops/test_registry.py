"""Which backend runs a problem, how that is said, and what happens where one is missing."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fused_margins
from fused_margins.backends import cpu, registry
from fused_margins.backends.registry import Backend, Problem, explain, resolve
from fused_margins.functional import magnet_loss, margin_softmax_loss, mine_negatives, mine_positives
from fused_margins.ops.contrast import contrast
from fused_margins.ops.nearest import nearest
from tests.conftest import backends


def problem(op: str = "contrast", device: str = "cpu", dtype: torch.dtype = torch.float32) -> Problem:
    return registry.problem(op, rows=100, columns=200, width=30, dtype=dtype, device=device)


X, Y, LABELS = torch.randn(6, 4), torch.randn(5, 4), torch.arange(6) % 5


@pytest.fixture
def no_native_module(monkeypatch):
    monkeypatch.setattr(cpu, "module", None)
    monkeypatch.setattr(cpu, "missing", "no C++ compiler found (looked for g++)")


def test_every_op_has_a_reference_and_every_backend_an_op():
    folders = {p.parent.name for p in Path(registry.__file__).parents[1].glob("ops/*/op.py")}
    assert set(registry.OPS) == folders
    for backend in registry.BACKENDS:
        assert any(registry.has_kernel(op, backend.name) for op in registry.OPS)
    assert all(registry.has_kernel(op, "reference") for op in registry.OPS)


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
    row = Backend("quantum", lambda device: None, lambda: "entangled")
    monkeypatch.setattr(registry, "BACKENDS", [row, *registry.BACKENDS])
    for op in registry.OPS:
        monkeypatch.setitem(registry._has_kernel, (op, "quantum"), op == "scores")
    with pytest.raises(RuntimeError, match="backend 'quantum' cannot run this contrast: has no kernel for contrast"):
        resolve("quantum", problem())
    assert resolve("auto", problem()) != "quantum"
    kernels = SimpleNamespace(can_run=lambda problem: None)
    with registry.substitute("scores", "quantum", kernels):
        assert resolve("auto", problem("scores")) == "quantum"
        kernels.slower = lambda problem: "is slower here"
        assert resolve("auto", problem("scores")) != "quantum"
        assert resolve("quantum", problem("scores")) == "quantum"
        kernels.can_run = lambda problem: "takes no pairs"
        with pytest.raises(RuntimeError, match="backend 'quantum' cannot run this scores: takes no pairs"):
            resolve("quantum", problem("scores"))


def test_explain_prints_one_line_a_backend(device_for, capsys):
    device_for("contrast", "cpu")
    threads = torch.get_num_threads()
    explain("contrast", rows=1024, columns=1024, width=64)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(registry.BACKENDS)
    chosen = [line for line in lines if line.startswith("* ")]
    assert len(chosen) == 1
    assert f"{threads} threads; with gradients it saves 4.5 MiB for the backward: 3.00 products" in chosen[0]
    assert cpu.module.instruction_set() in chosen[0]
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
    with pytest.raises(ValueError, match=r"op: expected one of 'contrast', .*'scores'.*, got 'softmax'"):
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


@pytest.mark.parametrize("alias", ["margin_softmax", "draw", *registry.OPS])
def test_explain_answers_to_every_name(alias, capsys):
    explain(alias, rows=32, columns=32, width=16)
    lines = capsys.readouterr().out.splitlines()
    assert [line[2:].split()[0] for line in lines] == [b.name for b in registry.BACKENDS]


@pytest.mark.parametrize("value", [None, 1.5, True, "1"])
def test_sizes_are_integers(value):
    with pytest.raises(TypeError, match="rows: expected an integer, got"):
        explain(rows=value, columns=1, width=1)


def test_options_that_an_op_does_not_have():
    with pytest.raises(TypeError, match="nearest has no option margin"):
        explain("nearest", rows=1, columns=1, width=1, margin=1.0)


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("labels", lambda: margin_softmax_loss(X, Y, None)),
        ("labels", lambda: mine_positives(X, None)),
        ("clusters", lambda: magnet_loss(X, None, LABELS)),
        ("target", lambda: contrast(X, Y, None, scale=1.0)),
        ("column_labels", lambda: nearest(X, X, LABELS, None)),
    ],
)
def test_labels_that_are_needed_may_not_be_none(argument, call):
    with pytest.raises(TypeError, match=f"{argument}: expected an integer tensor of shape"):
        call()


@pytest.mark.parametrize("bad", ["3", None, [1.0]])
@pytest.mark.parametrize("argument", ["scale", "margin"])
def test_a_scale_or_margin_that_is_no_number(argument, bad):
    with pytest.raises(TypeError, match=f"{argument}: expected a number or a tensor, got {type(bad).__name__}"):
        margin_softmax_loss(X, Y, LABELS, **{argument: bad})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: margin_softmax_loss(X, Y, LABELS, scale=True), "scale: expected a number or a tensor, got bool"),
        (
            lambda: margin_softmax_loss(X, Y, LABELS, label_smoothing=Y),
            "label_smoothing: expected a number, got Tensor",
        ),
        (lambda: fused_margins.set_memory_budget(True), "num_bytes: expected an integer, got True"),
        (lambda: margin_softmax_loss(X, Y, LABELS, ignore_index=2**63), "ignore_index: expected an integer of 64 bits"),
        (lambda: nearest(X, Y, LABELS, LABELS[:5], k=2**64), "k: expected an integer of 64 bits"),
        (lambda: mine_positives(X[0], LABELS), "embeddings: expected a matrix"),
        (lambda: mine_positives(X, LABELS[:3]), r"labels: expected shape \(6,\), got \(3,\)"),
        (lambda: mine_negatives(X.int(), LABELS), "embeddings: expected a floating dtype"),
        (
            lambda: mine_positives(X, LABELS, reference_embeddings=Y[:, :2], reference_labels=LABELS[:5]),
            "reference_embeddings: expected width 4 as embeddings has, got 2",
        ),
        (
            lambda: mine_negatives(X, LABELS, reference_embeddings=Y, reference_labels=LABELS),
            r"reference_labels: expected shape \(5,\), got \(6,\)",
        ),
    ],
)
def test_arguments_are_called_what_the_caller_calls_them(call, message):
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        call()


@pytest.mark.parametrize("number", [np.float32, np.float64, np.int64])
def test_numbers_of_numpy_are_numbers(number):
    ours = margin_softmax_loss(X, Y, LABELS, scale=number(16), margin=number(1))
    assert ours == margin_softmax_loss(X, Y, LABELS, scale=16.0, margin=1.0)


@pytest.mark.parametrize("backend", [b for b in backends("magnet") if b in backends("contrast")])
def test_numbers_that_are_negated_when_they_are_read(backend, device_for):
    """The imaginary part of a conjugate lies in memory with the other sign."""
    g = torch.Generator().manual_seed(0)
    negated = torch.randn(12, 8, dtype=torch.complex64, generator=g).to(device_for("magnet", backend)).conj().imag
    assert negated.is_neg()
    weight, labels = torch.ones(3, 8).triu().to(negated.device), torch.arange(12, device=negated.device)

    def losses(x):
        x = x.detach().requires_grad_()
        loss = margin_softmax_loss(x, weight, labels % 3, backend=backend) + magnet_loss(
            x, labels % 6, labels[:6] % 3, backend=backend
        )
        return loss.detach(), torch.autograd.grad(loss, x)[0]

    for got, expected in zip(losses(negated), losses(negated.clone())):
        torch.testing.assert_close(got, expected)


def test_explain_says_what_is_wrong_with_an_option():
    sizes = {"rows": 4, "columns": 4, "width": 4}
    for op, options, error, message in (
        ("contrast", {"row_labels": True}, TypeError, "row_labels: expected a tensor, got bool"),
        ("contrast", {"epilogue": 1}, ValueError, "epilogue: expected one of 'none', .*got 1"),
        (
            "margin_softmax",
            {"epilogue": "none"},
            ValueError,
            "epilogue: expected none, since 'margin_softmax' is 'contrast'",
        ),
        ("nearest", {"device": "abacus"}, ValueError, "device: expected one of torch's, got 'abacus'"),
    ):
        with pytest.raises(error, match=message):
            registry.explain(op, **sizes, **options)


def test_options_are_words_at_the_public_door_and_numbers_below_it():
    clusters = LABELS % 3
    with pytest.raises(ValueError, match=r"reduction: expected one of .mean., .sum., .none., got 1"):
        magnet_loss(X, clusters, torch.arange(3), reduction=1)
    shell = registry.OPS["nearest"]
    flat = shell.flat(shell.checked(shell.arguments(X, X, LABELS, LABELS)))
    place = list(shell.fields).index("relation")
    with pytest.raises(ValueError, match=r"relation: expected a number in \[0, 3\), got 7"):
        torch.ops.fused_margins.nearest(*flat[:place], 7, *flat[place + 1 :], 0, "cpu")


def test_nested_tensors_are_refused():
    nested = torch.nested.nested_tensor([torch.randn(3), torch.randn(3)])
    weights = torch.nested.nested_tensor([torch.randn(2), torch.randn(2)])
    for argument, call in (
        ("embeddings", lambda: margin_softmax_loss(nested, Y, LABELS)),
        ("weight", lambda: margin_softmax_loss(X, nested, LABELS)),
        ("labels", lambda: margin_softmax_loss(X, Y, nested)),
        ("scale", lambda: margin_softmax_loss(X, Y, LABELS, scale=nested)),
        ("margin", lambda: margin_softmax_loss(X, Y, LABELS, margin=nested)),
        ("class_weight", lambda: margin_softmax_loss(X, Y, LABELS, class_weight=weights)),
    ):
        with pytest.raises(TypeError, match=f"{argument}: expected .*, got a nested one"):
            call()


@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1}, {"margin_type": "combined", "angular_multiplier": 1.5}]
)
def test_the_reserved_label_counts_for_nothing_on_every_path(options):
    labels = LABELS.clone()
    labels[1] = -(2**63)
    for weights in (None, torch.rand(len(Y)) + 0.5):
        losses = margin_softmax_loss(X, Y, labels, class_weight=weights, reduction="none", **options)
        assert losses[1] == 0
        kept = torch.arange(len(X)) != 1
        expected = margin_softmax_loss(X[kept], Y, labels[kept], class_weight=weights, **options)
        torch.testing.assert_close(margin_softmax_loss(X, Y, labels, class_weight=weights, **options), expected)
