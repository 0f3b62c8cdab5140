"""Pictures are drawn from numbers that are looked at again in them."""

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba

from fused_margins.fewshot import maps, plots


def test_neighbours_are_framed_by_their_label(tmp_path):
    pixels = torch.zeros(3, 1, 8, 8)
    figure = maps.neighbour_strips(
        tmp_path / "n.png", pixels, torch.tensor([0, 0, 1]), torch.tensor([0]), torch.tensor([[1, 2, -1]]), ("a", "b")
    )
    strips = figure.axes[0].images[0].get_array()
    width = strips.shape[1] // 4  # the query and three places
    middle = strips.shape[0] // 2
    edge = 5  # within the frame, which begins a frame's width from the edge
    tiles = [strips[middle, i * width + edge] for i in range(4)]
    np.testing.assert_allclose(tiles[1], to_rgba(maps.RIGHT), atol=1e-6)
    np.testing.assert_allclose(tiles[2], to_rgba(maps.WRONG), atol=1e-6)
    assert tiles[0][3] == tiles[3][3] == 0  # no frame, no neighbour
    assert (tmp_path / "n.png").exists()


def test_a_sweep_shows_means_and_intervals(tmp_path):
    figure = plots.sweep(tmp_path / "s.png", [-0.3, 0.0], {"accuracy": {"novel": [[50.0, 52.0], [60.0, 60.0]]}})
    (container,) = figure.axes[0].containers
    np.testing.assert_allclose(container.lines[0].get_ydata(orig=False), [51.0, 60.0])
    segments = container.lines[2][0].get_segments()
    assert segments[0][1][1] - segments[0][0][1] == pytest.approx(2 * 12.7062, rel=1e-3)
    assert segments[1][1][1] - segments[1][0][1] == pytest.approx(0)


def test_a_sample_for_a_map_is_whole_classes_as_far_as_they_fit():
    labels = torch.arange(100).repeat_interleave(50)
    chosen = maps.map_sample(labels, limit=400)
    assert len(chosen) == 400
    assert torch.equal(chosen, maps.map_sample(labels, limit=400))
    assert len(torch.unique(labels[chosen])) == 20
