"""Curves, maps of embeddings and strips of images as PNG files, drawn without pyplot and so without global state.

Each function returns what it has saved. A file says itself what is to be seen on it, under "Description" of its
metadata: whoever shows it has a text for readers who do not see it. Plots of lines are there as SVG files too.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits
from torch import Tensor

from .metrics import mean_and_student_interval
from .runs import replacing

# Okabe and Ito, Color universal design, 2008: told apart by readers of any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A8A8A", "#000000")
MARKERS = ("o", "^", "s", "P")
DOTS_PER_INCH = 144
RIGHT, WRONG = COLOURS[2], COLOURS[1]
MAP_POINTS = 2000  # t-SNE of more takes minutes
LEGEND_ENTRIES = 12  # more than these nobody matches with their points


def literal(name: str) -> str:
    r"""A user's name for a plot, as it is: a dollar begins no mathematics, an underscore hides it from no legend.

    >>> literal("$x_{$"), literal("_a")
    ('\\$x_{\\$', ' _a')
    """
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def save(figure: Figure, path: Path, seen: str, lines: bool = False) -> Figure:
    """Save it with a description of what is to be seen; of a plot of lines an SVG file too, the same in each run."""
    for file, more in ((path, {}), (path.with_suffix(".svg"), {"Date": None})):
        if file.suffix == ".svg" and not lines:
            continue
        with replacing(file) as temporary, warnings.catch_warnings(), rc_context({"svg.hashsalt": path.stem}):
            # A script that no font here has becomes boxes; the tables have the names.
            warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
            figure.savefig(
                temporary,
                dpi=DOTS_PER_INCH,
                format=file.suffix[1:],
                # What is beside images, whose aspect is fixed, the layout does not always make room for.
                bbox_inches=None if lines else "tight",
                pad_inches=0.05,
                metadata={"Description": seen} | more,
            )
    return figure


def _course(x: Sequence[float], y: Sequence[float]) -> str:
    """Where a line begins and ends, and what it reaches between.

    >>> _course([-0.3, 0.0, 0.3], [48.0, 50.25, 49.0])
    'from 48 at -0.3 to 49 at 0.3, highest 50.2 at 0'
    >>> _course([1, 2], [2.0, 1.0])
    'from 2 at 1 to 1 at 2'
    """
    if not len(y):
        return "no value"
    text = f"from {y[0]:.3g} at {x[0]:g} to {y[-1]:.3g} at {x[-1]:g}"
    for word, place in (("lowest", int(np.argmin(y))), ("highest", int(np.argmax(y)))):
        if y[place] not in (y[0], y[-1]):
            text += f", {word} {y[place]:.3g} at {x[place]:g}"
    return text


def _courses(lines: Mapping[str, Sequence[float]]) -> str:
    return "; ".join(f"{name} {_course(range(1, 1 + len(y)), y)}" for name, y in lines.items())


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
    seen = f"Loss by epoch: {_courses(losses)}. Learning rate: {_courses(learning_rates)}."
    return save(figure, path, seen, lines=True)


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
        x: (X,) values of the setting.
        panels: {"accuracy, %": {"novel, 1-shot": values}}, where values[i][s] belongs to x[i] and seed s.
    """
    figure, grid = panels_of(len(panels), 3.3 if len(panels) > 1 else 5, 3.2, columns=3)
    seen = []
    for axes, (y_label, lines) in zip(grid, panels.items()):
        courses = {name: _course(x, [float(np.mean(of_x)) for of_x in values]) for name, values in lines.items()}
        seen.append(f"{y_label} by {x_label}: " + "; ".join(f"{name} {course}" for name, course in courses.items()))
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
    return save(figure, path, ". ".join(seen) + ".", lines=True)


def parity_curves(
    path: Path, losses: Mapping[str, Sequence[float]], differences: Mapping[str, Sequence[float]], tolerance: float
) -> Figure:
    """The losses of two backends over each other, and below them their relative differences at each step."""
    figure, (top, bottom) = panels_of(2, 7, 2.8, columns=1)
    _lines(top, losses)
    _log_scale(top, losses)
    top.set(ylabel="loss")
    # Exact agreement has no place on a log scale: show it at the smallest float32 step.
    _lines(bottom, {name: np.maximum(values, 1e-8).tolist() for name, values in differences.items()})
    bottom.axhline(tolerance, color="black", linestyle=":", label=f"tolerance {tolerance:g}")
    bottom.set(xlabel="step", ylabel="relative difference", yscale="log")
    bottom.legend(fontsize="small")
    bottom.sharex(top)
    largest = "; ".join(f"{name} {max(values, default=0):.1e}" for name, values in differences.items())
    seen = f"Loss by step: {_courses(losses)}. Largest relative differences: {largest}; tolerance {tolerance:g}."
    return save(figure, path, seen, lines=True)


def variance_curves(path: Path, variances: Mapping[str, Sequence[float]]) -> Figure:
    """For each named method the within-cluster variances of its classes, in ascending order."""
    figure, (axes,) = panels_of(1, 6, 3.6, columns=1)
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
    medians = "; ".join(f"{name} {np.median(values):.3g}" for name, values in variances.items())
    return save(figure, path, f"Squared distance to own centroid, median of the classes: {medians}.", lines=True)


def _neighbourhood(points: np.ndarray, labels: Tensor) -> str:
    """How far a map keeps classes together.

    >>> _neighbourhood(np.array([[0.0, 0.0], [0.0, 1.0], [5.0, 5.0], [5.0, 6.5]]), torch.tensor([0, 0, 1, 2]))
    '4 points of 3 classes, 50% of them next to one of their own class'
    """
    own = 0.0
    if len(points) > 1:
        places = torch.as_tensor(points, dtype=torch.float64)
        nearest = torch.cdist(places, places).fill_diagonal_(torch.inf).argmin(1)
        own = float((labels.cpu()[nearest] == labels.cpu()).double().mean())
    return f"{len(points)} points of {len(labels.unique())} classes, {own:.0%} of them next to one of their own class"


def plane(embeddings: Tensor) -> np.ndarray:
    """t-SNE coordinates (N, 2) of embeddings (N, D)."""
    perplexity = min(30.0, max(1.0, (len(embeddings) - 1) / 3))
    tsne = TSNE(init="random", perplexity=perplexity, max_iter=500, random_state=0)
    with threadpool_limits(1):  # sums of several threads have other last bits each time, which t-SNE makes large
        return tsne.fit_transform(embeddings.cpu().numpy())


def map_sample(labels: Tensor, limit: int = MAP_POINTS) -> Tensor:
    """Sorted indices of at most `limit` of the labels (N,), whole classes as far as twenty of them leave room for.

    >>> map_sample(torch.arange(30).repeat(20), limit=100).shape
    torch.Size([100])
    """
    if len(labels) <= limit:
        return torch.arange(len(labels))
    generator = torch.Generator().manual_seed(0)
    classes, counts = torch.unique(labels.cpu(), return_counts=True)
    share = max(1, limit // min(20, len(classes)))
    chosen: list[Tensor] = []
    for i in torch.randperm(len(classes), generator=generator).tolist():
        members = (labels.cpu() == classes[i]).nonzero()[:, 0]
        chosen.append(members[torch.randperm(int(counts[i]), generator=generator)[:share]])
    return torch.cat(chosen)[:limit].sort().values


def embedding_maps(path: Path, maps: Mapping[str, tuple[np.ndarray, Tensor, Sequence[str]]]) -> Figure:
    """A scatter plot for each title of points (N, 2), coloured by labels (N,) that index class names."""
    figure, grid = panels_of(len(maps), 4.8, 4.4, columns=2)
    explained: Sequence[str] = ()
    for axes, (title, (points, labels, class_names)) in zip(grid, maps.items()):
        _scatter(axes, points, labels, class_names)
        axes.set_title(title, fontsize="medium")
        present = len(torch.unique(labels))
        if present <= LEGEND_ENTRIES and tuple(class_names) != tuple(explained):
            beside = (1.0, 1.0)  # where it hides no point
            axes.legend(fontsize="x-small", markerscale=2, loc="upper left", bbox_to_anchor=beside)
            explained = class_names
        elif present > len(COLOURS) * len(MARKERS):
            axes.set_xlabel(f"{present} classes: colours repeat", fontsize="small")
    seen = (f"{title}: {_neighbourhood(points, labels)}" for title, (points, labels, _) in maps.items())
    return save(figure, path, "Maps. " + "; ".join(seen) + ".")


def _scatter(axes: Axes, points: np.ndarray, labels: Tensor, class_names: Sequence[str], alpha: float = 0.8) -> None:
    number = labels.cpu().numpy()
    style = number % (len(COLOURS) * len(MARKERS))
    for s in np.unique(style):
        chosen = points[style == s]
        axes.scatter(
            chosen[:, 0],
            chosen[:, 1],
            s=9,
            alpha=alpha,
            linewidths=0,
            color=COLOURS[s % len(COLOURS)],
            marker=MARKERS[s // len(COLOURS)],
            label=_short([class_names[number[style == s][0]]])[0],
        )
    axes.set(xticks=[], yticks=[])


def cluster_map(
    path: Path,
    embeddings: Tensor,
    labels: Tensor,
    centroids: Tensor,
    centroid_labels: Tensor,
    class_names: Sequence[str],
) -> Figure:
    """Samples (N, D) and centroids (M, D) of a magnet index on one t-SNE plane, coloured by class."""
    points = plane(torch.cat([embeddings.cpu(), centroids.cpu().to(embeddings.dtype)]))
    figure, (axes,) = panels_of(1, 6.4, 5.6, columns=1)
    _scatter(axes, points[: len(embeddings)], labels, class_names, alpha=0.45)
    colours = [COLOURS[c % len(COLOURS)] for c in centroid_labels.tolist()]
    centres = points[len(embeddings) :]
    axes.scatter(centres[:, 0], centres[:, 1], s=90, c=colours, marker="X", edgecolors="black", label="centroids")
    if len(torch.unique(labels)) <= LEGEND_ENTRIES:
        axes.legend(fontsize="x-small")
    seen = f"Map: {_neighbourhood(points[: len(embeddings)], labels)}, and {len(centres)} centroids."
    return save(figure, path, seen)


def neighbour_strips(
    path: Path, pixels: Tensor, labels: Tensor, queries: Tensor, neighbours: Tensor, class_names: Sequence[str]
) -> Figure:
    """For each query its k nearest images in a row, framed green where their label is the query's, orange elsewhere.

    Args:
        pixels: (N, C, H, W) in [0, 1]; one channel is shown in grey, of several the first three as red, green, blue.
        labels: (N,), index into `class_names`, which stand beside the rows.
        queries, neighbours: (Q,) and (Q, k) indices of images, -1 for no neighbour.
    """
    strips = np.concatenate(
        [
            np.concatenate(
                [_tile(pixels[q], None)]
                + [_tile(pixels[n], RIGHT if labels[n] == labels[q] else WRONG) for n in row.tolist() if n >= 0]
                + [np.zeros_like(_tile(pixels[q], None))] * int((row < 0).sum()),
                axis=1,
            )
            for q, row in zip(queries.tolist(), neighbours)
        ]
    )  # (Q * tile height, (1 + k) * tile width, 4)
    tile_height, tile_width = (
        size // count for size, count in zip(strips.shape, (len(queries), 1 + neighbours.shape[1]))
    )
    inch = 0.75  # of a tile
    figure = Figure(
        figsize=(inch * (1 + neighbours.shape[1]) + 1.4, inch * len(queries) * tile_height / tile_width + 0.4),
        layout="constrained",
    )
    axes = figure.add_subplot()
    axes.imshow(strips, interpolation="nearest")
    axes.spines[:].set_visible(False)
    names = _short([class_names[label] for label in labels[queries].tolist()])
    axes.set_yticks([(i + 0.5) * tile_height for i in range(len(queries))], names, fontsize="small")
    columns = ["query", *map(str, range(1, 1 + neighbours.shape[1]))]
    axes.set_xticks([(i + 0.5) * tile_width for i in range(len(columns))], columns, fontsize="small")
    # No background, and text of a grey that both white and black paper bear.
    axes.tick_params(length=0, labeltop=True, labelbottom=False, labelcolor="#7a7a7a")
    figure.set_facecolor("none")
    axes.set_facecolor("none")
    right = ((labels[neighbours] == labels[queries][:, None]) & (neighbours >= 0)).sum(1).tolist()
    rows = "; ".join(f"{name}: {count}" for name, count in zip(names, right))
    found = int((neighbours >= 0).sum(1).max())
    return save(figure, path, f"Of {found} nearest images so many have the query's class, by rows: {rows}.")


def _short(names: Sequence[str]) -> list[str]:
    return [literal(name if len(name) <= 20 else name[:19] + "…") for name in names]


def _tile(pixels: Tensor, frame: str | None) -> np.ndarray:
    """An image (C, H, W) in a frame, red, green, blue and alpha (height, width, 4); small images are enlarged."""
    image = pixels.detach().cpu().float().clamp(0, 1).numpy()
    image = np.repeat(image[:1], 3, axis=0) if len(image) < 3 else image[:3]
    times = max(1, 64 // min(image.shape[1:]))
    image = image.repeat(times, axis=1).repeat(times, axis=2).transpose(1, 2, 0)
    edge = max(2, min(image.shape[:2]) // 16)
    framed = np.zeros((image.shape[0] + 4 * edge, image.shape[1] + 4 * edge, 4), dtype=np.float32)
    if frame is not None:
        framed[edge:-edge, edge:-edge] = to_rgba(frame)
    framed[2 * edge : -2 * edge, 2 * edge : -2 * edge] = np.pad(image, ((0, 0), (0, 0), (0, 1)), constant_values=1.0)
    return framed
