"""Curves as PNG files, drawn without pyplot and so without global state; each function returns what it has saved."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .metrics import mean_and_student_interval
from .runs import replacing

# Okabe and Ito, Color universal design, 2008: told apart by readers of any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A8A8A", "#000000")
MARKERS = ("o", "^", "s", "P")
DOTS_PER_INCH = 144


def literal(name: str) -> str:
    r"""A user's name for a plot, as it is: a dollar begins no mathematics, an underscore hides it from no legend.

    >>> literal("$x_{$"), literal("_a")
    ('\\$x_{\\$', ' _a')
    """
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def save(figure: Figure, path: Path) -> Figure:
    with replacing(path) as temporary, warnings.catch_warnings():
        # A script that no font here has becomes boxes; the tables have the names.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        figure.savefig(temporary, dpi=DOTS_PER_INCH, format="png", bbox_inches="tight", pad_inches=0.05)
    return figure


def panels_of(count: int, width: float, height: float, columns: int) -> tuple[Figure, Iterator[Axes]]:
    """A figure of `count` axes of `width` x `height` inches each, at most `columns` beside each other."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, (figure.add_subplot(rows, columns, position) for position in range(1, count + 1))


def _lines(axes: Axes, curves: Mapping[str, Sequence[float]]) -> None:
    """A line for each name; those further down are thinner and dashed, so that curves that coincide are all seen."""
    for number, (name, values) in enumerate(curves.items()):
        style, width = ("-", "--", ":")[number % 3], 2.4 - 0.6 * (number % 3)
        axes.plot(
            range(1, 1 + len(values)), values, style, linewidth=width, color=COLOURS[number % len(COLOURS)], label=name
        )
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    if len(curves) > 1:
        axes.legend(fontsize="small")
    axes.grid(alpha=0.3)


def _log_scale(axes: Axes, curves: Mapping[str, Sequence[float]]) -> None:
    """Where the values allow it: hinge losses reach 0, and margin losses with a negative margin go below it."""
    if all(value > 0 for values in curves.values() for value in values):
        axes.set_yscale("log")


def training_curves(
    path: Path, losses: Mapping[str, Sequence[float]], learning_rates: Mapping[str, Sequence[float]]
) -> Figure:
    """For each named run the loss of every epoch, and the learning rate beside it."""
    figure, grid = panels_of(2, 4.8, 3.4, columns=2)
    for axes, curves, y_label in zip(grid, (losses, learning_rates), ("loss, mean of the epoch", "learning rate")):
        _lines(axes, curves)
        axes.set(xlabel="epoch", ylabel=y_label)
        if curves is losses:
            _log_scale(axes, losses)
    return save(figure, path)


def sweep(
    path: Path,
    x: Sequence[float],
    panels: Mapping[str, Mapping[str, Sequence[Sequence[float]]]],
    x_label: str = "margin",
) -> Figure:
    """A panel for each quantity, in it a line for each name: mean over seeds and its 95% Student interval at each x.

    Accuracy on base and on novel classes and their discriminability against the margin is the central figure of Liu et
    al., Negative margin matters, 2020; the kNC error against the number of clusters is drawn the same way.

    Args:
        path: PNG file.
        x: (X,) values of the setting.
        panels: {"accuracy, %": {"novel, 1-shot": values}}, where values[i][s] belongs to x[i] and seed s.
        x_label: name and unit of the setting.
    """
    figure, grid = panels_of(len(panels), 3.3 if len(panels) > 1 else 5, 3.2, columns=3)
    for axes, (y_label, lines) in zip(grid, panels.items()):
        for number, (name, values) in enumerate(lines.items()):
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            if len({len(of_x) for of_x in values}) == 1:
                # Seeds as thin lines: what they share with each other shows better than in the interval.
                axes.plot(x, values, color=colour, linewidth=0.7, alpha=0.3)
            means, intervals = zip(*(mean_and_student_interval(of_x) for of_x in values))
            axes.errorbar(x, means, yerr=intervals, color=colour, marker=marker, markersize=5, capsize=3, label=name)
        axes.set(xlabel=x_label, ylabel=y_label)
        if 0 < 16 * min(x) <= max(x):
            axes.set_xscale("log", base=2)
        if len(x) <= 8:
            axes.set_xticks(list(x), [f"{value:g}" for value in x])
        if len(lines) > 1:  # above the axes, where it hides no interval
            axes.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
        axes.grid(alpha=0.3)
    return save(figure, path)


def parity_curves(
    path: Path, losses: Mapping[str, Sequence[float]], differences: Mapping[str, Sequence[float]], tolerance: float
) -> Figure:
    """The losses of two backends over each other, and below them their relative differences at each step."""
    figure, (top, bottom) = panels_of(2, 7, 2.8, columns=1)
    _lines(top, losses)
    _log_scale(top, losses)
    top.set(ylabel="loss")
    _differences(bottom, differences, tolerance)
    bottom.sharex(top)
    return save(figure, path)


def _differences(axes: Axes, curves: Mapping[str, Sequence[float]], tolerance: float) -> None:
    # Exact agreement has no place on a log scale: show it at the smallest float32 step.
    _lines(axes, {name: np.maximum(values, 1e-8).tolist() for name, values in curves.items()})
    axes.axhline(tolerance, color="black", linestyle=":", label=f"tolerance {tolerance:g}")
    axes.set(xlabel="step", ylabel="relative difference", yscale="log")
    axes.legend(fontsize="small")


def variance_curves(path: Path, variances: Mapping[str, Sequence[float]]) -> Figure:
    """For each named method the within-cluster variances of its classes, in ascending order."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, values) in enumerate(variances.items()):
        rank = 100 * (np.arange(len(values)) + 0.5) / len(values)
        axes.plot(
            rank,
            np.sort(values),
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)] if len(values) <= 40 else None,
            label=name,
        )
    _log_scale(axes, variances)
    axes.set(xlabel="classes from the tightest to the widest, %", ylabel="squared distance to own centroid")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    return save(figure, path)
