"""Curves and maps, read back from what was drawn: values, scales, legends and names."""

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba
from PIL import Image

from fused_margins.fewshot import plots


def _points(axes):
    return [np.asarray(line.get_ydata()).tolist() for line in axes.lines]


def _legend(axes):
    legend = axes.get_legend()
    return [] if legend is None else [text.get_text() for text in legend.get_texts()]


def test_training_curves_of_several_runs(tmp_path):
    losses = {"seed 0": [2.0, 1.0, 0.5], "seed 1": [2.0, 1.5]}
    rates = {"seed 0": [0.1, 0.2, 0.0], "seed 1": [0.1, 0.2]}
    figure = plots.training_curves(tmp_path / "t.png", losses, rates)
    loss, rate = figure.axes
    assert _points(loss) == list(losses.values())
    assert _points(rate) == list(rates.values())
    assert loss.lines[0].get_xdata().tolist() == [1, 2, 3]
    assert _legend(loss) == ["seed 0", "seed 1"]
    assert (loss.get_yscale(), rate.get_yscale()) == ("log", "linear")
    assert (loss.get_xlabel(), rate.get_ylabel()) == ("epoch", "learning rate")


def test_a_loss_that_reaches_zero_is_not_lost_on_a_log_scale(tmp_path):
    figure = plots.training_curves(tmp_path / "t.png", {"hinge": [1.0, 0.0]}, {"hinge": [0.1, 0.1]})
    assert figure.axes[0].get_yscale() == "linear"
    assert _legend(figure.axes[0]) == []


def test_parity_shows_both_losses_and_what_lies_between_them(tmp_path):
    losses = {"reference": [2.0, 1.0], "cpu": [2.0, 1.1]}
    figure = plots.parity_curves(tmp_path / "p.png", losses, {"loss": [0.0, 0.1]}, tolerance=1e-3)
    top, bottom = figure.axes
    assert _points(top) == list(losses.values())
    assert _points(bottom)[0] == [1e-8, 0.1]  # exact agreement stands at the foot of the scale
    assert _points(bottom)[1] == [1e-3, 1e-3]
    assert top.get_xlim() == bottom.get_xlim()


@pytest.mark.parametrize(("x", "scale"), [([-0.3, 0.0, 0.3], "linear"), ([1, 4, 64], "log")])
def test_a_sweep_has_the_scale_of_its_setting(tmp_path, x, scale):
    values = [[1.0], [2.0, 4.0], [3.0]]  # seeds may be missing
    (axes,) = plots.sweep(tmp_path / "s.png", x, {"error, %": {"a": values, "b": values}}, "setting").axes
    assert axes.get_xscale() == scale
    assert [label.get_text() for label in axes.get_xticklabels()] == [f"{value:g}" for value in x]
    assert axes.containers[0].lines[0].get_ydata().tolist() == [1.0, 3.0, 3.0]
    assert sorted(_legend(axes)) == ["a", "b"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("setting", "error, %")


def test_variances_stand_in_ascending_order(tmp_path):
    (axes,) = plots.variance_curves(tmp_path / "v.png", {"magnet": [0.3, 0.1, 0.2, 0.4]}).axes
    assert _points(axes) == [[0.1, 0.2, 0.3, 0.4]]
    assert axes.lines[0].get_xdata().tolist() == [12.5, 37.5, 62.5, 87.5]


def test_a_legend_stands_only_where_it_can_be_read(tmp_path):
    points = np.random.default_rng(0).random((80, 2))
    coarse, fine = torch.arange(80) % 2, torch.arange(80) % 40
    names = [f"c{i}" for i in range(40)]
    figure = plots.embedding_maps(
        tmp_path / "e.png", {"coarse": (points, coarse, ("x", "y")), "fine": (points, fine, names)}
    )
    first, second = figure.axes
    assert (_legend(first), _legend(second)) == (["x", "y"], [])
    assert second.get_xlabel() == "40 classes: colours repeat"
    drawn = {collection.get_label(): np.asarray(collection.get_offsets()) for collection in first.collections}
    np.testing.assert_allclose(drawn["y"], points[coarse == 1])


def test_classes_are_told_apart_by_colour_or_marker(tmp_path):
    points = np.zeros((32, 2))
    (axes,) = plots.embedding_maps(tmp_path / "e.png", {"t": (points, torch.arange(32), ["c"] * 32)}).axes
    looks = {(c.get_facecolor().tobytes(), c.get_paths()[0].vertices.tobytes()) for c in axes.collections}
    assert len(looks) == 32


def test_clusters_are_drawn_with_their_centroids(tmp_path):
    generator = torch.Generator().manual_seed(0)
    samples, centroids = torch.randn(20, 4, generator=generator), torch.randn(3, 4, generator=generator)
    labels, centroid_labels = torch.arange(20) % 2, torch.tensor([0, 1, 1])
    (axes,) = plots.cluster_map(tmp_path / "c.png", samples, labels, centroids, centroid_labels, ("a", "b")).axes
    assert [len(collection.get_offsets()) for collection in axes.collections] == [10, 10, 3]
    assert _legend(axes) == ["a", "b", "centroids"]


def test_the_plane_is_the_same_each_time():
    embeddings = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(plots.plane(embeddings), plots.plane(embeddings))


def test_neighbours_are_framed_by_their_label(tmp_path):
    pixels = torch.zeros(3, 1, 8, 8)
    figure = plots.neighbour_strips(
        tmp_path / "n.png", pixels, torch.tensor([0, 0, 1]), torch.tensor([0]), torch.tensor([[1, 2, -1]]), ("a", "b")
    )
    strips = figure.axes[0].images[0].get_array()
    width = strips.shape[1] // 4  # the query and three places
    middle = strips.shape[0] // 2
    edge = 5  # within the frame, which begins a frame's width from the edge
    tiles = [strips[middle, i * width + edge] for i in range(4)]
    np.testing.assert_allclose(tiles[1], to_rgba(plots.RIGHT), atol=1e-6)
    np.testing.assert_allclose(tiles[2], to_rgba(plots.WRONG), atol=1e-6)
    assert tiles[0][3] == tiles[3][3] == 0  # no frame, no neighbour
    assert (tmp_path / "n.png").exists()


def test_no_name_beside_images_is_cut_off(tmp_path):
    names = tuple(f"{letter} rather long class" for letter in "amwxyz")
    labels, pixels = torch.arange(6), torch.zeros(6, 1, 8, 8)
    plots.neighbour_strips(tmp_path / "n.png", pixels, labels, labels, labels[:, None].expand(6, 8), names)
    ink = np.asarray(Image.open(tmp_path / "n.png"))[:, :, 3]
    assert ink.any()
    assert not any(edge.any() for edge in (ink[0], ink[-1], ink[:, 0], ink[:, -1]))


def test_a_sweep_shows_means_and_intervals(tmp_path):
    figure = plots.sweep(tmp_path / "s.png", [-0.3, 0.0], {"accuracy": {"novel": [[50.0, 52.0], [60.0, 60.0]]}})
    (container,) = figure.axes[0].containers
    np.testing.assert_allclose(container.lines[0].get_ydata(orig=False), [51.0, 60.0])
    segments = container.lines[2][0].get_segments()
    assert segments[0][1][1] - segments[0][0][1] == pytest.approx(2 * 12.7062, rel=1e-3)
    assert segments[1][1][1] - segments[1][0][1] == pytest.approx(0)


def test_a_sample_for_a_map_is_whole_classes_as_far_as_they_fit():
    labels = torch.arange(100).repeat_interleave(50)
    chosen = plots.map_sample(labels, limit=400)
    assert len(chosen) == 400
    assert torch.equal(chosen, plots.map_sample(labels, limit=400))
    assert len(torch.unique(labels[chosen])) == 20


def _seen(path):
    with Image.open(path) as picture:
        return picture.info["Description"]


def test_lines_are_drawn_as_svg_too_and_the_same_each_time(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        plots.training_curves(tmp_path / name / "t.png", {"x": [2.0, 1.0]}, {"x": [0.1, 0.0]})
    drawings = [(tmp_path / name / "t.svg").read_bytes() for name in ("a", "b")]
    assert drawings[0] == drawings[1]
    assert b"<svg" in drawings[0]
    assert _seen(tmp_path / "a" / "t.png") in drawings[0].decode()


def test_pictures_say_what_is_seen(tmp_path):
    plots.training_curves(tmp_path / "t.png", {"x": [2.0, 0.5, 1.0]}, {"x": [0.1, 0.2, 0.0]})
    assert _seen(tmp_path / "t.png") == (
        "Loss by epoch: x from 2 at 1 to 1 at 3, lowest 0.5 at 2. "
        "Learning rate: x from 0.1 at 1 to 0 at 3, highest 0.2 at 2."
    )
    plots.parity_curves(tmp_path / "p.png", {"cpu": [2.0, 1.0]}, {"loss": [0.0, 0.1]}, tolerance=1e-3)
    assert _seen(tmp_path / "p.png").endswith("Largest relative differences: loss 1.0e-01; tolerance 0.001.")
    plots.variance_curves(tmp_path / "v.png", {"magnet": [0.3, 0.1, 0.2]})
    assert "magnet 0.2." in _seen(tmp_path / "v.png")
    points, labels = np.array([[0.0, 0], [0, 1], [9, 9], [9, 8]]), torch.tensor([0, 0, 0, 1])
    plots.embedding_maps(tmp_path / "e.png", {"fine": (points, labels, ("ä", "b"))})
    assert _seen(tmp_path / "e.png") == "Maps. fine: 4 points of 2 classes, 50% of them next to one of their own class."
    assert not (tmp_path / "e.svg").exists()
    plots.cluster_map(tmp_path / "c.png", torch.randn(4, 3), labels, torch.zeros(2, 3), torch.tensor([0, 1]), "ab")
    assert _seen(tmp_path / "c.png").endswith("and 2 centroids.")
    nearest = torch.tensor([[1, 2, 3], [0, 1, -1]])
    plots.neighbour_strips(tmp_path / "n.png", torch.zeros(4, 1, 8, 8), labels, torch.tensor([0, 3]), nearest, "äb")
    assert _seen(tmp_path / "n.png") == "Of 3 nearest images so many have the query's class, by rows: ä: 2; b: 0."
