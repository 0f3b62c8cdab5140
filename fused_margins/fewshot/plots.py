"""Plots as PNG files, drawn without pyplot and so without global state."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from torch import Tensor

from .metrics import mean_and_student_interval
from .runs import replacing


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def plane(embeddings: Tensor, seed: int = 0) -> np.ndarray:
    """t-SNE coordinates (N, 2) of embeddings (N, D)."""
    perplexity = min(30.0, max(1.0, (len(embeddings) - 1) / 3))
    tsne = TSNE(init="random", perplexity=perplexity, max_iter=500, random_state=seed)
    return tsne.fit_transform(embeddings.numpy())


def loss_curves(path: Path, panels: Mapping[str, Mapping[str, Sequence[float]]], x_label: str = "epoch") -> None:
    """A panel for each title, in it a line for each named sequence of losses."""
    figure = Figure(figsize=(6.5 if len(panels) == 1 else 4.5 * len(panels), 4), layout="constrained")
    for position, (title, curves) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), position)
        for number, (name, losses) in enumerate(curves.items()):
            # Lines further down are thinner and dashed, so that curves that coincide are all seen.
            style, width = ("-", "--", ":")[number % 3], 2.4 - 0.6 * (number % 3)
            axes.plot(range(1, len(losses) + 1), losses, linestyle=style, linewidth=width, label=name)
        axes.set(title=title, xlabel=x_label, ylabel="loss", yscale="log")
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
    _save(figure, path)


def embedding_maps(path: Path, maps: Mapping[str, np.ndarray], labels: Tensor, class_names: Sequence[str]) -> None:
    """A scatter plot for each named set of points (N, 2), coloured by the labels (N,)."""
    columns = min(2, len(maps))
    rows = -(-len(maps) // columns)
    figure = Figure(figsize=(5 * columns, 4.4 * rows), layout="constrained")
    for position, (name, points) in enumerate(maps.items(), start=1):
        axes = figure.add_subplot(rows, columns, position)
        for c, class_name in enumerate(class_names):
            chosen = points[(labels == c).numpy()]
            axes.scatter(chosen[:, 0], chosen[:, 1], s=6, color=f"C{c % 10}", label=class_name)
        axes.set(title=name, xticks=[], yticks=[])
        if position == 1 and len(class_names) <= 10:
            axes.legend(fontsize="x-small", markerscale=2)
    _save(figure, path)


def margin_panel(path: Path, margins: Sequence[float], panels: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """For each title the values [margin][seed]: seeds as thin lines, their mean and its 95% interval above them."""
    figure = Figure(figsize=(3.2 * len(panels), 3.2), layout="constrained")
    for position, (title, values) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), position)
        axes.plot(margins, values, color="grey", linewidth=0.8, alpha=0.5)
        means, intervals = zip(*(mean_and_student_interval(of_margin) for of_margin in values))
        axes.errorbar(margins, means, yerr=intervals, marker="o", capsize=3)
        axes.set(title=title, xlabel="margin", xticks=list(margins))
        axes.grid(alpha=0.3)
    _save(figure, path)


def difference_curves(path: Path, curves: Mapping[str, Sequence[float]], tolerance: float) -> None:
    """Relative differences at each step, on a log scale, and the tolerance they are held to."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, values in curves.items():
        # Exact agreement has no place on a log scale: show it at the smallest float32 step.
        axes.plot(np.maximum(values, 1e-8), label=name)
    axes.axhline(tolerance, color="black", linestyle=":", label=f"tolerance {tolerance:g}")
    axes.set(xlabel="step", ylabel="largest relative difference", yscale="log")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    _save(figure, path)
