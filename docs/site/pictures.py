"""Pictures of what the losses do, drawn by the losses themselves when the site is built: a hook of MkDocs.

>>> sorted(PICTURES)
['pictures/easy-positives.svg', 'pictures/magnet-batch.svg', 'pictures/margins.svg']
"""

import io
import math
from collections.abc import Callable
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from fused_margins import MagnetIndex
from fused_margins.fewshot.plots import COLOURS
from fused_margins.functional import margin_softmax_loss, mine_positives


def on_files(files: Any, config: Any) -> Any:
    """Add them to the files of the site."""
    from mkdocs.structure.files import File

    for name, drawn in PICTURES.items():
        files.append(File.generated(config, name, content=svg(drawn())))
    return files


def svg(figure: Figure) -> str:
    """The same text in each run; letters are outlines, so that every browser shows the same."""
    text = io.StringIO()
    with rc_context({"svg.hashsalt": "fused-margins"}):
        figure.savefig(text, format="svg", bbox_inches="tight", pad_inches=0.05, metadata={"Date": None})
    return text.getvalue()


def margins() -> Figure:
    """Two classes on a circle: where the loss of each would be that of a boundary, log 2, or less."""
    angle = torch.linspace(0, 2 * math.pi, 3601)
    circle = torch.stack([angle.cos(), angle.sin()], dim=1)  # (N, 2)
    weight = torch.tensor([[-math.sqrt(0.5), math.sqrt(0.5)], [math.sqrt(0.5), math.sqrt(0.5)]])
    figure, panels = _panels(3, 3.2, 2.6)
    for axes, margin, title in zip(panels, (-0.3, 0.0, 0.3), ("both claim the middle", "one line", "a gap between")):
        for c in range(2):
            labels = torch.full((len(circle),), c)
            loss = margin_softmax_loss(circle, weight, labels, scale=10.0, margin=margin, reduction="none")
            radius = 1.08 + 0.1 * c
            held = torch.where((loss <= math.log(2))[:, None], radius * circle, torch.nan)
            axes.plot(*held.T, color=COLOURS[c], linewidth=5, solid_capstyle="butt", label=f"class {c + 1}")
            axes.annotate("", weight[c].tolist(), (0, 0), arrowprops={"arrowstyle": "->", "color": COLOURS[c], "lw": 2})
        axes.plot(*circle.T, color="#8A8A8A", linewidth=0.8)
        axes.set(xlim=(-1.3, 1.3), ylim=(-0.45, 1.3), title=f"m = {margin:g}: {title}")
    panels[0].legend(fontsize="small", loc="lower center", ncols=2, frameon=False)
    return figure


def easy_positives() -> Figure:
    """One class of two modes, another between them: every pair of the class, and each sample's nearest."""
    generator = torch.Generator().manual_seed(1)
    centres = torch.tensor([[-2.0, 0.0], [2.0, 0.0], [0.0, 0.7]])
    points = centres.repeat_interleave(7, dim=0) + 0.25 * torch.randn(21, 2, generator=generator)
    labels = torch.tensor([0] * 14 + [1] * 7)
    kinds = {"all pairs: the modes are drawn together": "all", "easy positives: each mode stays": "easy"}
    figure, panels = _panels(2, 4.4, 2.6)
    for axes, (title, kind) in zip(panels, kinds.items()):
        if kind == "all":
            pairs = torch.combinations(torch.arange(14))
        else:
            _, nearest = mine_positives(points, labels, similarity="negative_squared_euclidean")
            pairs = torch.stack([torch.arange(14), nearest[:14]], dim=1)
        for pair in pairs:
            axes.plot(*points[pair].T, color=COLOURS[0], linewidth=0.6 if kind == "all" else 1.4, alpha=0.5)
        _scatter(axes, points, labels)
        axes.set(xlim=(-2.8, 2.8), ylim=(-1.3, 1.3), title=title)
    panels[0].legend(fontsize="small", loc="lower center", ncols=2, frameon=False)
    return figure


def magnet_batch() -> Figure:
    """Clusters of three classes, and the samples of one batch: of the seed and its nearest impostors."""
    generator = torch.Generator().manual_seed(4)
    x, y = (-3, 0, 3, -2, 0.4, 3, -4.4, 1, 4.6), (1, 2, 1, -1.6, -0.4, -2, -0.8, -2.4, -0.4)
    centres = torch.tensor([x, y], dtype=torch.float32).T
    points = centres.repeat_interleave(30, dim=0) + 0.4 * torch.randn(270, 2, generator=generator)
    labels = torch.tensor([0, 1, 2, 1, 2, 0, 2, 0, 1]).repeat_interleave(30)
    index = MagnetIndex(clusters_per_class=3, num_restarts=5, generator=generator).fit(points, labels)
    batch = index.sample_batch(num_clusters=4, samples_per_cluster=6)
    chosen = index.centroids[index.assignments[batch.indices[::6]]]  # (4, 2), that of the seed first
    figure, (axes,) = _panels(1, 7.5, 4.2)
    _scatter(axes, points, labels, alpha=0.3)
    for c in range(3):
        drawn = points[batch.indices[labels[batch.indices] == c]]
        axes.scatter(*drawn.T, s=34, color=COLOURS[c], edgecolors="black", linewidths=0.8)
    for impostor in chosen[1:]:
        axes.plot(*torch.stack([chosen[0], impostor]).T, color="black", linewidth=0.8, zorder=1)
    colours = [COLOURS[c] for c in index.centroid_labels.tolist()]
    axes.scatter(*index.centroids.T, s=70, c=colours, marker="X", edgecolors="black", label="centroids")
    for rank, place in enumerate(chosen):
        name = f"impostor {rank}" if rank else "seed"
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8}
        axes.text(place[0], place[1] + (0.95 if rank else -1.1), name, ha="center", fontsize="small", bbox=box)
    axes.legend(fontsize="small", loc="lower left", frameon=False)
    return figure


def _panels(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(count * width, height), layout="constrained")
    panels = [figure.add_subplot(1, count, 1 + i) for i in range(count)]
    for axes in panels:
        axes.set_aspect("equal")
        axes.set_axis_off()
    return figure, panels


def _scatter(axes: Axes, points: Tensor, labels: Tensor, alpha: float = 1.0) -> None:
    for c in labels.unique().tolist():
        axes.scatter(*points[labels == c].T, s=16, color=COLOURS[c], alpha=alpha, linewidths=0, label=f"class {c + 1}")


PICTURES: dict[str, Callable[[], Figure]] = {
    "pictures/margins.svg": margins,
    "pictures/easy-positives.svg": easy_positives,
    "pictures/magnet-batch.svg": magnet_batch,
}
