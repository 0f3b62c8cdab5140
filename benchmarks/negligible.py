"""How many softmax weights of trained class weights could be left out: ``python -m benchmarks.negligible RUN...``.

A kernel could skip the gradient products of a tile in which no softmax weight reaches tau = eps / C. Each row's
gradient, scale * sum_j (p_ij - [j is i's class]) y_j over unit vectors y_j, then misses less than C * tau = eps, in
units of the scale; its length is at most 2 in them. So eps is a bound on the error before anything is computed. What
skipping could gain at most follows from the share f of tiles: two of the three products of a call have it, which leaves
1 - 2 f / 3 of the time.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from pydantic import BaseModel, TypeAdapter
from torch import Tensor
from torch.nn import functional as F

from fused_margins.fewshot.config import TrainConfig
from fused_margins.fewshot.errors import UserError
from fused_margins.fewshot.runs import Run
from fused_margins.fewshot.tables import Table
from fused_margins.fewshot.terminal import console
from fused_margins.fewshot.trainer import Trainer
from fused_margins.fewshot.trials import task_of

from . import results

FILE = results.FOLDER / "negligible" / "weights.json"
TILES = ((1, 1), (6, 16), (12, 32))  # rows x columns: a single weight, a register tile with AVX2, one with AVX-512
BOUNDS = (2.0**-8, 2.0**-24)  # a step of bfloat16 and of float32
FILTER = 2.0**-12  # tau of cut-cross-entropy, whatever the classes: its bound is C * tau
ROWS = 128
BATCHES = 20


@dataclass(frozen=True)
class Shares:
    """What a bound leaves out of a batch, and what the gradients then miss."""

    tiles: dict[str, float]  # of each shape, the share that is left out
    row_error: float  # where the largest tiles are left out: the largest error of a row's gradient, over the scale
    grad_x_error: float  # of the gradients of all rows and of all columns: norm of the error over the norm
    grad_y_error: float


class Entry(BaseModel):
    """A run and a bound: the mean shares over batches, and the largest errors."""

    run: str
    bound: float
    tiles: dict[str, float]
    row_error: float
    grad_x_error: float
    grad_y_error: float


ENTRIES = TypeAdapter(list[Entry])


def softmax_weights(x: Tensor, y: Tensor, labels: Tensor, scale: float, margin: float) -> Tensor:
    """(B, C) of unit vectors x (B, D) and y (C, D): softmax of scale * (cos - margin [own class])."""
    own = F.one_hot(labels, len(y)).to(x)
    return (scale * (x @ y.T - margin * own)).softmax(1)


def left_out(weights: Tensor, labels: Tensor, tile: tuple[int, int], threshold: float) -> Tensor:
    """(B, C) bool: whose tile holds no weight of `threshold` or more, and no row's own class.

    >>> weights = torch.tensor([[0.9, 0.05, 0.04, 0.01], [0.1, 0.85, 0.03, 0.02]])
    >>> left_out(weights, torch.tensor([0, 1]), (2, 2), 0.05).tolist()
    [[False, False, True, True], [False, False, True, True]]
    """
    largest = weights.scatter(1, labels[:, None], 1.0)
    pooled = F.max_pool2d(largest[None], tile, ceil_mode=True)[0] < threshold
    rows, columns = tile
    return pooled.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: weights.shape[0], : weights.shape[1]]


def shares(x: Tensor, y: Tensor, labels: Tensor, scale: float, margin: float, bound: float) -> Shares:
    """Of unit vectors x (B, D) and y (C, D), with tau = bound / C."""
    weights = softmax_weights(x, y, labels, scale, margin)
    out = {tile: left_out(weights, labels, tile, bound / len(y)) for tile in TILES}
    missing = weights * out[TILES[-1]]
    whole = weights - F.one_hot(labels, len(y)).to(x)
    row_errors = missing @ y
    return Shares(
        {f"{rows} x {columns}": float(out[rows, columns].double().mean()) for rows, columns in TILES},
        float(row_errors.norm(dim=1).max()),
        float(row_errors.norm() / (whole @ y).norm()),
        float((missing.T @ x).norm() / (whole.T @ x).norm()),
    )


def batches(run: Run, count: int) -> tuple[TrainConfig, Tensor, list[tuple[Tensor, Tensor]]]:
    """Settings, unit class weights, and (unit embeddings, labels) of the next `count` batches, in float64."""
    config = run.config()
    training = task_of(config).training
    trainer = Trainer(config, training)
    run.load_checkpoint(trainer.load_state_dict)
    classifier = trainer.objective.classifier()
    if classifier is None:
        raise UserError(f"{run.folder}: {config.loss.name} has no class weights")
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        chosen = torch.randint(len(training), (ROWS,), generator=generator)
        embeddings = trainer.embed_pixels(training.pixels(chosen)).double()
        found.append((F.normalize(embeddings), training.targets(config.labels)[chosen]))
    return config, F.normalize(classifier.weight.detach().double()), found


def measure(run: Run, count: int = BATCHES) -> list[Entry]:
    """An entry for each bound."""
    config, y, found = batches(run, count)
    scale, margin = config.loss.scale, getattr(config.loss, "margin", 0.0)  # type: ignore[union-attr]
    name = f"{config.dataset}, C = {len(y)}, scale {scale:g}, m = {margin:g}, {config.epochs} epochs"
    entries = []
    for bound in (len(y) * FILTER, *BOUNDS):
        each = [shares(x, y, labels, scale, margin, bound) for x, labels in found]
        entries.append(
            Entry(
                run=name,
                bound=bound,
                tiles={shape: sum(s.tiles[shape] for s in each) / len(each) for shape in each[0].tiles},
                row_error=max(s.row_error for s in each),
                grad_x_error=max(s.grad_x_error for s in each),
                grad_y_error=max(s.grad_y_error for s in each),
            )
        )
    return entries


def table(entries: list[Entry]) -> Table:
    """A row a run and bound."""
    rows = []
    for entry in entries:
        share = list(entry.tiles.values())[-1]
        errors = (entry.row_error, entry.grad_x_error, entry.grad_y_error)
        rows.append(
            [
                entry.run,
                f"{entry.bound:.1e}",
                *(f"{100 * value:.1f}" for value in entry.tiles.values()),
                *(f"{error:.1e}" for error in errors),
                f"{1 / (1 - 2 * share / 3):.2f}×",
            ]
        )
    shapes = [f"{rows} x {columns}, %" for rows, columns in TILES]
    return Table(
        "Softmax weights below eps / C at trained class weights, and errors where the largest tiles are left out",
        ["", "eps", *shapes, "row error", "grad x, relative", "grad y, relative", "gain at most"],
        rows,
    )


def render(path: Path = FILE) -> str:
    """The README's region."""
    if not path.exists():
        return "Not measured yet."
    return table(ENTRIES.validate_json(path.read_text(encoding="utf-8"))).markdown()


def main(runs: Annotated[tuple[Path, ...], tyro.conf.Positional], output: Path = FILE) -> None:
    """Measure how many softmax weights of trained runs are negligible.

    Args:
        runs: folders of finished trainings with a softmax loss.
        output: file of the results.
    """
    entries = [entry for run in runs for entry in measure(Run(run))]
    results.write_text(output, ENTRIES.dump_json(entries, indent=1).decode() + "\n")
    console.print(table(entries).rich())


if __name__ == "__main__":
    tyro.cli(main)
