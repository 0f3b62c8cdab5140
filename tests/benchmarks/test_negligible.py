"""Shares of negligible softmax weights, against weights counted one by one."""

import doctest
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from benchmarks import negligible
from benchmarks.negligible import left_out, shares, softmax_weights
from fused_margins.fewshot.config import Backbone, MarginSoftmax, TrainConfig, Triplet
from fused_margins.fewshot.errors import UserError
from fused_margins.fewshot.runs import Run
from fused_margins.fewshot.trainer import Trainer
from fused_margins.fewshot.trials import task_of


def _problem(rows: int = 10, classes: int = 70) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    y = F.normalize(torch.randn(classes, 16, generator=generator, dtype=torch.float64))
    labels = torch.randint(classes, (rows,), generator=generator)
    return F.normalize(y[labels] + 0.1 * torch.randn(rows, 16, generator=generator)), y, labels


def test_weights_are_those_of_the_margin_softmax() -> None:
    x, y, labels = _problem()
    z = 30 * x @ y.T
    z[range(len(x)), labels] -= 30 * 0.2
    assert torch.allclose(softmax_weights(x, y, labels, 30.0, 0.2), z.exp() / z.exp().sum(1, keepdim=True))


@pytest.mark.parametrize("tile", [(1, 1), (4, 8), (6, 16)])
def test_a_tile_is_left_out_when_every_weight_is_below_and_none_is_a_rows_own(tile: tuple[int, int]) -> None:
    x, y, labels = _problem(classes=150)
    weights = softmax_weights(x, y, labels, 60.0, 0.0)
    out = left_out(weights, labels, tile, 1e-4)
    assert out.any()
    for i in range(len(x)):
        for j in range(len(y)):
            top, left = i // tile[0] * tile[0], j // tile[1] * tile[1]
            own = labels[top : top + tile[0]]
            small = bool((weights[top : top + tile[0], left : left + tile[1]] < 1e-4).all())
            assert bool(out[i, j]) == (small and not bool(((own >= left) & (own < left + tile[1])).any()))


def test_errors_are_those_of_the_gradients_and_within_the_bound() -> None:
    x, y, labels = _problem(rows=24, classes=640)
    found = shares(x, y, labels, 40.0, 0.0, bound=0.05)
    assert 0 < found.tiles["12 x 32"] <= found.tiles["6 x 16"] <= found.tiles["1 x 1"] < 1
    weights = softmax_weights(x, y, labels, 40.0, 0.0)
    kept = weights.masked_fill(left_out(weights, labels, (12, 32), 0.05 / 640), 0.0)
    own = F.one_hot(labels, 640)
    whole, rough = (weights - own) @ y, (kept - own) @ y
    assert found.row_error == pytest.approx(float((whole - rough).norm(dim=1).max()))
    assert found.grad_x_error == pytest.approx(float((whole - rough).norm() / whole.norm()))
    whole, rough = (weights - own).T @ x, (kept - own).T @ x
    assert found.grad_y_error == pytest.approx(float((whole - rough).norm() / whole.norm()))
    assert 0 < found.row_error < 0.05


def _trained(folder: Path, config: TrainConfig) -> Run:
    run = Run.create(folder, config)
    Trainer(config, task_of(config).training).train(run)
    return run


def test_runs_are_measured_stored_and_shown(tmp_path: Path) -> None:
    config = TrainConfig(backbone=Backbone(blocks=1, channels=4), epochs=1, loss=MarginSoftmax(scale=30.0, margin=-0.1))
    run = _trained(tmp_path / "run", config)
    negligible.main((run.folder,), tmp_path / "results" / "negligible.json")
    text = negligible.render(tmp_path / "results" / "negligible.json")
    assert text.count("| digits, C = 10, scale 30, m = -0.1, 1 epochs |") == 1 + len(negligible.BOUNDS)
    assert negligible.render(tmp_path / "none.json") == "Not measured yet."


def test_a_run_without_class_weights_is_refused(tmp_path: Path) -> None:
    config = TrainConfig(backbone=Backbone(blocks=1, channels=4), epochs=1, loss=Triplet())
    with pytest.raises(UserError, match="triplet has no class weights"):
        negligible.measure(_trained(tmp_path / "run", config))


def test_examples() -> None:
    found = doctest.testmod(negligible)
    assert found.attempted
    assert not found.failed
