"""Image sets, the registry, and the sorting of classes into trained and novel ones."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits

from fused_margins.fewshot import datasets
from fused_margins.fewshot.datasets import ImageSet, load, make_task
from fused_margins.fewshot.errors import UserError


def test_digits_are_complete_disjoint_and_stratified():
    splits = load("digits")
    assert {name: len(part) for name, part in splits.items()} == {"train": 1198, "test": 599}
    counts = {name: torch.bincount(part.labels, minlength=10) for name, part in splits.items()}
    assert torch.equal(counts["train"] + counts["test"], torch.bincount(torch.from_numpy(load_digits().target)))
    assert (counts["test"] - counts["train"] / 2).abs().max() <= 1
    for part in splits.values():
        assert part.images.shape[1:] == (1, 8, 8)
        assert torch.equal(part.coarse_labels, part.labels % 2)
    # Together they are the data set, image by image, to the nearest of 255 grey levels.
    everything = torch.cat([part.images for part in splits.values()]).flatten(1)
    original = (torch.from_numpy(load_digits().images).flatten(1) * (255 / 16)).round().to(torch.uint8)
    assert torch.equal(everything.unique(dim=0), original.unique(dim=0))


def test_digits_are_the_same_every_time():
    assert torch.equal(load("digits")["test"].images, load("digits")["test"].images)


def test_pixels_are_floats_in_the_unit_interval():
    pixels = load("digits")["train"].pixels(slice(0, 5))
    assert pixels.dtype == torch.float32
    assert pixels.min() == 0
    assert 0.9 < pixels.max() <= 1


def test_with_classes_keeps_and_relabels(images):
    chosen = images.with_classes([4, 1])
    assert chosen.class_names == ("e", "b")
    assert len(chosen) == 20
    assert torch.equal(chosen.labels.bincount(), torch.tensor([10, 10]))
    assert torch.equal(chosen.images[chosen.labels == 0], images.images[images.labels == 4])
    assert torch.equal(chosen.coarse_labels, torch.full((20,), 1))


@pytest.mark.parametrize("classes", [[6], [-1], [1, 1], []])
def test_with_classes_rejects_what_is_not_a_set_of_classes(images, classes):
    with pytest.raises(UserError, match=r"classes: expected different values in \[0, 6\)"):
        images.with_classes(classes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(60, 1, 8, 8)}, "images: expected uint8"),
        ({"labels": torch.zeros(59, dtype=torch.int64)}, r"labels: expected int64 \(60,\)"),
        ({"labels": torch.zeros(60)}, "labels: expected int64"),
        ({"coarse_labels": torch.full((60,), 3)}, r"coarse_labels: expected values in \[0, 3\), got 3 to 3"),
    ],
)
def test_inconsistent_sets_are_rejected(images, change, message):
    with pytest.raises(ValueError, match=message):
        replace(images, **change)


def test_a_loader_registers_by_name_and_gets_the_data_root(images, monkeypatch, tmp_path):
    seen: list[Path | None] = []

    @datasets.register("patches")
    def load_patches(root: Path | None) -> dict[str, ImageSet]:
        seen.append(root)
        return {"train": images, "test": images}

    monkeypatch.setitem(datasets.LOADERS, "patches", load_patches)
    monkeypatch.delenv("FUSED_MARGINS_DATA", raising=False)
    load("patches")
    monkeypatch.setenv("FUSED_MARGINS_DATA", str(tmp_path))
    assert load("patches")["train"] is images
    assert seen == [None, tmp_path]


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match=r"dataset: expected one of .*digits.*, got 'digit'"):
        load("digit")


def test_tasks_by_image_by_chosen_class_and_by_split(images):
    by_image = make_task({"train": images, "test": images})
    assert (by_image.training, by_image.held_out, by_image.novel) == (images, images, None)

    by_class = make_task({"train": images, "test": images}, classes=[0, 2])
    assert by_class.training.class_names == by_class.held_out.class_names == ("a", "c")
    assert by_class.novel.class_names == ("b", "d", "e", "f")
    assert len(by_class.novel) == 80  # both splits: the training saw none of them

    test = replace(images, class_names=tuple("uvwxyz"))
    by_split = make_task({"train": images, "test": test}, classes=[0, 2])
    assert by_split.training.class_names == ("a", "c")
    assert by_split.held_out is None
    assert by_split.novel is test


def test_all_classes_chosen_leaves_none_novel(images):
    assert make_task({"train": images, "test": images}, classes=range(6)).novel is None
