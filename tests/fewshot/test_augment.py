"""The affine map against maps whose result is known exactly."""

import math

import pytest
import torch

from fused_margins.fewshot.augment import affine, random_affine
from fused_margins.fewshot.config import Augmentation


def _one(image, angle_deg=0.0, zoom=1.0, right=0.0, down=0.0):
    angle_rad = torch.tensor([math.radians(angle_deg)])
    return affine(image[None], angle_rad, torch.tensor([zoom]), torch.tensor([[right, down]]))[0]


def test_identity():
    image = torch.rand(3, 5, 7)
    torch.testing.assert_close(_one(image), image)


@pytest.mark.parametrize("quarter_turns", [1, 2, 3])
def test_quarter_turns_are_counter_clockwise(quarter_turns):
    image = torch.rand(1, 6, 6)
    expected = torch.rot90(image, quarter_turns, dims=(1, 2))
    torch.testing.assert_close(_one(image, angle_deg=90 * quarter_turns), expected, atol=1e-5, rtol=0)


def test_half_a_turn_of_an_oblong_image():
    image = torch.rand(1, 4, 8)
    torch.testing.assert_close(_one(image, angle_deg=180), image.flip(1, 2), atol=1e-5, rtol=0)


def test_a_quarter_turn_of_an_oblong_image_keeps_distances():
    image = torch.zeros(1, 5, 9)
    image[0, 2, 6] = 1  # two pixels to the right of the centre
    expected = torch.zeros(1, 5, 9)
    expected[0, 0, 4] = 1  # two pixels above it
    torch.testing.assert_close(_one(image, angle_deg=90), expected, atol=1e-5, rtol=0)


def test_shift_is_to_the_right_and_down_in_fractions():
    image = torch.rand(1, 4, 8)
    expected = torch.zeros(1, 4, 8)
    expected[:, 1:, 2:] = image[:, :-1, :-2]
    torch.testing.assert_close(_one(image, right=2 / 8, down=1 / 4), expected, atol=1e-5, rtol=0)


def test_zoom_makes_larger():
    image = torch.zeros(1, 8, 8)
    image[0, 3:5, 3:5] = 1  # 2 x 2 in the centre
    zoomed = _one(image, zoom=2.0)
    assert float(zoomed.sum()) == pytest.approx(16, rel=1e-4)  # four times the area
    assert zoomed[0, 2:6, 2:6].min() > 0.5


def test_each_image_has_its_own_map():
    images = torch.rand(1, 1, 8, 8).expand(6, -1, -1, -1)
    moved = random_affine(images, Augmentation(), torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    assert len(moved.flatten(1).unique(dim=0)) == 6


def test_the_generator_decides():
    images = torch.rand(4, 1, 8, 8)
    first, second = (random_affine(images, Augmentation(), torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second)


def test_the_draw_stays_within_the_settings():
    # A dot moves by at most the shift: 0.2 of 10 pixels is 2 pixels.
    images = torch.zeros(200, 1, 11, 11)
    images[:, 0, 5, 5] = 1
    settings = Augmentation(rotation_deg=0, shift=0.2, zoom=0)
    moved = random_affine(images, settings, torch.Generator().manual_seed(0))[:, 0]
    reached = moved.amax(0) > 0.01
    assert reached[3:8, 3:8].all()
    assert not reached[:2].any()
    assert not reached[:, 9:].any()


def test_switched_off_nothing_is_drawn():
    images = torch.rand(2, 1, 8, 8)
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    assert random_affine(images, Augmentation(rotation_deg=0, shift=0, zoom=0), generator) is images
    assert torch.equal(generator.get_state(), state)
