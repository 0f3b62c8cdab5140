"""What is exported, and that every public docstring says what a user needs to know."""

import inspect
import re

import pytest
import torch

import fused_margins
from fused_margins import functional
from fused_margins.backends import budget, registry
from fused_margins.distributed import ShardedMarginSoftmaxLoss

MODULES = [getattr(fused_margins, name) for name in fused_margins.losses.__all__]
LOSSES = [module for module in MODULES if module is not fused_margins.CrossBatchMemory]  # which wraps one of them
FUNCTIONS = [getattr(functional, name) for name in functional.__all__]


@pytest.mark.parametrize(
    "public", [*MODULES, *FUNCTIONS, fused_margins.MagnetIndex, ShardedMarginSoftmaxLoss], ids=lambda f: f.__name__
)
def test_public_docstrings_are_complete(public):
    text = inspect.getdoc(public)
    # A named special case says in one line that its arguments, errors and gradients are those of its class.
    missing = [part for part in ("args", "raises", "gradients", "source: ", ">>> ") if part not in text.lower()]
    assert not missing
    assert text.split("\n\n")[0].endswith("."), "one sentence comes first"


@pytest.mark.parametrize("op", registry.OPS)
def test_ops_state_their_formula_and_edge_rules(op):
    text = __import__(f"fused_margins.ops.{op}", fromlist=[op]).__doc__
    for part in ("Args", "Returns", "Raises", "Gradients", "Edge rules", ">>> "):
        assert part in text


@pytest.mark.parametrize("make", LOSSES, ids=lambda f: f.__name__)
def test_every_loss_takes_embeddings_and_labels_moves_and_reads_well(make):
    has_classes = "num_classes" in [n for n, p in inspect.signature(make).parameters.items() if p.default is p.empty]
    loss = make(4, 6) if has_classes else make()
    embeddings, labels = torch.randn(12, 6, requires_grad=True), torch.arange(12) % 4
    value = loss(embeddings, labels)
    assert value.dim() == 0
    value.backward()
    assert embeddings.grad.isfinite().all()
    # A move to another device and dtype takes every tensor of the module along.
    moved = loss.to("meta", torch.float64)
    assert all(t.device.type == "meta" for t in moved.state_dict().values())
    assert repr(loss) == f"{make.__name__}({loss.extra_repr()})"
    assert "backend='auto'" in loss.extra_repr()


def test_explain_names_every_backend_and_marks_one(capsys):
    fused_margins.explain("nearest", rows=8, columns=8, width=4)
    lines = capsys.readouterr().out.splitlines()
    assert [line[2:].split()[0] for line in lines] == [b.name for b in registry.BACKENDS]
    assert sum(line.startswith("*") for line in lines) == 1
    fused_margins.explain("contrast", rows=8, columns=8, width=4, device="cuda")
    assert "cannot run: runs on a CPU, the tensors are on cuda" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"op: expected one of 'contrast', .*'scores'.*, got 'attention'"):
        fused_margins.explain("attention", rows=1, columns=1, width=1)


@pytest.mark.parametrize(("name", "op"), [("margin_softmax", "contrast"), ("draw", "sample")])
def test_explain_answers_to_names_of_before(capsys, name, op):
    fused_margins.explain(name, rows=64, columns=32, width=16)
    output = capsys.readouterr().out
    assert output.count("\n") == len(registry.BACKENDS)
    assert output.count("* ") == 1
    assert registry.problem(name, rows=4, columns=3, width=2).op == op


@pytest.mark.parametrize("text", ["-1", "plenty", "1e6"])
def test_a_memory_budget_of_the_environment_is_bounded_too(monkeypatch, text):
    monkeypatch.setenv("FUSED_MARGINS_MEMORY_BUDGET", text)
    message = f"FUSED_MARGINS_MEMORY_BUDGET: expected an integer of bytes, at least 0, got {text!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        budget._from_environment()  # as an import does


def test_memory_budget_is_explained_and_bounded(capsys):
    before = fused_margins.memory_budget()
    try:
        for budget, text in (
            (2**30, "saves 0.1 MiB for the backward: 3.00"),
            (0, "computes 100% of the softmax weights again: 4.00"),
        ):
            fused_margins.set_memory_budget(budget)
            fused_margins.explain("contrast", rows=256, columns=64, width=8)
            assert f"{text} products" in capsys.readouterr().out
        with pytest.raises(ValueError, match="num_bytes: expected at least 0, got -1"):
            fused_margins.set_memory_budget(-1)
    finally:
        fused_margins.set_memory_budget(before)
