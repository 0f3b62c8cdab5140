"""Maps and colours of batches against results that are known, or computed in another way."""

import math

import pytest
import torch
import torch.nn.functional as F

from fused_margins.fewshot.augment import _sample, _turn_zoom_shift, augment, color_jitter, random_affine
from fused_margins.fewshot.config import Augmentation

OFF = Augmentation(rotation_deg=0, shift=0, zoom=0)


def _only(**settings) -> Augmentation:
    return OFF.but(**settings)


def _seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _ramps(count: int, height: int, width: int) -> torch.Tensor:
    """Two channels: the column and the row of each pixel, which bilinear sampling reproduces between them."""
    columns, rows = (
        torch.arange(float(width)).expand(height, -1),
        torch.arange(float(height))[:, None].expand(-1, width),
    )
    return torch.stack([columns, rows]).expand(count, -1, -1, -1)


def _one(image, angle_deg=0.0, zoom=1.0, right=0.0, down=0.0):
    angle_rad, shift = torch.tensor([math.radians(angle_deg)]), torch.tensor([[right, down]])
    maps = _turn_zoom_shift(angle_rad, torch.tensor([zoom]), shift, aspect=image.shape[1] / image.shape[2])
    return _sample(image[None], maps)[0]


@pytest.mark.parametrize(
    ("turns", "shape"), [(0, (3, 5, 7)), (1, (1, 6, 6)), (2, (1, 6, 6)), (3, (1, 6, 6)), (2, (1, 4, 8))]
)
def test_quarter_turns_are_counter_clockwise(turns, shape):
    image = torch.rand(shape)
    torch.testing.assert_close(_one(image, angle_deg=90 * turns), image.rot90(turns, (1, 2)), atol=1e-5, rtol=0)


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


def test_flips_are_of_half_the_images_left_to_right():
    images = torch.rand(200, 3, 5, 8)
    flipped = random_affine(images, _only(flip=True), _seeded())
    is_flipped = torch.tensor([torch.allclose(f, i.flip(2), atol=1e-5) for f, i in zip(flipped, images)])
    torch.testing.assert_close(flipped[~is_flipped], images[~is_flipped], atol=1e-5, rtol=0)
    assert 70 < int(is_flipped.sum()) < 130


def test_crops_are_of_the_padded_image_by_whole_pixels():
    images = torch.rand(300, 2, 6, 9) + 0.1
    cropped = random_affine(images, _only(crop_padding=2), _seeded())
    padded = F.pad(images, (2, 2, 2, 2))
    windows = torch.stack([padded[:, :, top : top + 6, left : left + 9] for top in range(5) for left in range(5)])
    close = (windows - cropped).abs().amax((2, 3, 4)) < 1e-5  # (25, 300)
    assert (close.sum(0) == 1).all()
    assert (close.sum(1) > 0).all()  # every offset occurs


def test_resized_crops_are_windows_of_whole_pixels_within_area_and_aspect():
    height, width, count = 40, 50, 400
    cropped = random_affine(_ramps(count, height, width), _only(resized_crop=True), _seeded())
    # The slopes in the middle tell the size of the window; the place of the middle tells its corner.
    size = torch.stack(
        [
            (cropped[:, 0, 20, 30] - cropped[:, 0, 20, 20]) / 10 * width,
            (cropped[:, 1, 30, 25] - cropped[:, 1, 20, 25]) / 10 * height,
        ],
        dim=1,
    )
    middle = torch.stack([cropped[:, 0, 19:21, 24:26].mean((1, 2)), cropped[:, 1, 19:21, 24:26].mean((1, 2))], dim=1)
    corner = middle + 0.5 - size / 2
    for whole in (size, corner):
        torch.testing.assert_close(whole, whole.round(), atol=1e-3, rtol=0)
    size, corner = size.round(), corner.round()
    assert (corner >= 0).all()
    assert (corner + size <= torch.tensor([width, height])).all()
    area, aspect = size.prod(1) / (height * width), size[:, 0] / size[:, 1]
    assert 0.07 < area.min() < 0.12  # rounding to whole pixels changes both a little
    assert 0.85 < area.max() <= 1
    assert 0.7 < aspect.min() < 0.8
    assert 1.25 < aspect.max() < 1.42
    # The window enlarged, but for the half pixel at its edges, which sees its neighbours.
    noise = torch.rand(count, 3, height, width)
    enlarged = random_affine(noise, _only(resized_crop=True), _seeded())
    for i in range(20):
        (w, h), (left, top) = size[i].int().tolist(), corner[i].int().tolist()
        window = noise[i : i + 1, :, top : top + h, left : left + w]
        expected = F.interpolate(window, (height, width), mode="bilinear", align_corners=False)[0]
        inner = (slice(None), slice(height // h + 1, -(height // h) - 1), slice(width // w + 1, -(width // w) - 1))
        torch.testing.assert_close(enlarged[i][inner], expected[inner], atol=1e-4, rtol=0)
    assert enlarged.min() >= 0
    assert random_affine(noise + 1, _only(resized_crop=True), _seeded()).min() >= 1  # no black at the edges


def test_where_no_window_fits_the_central_one_is_taken():
    # 8% of 4 x 100 pixels are 32, but no window of 4 rows and an aspect up to 4/3 has more than 21.
    image = torch.rand(1, 1, 4, 100)
    cropped = random_affine(image, _only(resized_crop=True), _seeded())
    expected = F.interpolate(image[..., 47:52], (4, 100), mode="bilinear", align_corners=False)
    torch.testing.assert_close(cropped[..., 10:-10], expected[..., 10:-10], atol=1e-4, rtol=0)


def test_all_maps_together_are_one_after_the_other():
    steps = [
        {"resized_crop": True},
        {"crop_padding": 2},
        {"flip": True},
        {"rotation_deg": 10.0, "shift": 0.05, "zoom": 0.1},
    ]
    images = _ramps(40, 30, 32)
    together = random_affine(images, _only(**{k: v for step in steps for k, v in step.items()}), _seeded())
    generator = _seeded()
    for step in steps:
        images = random_affine(images, _only(**step), generator)
    inner = (..., slice(10, -10), slice(10, -10))  # no black comes so far
    torch.testing.assert_close(together[inner], images[inner], atol=1e-3, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_jitter_by_its_formula(channels):
    images = torch.rand(6, channels, 4, 5)
    kept = images.clone()
    jittered = color_jitter(images, 0.9, _seeded())
    assert torch.equal(images, kept)
    factors = (1 + 0.9 * (2 * torch.rand(3, 6, generator=_seeded()).double() - 1)).tolist()
    weights = torch.tensor([0.2989, 0.587, 0.114] if channels == 3 else [1.0]).double()[:, None, None]
    for image, result, brightness, contrast, saturation in zip(images.double(), jittered, *factors):
        bright = (image * brightness).clamp(0, 1)
        mean = (bright * weights).sum(0).mean()
        contrasted = (contrast * bright + (1 - contrast) * mean).clamp(0, 1)
        grey = (contrasted * weights).sum(0)
        expected = (saturation * contrasted + (1 - saturation) * grey).clamp(0, 1) if channels == 3 else contrasted
        torch.testing.assert_close(result.double(), expected, atol=1e-5, rtol=0)


def test_jitter_reaches_its_strength_and_no_further():
    # An even grey has no contrast and no colour: brightness alone changes it.
    levels = color_jitter(torch.full((500, 3, 2, 2), 0.5), 0.4, _seeded()).flatten(1)
    torch.testing.assert_close(levels.amin(1), levels.amax(1), atol=1e-4, rtol=0)
    assert 0.3 - 1e-3 <= levels.min() < 0.31
    assert 0.69 < levels.max() <= 0.7 + 1e-3


EVERYTHING = Augmentation(flip=True, crop_padding=2, resized_crop=True, color_jitter=0.4)


def test_augmentation_is_the_map_then_the_colours():
    images = torch.rand(5, 3, 9, 9)
    generator = _seeded()
    mapped = random_affine(images, EVERYTHING, generator)
    assert torch.equal(augment(images, EVERYTHING, _seeded()), color_jitter(mapped, 0.4, generator))


def test_the_generator_alone_decides_and_the_images_stay():
    images = torch.rand(5, 3, 9, 9)
    kept = images.clone()
    first = augment(images, EVERYTHING, _seeded(1))
    torch.manual_seed(5)
    assert torch.equal(augment(images, EVERYTHING, _seeded(1)), first)
    assert not torch.equal(augment(images, EVERYTHING, _seeded(2)), first)
    assert torch.equal(images, kept)
    assert (first.dtype, first.shape) == (images.dtype, images.shape)


def test_switched_off_nothing_is_drawn():
    images = torch.rand(2, 1, 8, 8)
    generator = _seeded()
    state = generator.get_state()
    assert augment(images, OFF, generator) is images
    assert torch.equal(generator.get_state(), state)
