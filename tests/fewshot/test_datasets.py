"""Image sets, the loaders by name, and the sorting of classes into trained and novel ones."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits

from fused_margins.fewshot import datasets
from fused_margins.fewshot.datasets import ImageSet, concatenate, load, make_task
from fused_margins.fewshot.datasets.images import from_classes
from fused_margins.fewshot.terminal import UserError


def test_digits_are_complete_disjoint_and_stratified():
    splits = load("digits")
    assert {name: len(part) for name, part in splits.items()} == {"train": 1198, "test": 599}
    counts = {name: torch.bincount(part.labels, minlength=10) for name, part in splits.items()}
    assert torch.equal(counts["train"] + counts["test"], torch.bincount(torch.from_numpy(load_digits().target)))
    assert (counts["test"] - counts["train"] / 2).abs().max() <= 1
    for part in splits.values():
        assert part.shape == (1, 8, 8)
        assert torch.equal(part.coarse_labels, part.labels % 2)
    # Together they are the data set, image by image, to the nearest of 255 grey levels.
    everything = torch.cat([part.pixels() for part in splits.values()]).flatten(1) * 255
    original = (torch.from_numpy(load_digits().images).flatten(1) * (255 / 16)).round()
    assert _sorted(everything) == _sorted(original)


def _sorted(rows):
    return sorted(tuple(row) for row in rows.round().int().tolist())


def test_digits_are_the_same_every_time():
    assert torch.equal(load("digits")["test"].pixels(), load("digits")["test"].pixels())


def test_with_classes_keeps_and_relabels(images):
    chosen = images.with_classes([4, 1])
    assert chosen.class_names == ("e", "b")
    assert len(chosen) == 20
    assert torch.equal(chosen.labels.bincount(), torch.tensor([10, 10]))
    assert torch.equal(chosen.subset(chosen.labels == 0).pixels() * 255, images.images[images.labels == 4].float())
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
        ({"index": torch.full((60,), 60)}, r"index: expected values in \[0, 60\), got 60 to 60"),
        ({"index": torch.arange(59)}, r"labels: expected int64 \(59,\)"),
        ({"quarter_turns": torch.full((60,), -1)}, r"quarter_turns: expected values in \[0, 4\), got -1 to -1"),
        (
            {
                "quarter_turns": torch.zeros(60, dtype=torch.int64),
                "images": torch.zeros(60, 1, 8, 9, dtype=torch.uint8),
            },
            "quarter_turns: expected square images, got 8 x 9",
        ),
        ({"coarse_labels": torch.full((60,), 3)}, r"coarse_labels: expected values in \[0, 3\), got 3 to 3"),
    ],
)
def test_inconsistent_sets_are_rejected(images, change, message):
    with pytest.raises(ValueError, match=message):
        replace(images, **change)


def test_a_loader_has_a_name_and_gets_the_data_root_and_the_size(images, monkeypatch, tmp_path):
    seen: list[tuple[Path, int]] = []

    def load_patches(root: Path, image_size: int = 8) -> dict[str, ImageSet]:
        seen.append((root, image_size))
        return {"train": images, "test": images}

    monkeypatch.setitem(datasets.LOADERS, "patches", load_patches)
    monkeypatch.delenv("FUSED_MARGINS_DATA", raising=False)
    load("patches")
    monkeypatch.setenv("FUSED_MARGINS_DATA", str(tmp_path))
    assert load("patches", 16)["train"] is images
    assert seen == [(Path("data"), 8), (tmp_path, 16)]


@pytest.mark.parametrize("name", ["digit", "folder", "digits:here", ""])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(UserError, match=rf"dataset: expected one of .*digits, .*folder:PATH, .*, got '{name}'"):
        load(name)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (0, "expected 1 to 4096, got 0"),
        (10**9, "expected 1 to 4096, got 1000000000"),
        (9, "digits have 8 x 8 pixels, got 9"),
    ],
)
def test_a_size_that_cannot_be_is_rejected(size, message):
    with pytest.raises(UserError, match=f"image_size: {message}"):
        load("digits", size)


def test_quarter_turns_are_those_of_torch(images):
    turns = torch.arange(60) % 4
    turned = replace(images, quarter_turns=turns)
    expected = torch.stack([image.rot90(int(k), (1, 2)) for image, k in zip(images.images, turns)]).float() / 255
    assert torch.equal(turned.pixels(), expected)
    chosen = torch.tensor([7, 2, 2, 59])
    assert torch.equal(turned.pixels(chosen), expected[chosen])
    assert torch.equal(turned.subset(chosen).pixels(slice(1, 3)), expected[[2, 2]])
    assert torch.equal(turned.to("cpu").with_classes([1]).pixels(), expected[images.labels == 1])


def test_subsets_share_their_pixels(images):
    some = images.subset(torch.tensor([3, 1])).with_classes([1])
    assert some.images.data_ptr() == images.images.data_ptr()
    assert torch.equal(some.pixels() * 255, images.images[[1]].float())


def test_parts_of_one_store_are_joined_without_a_copy(images):
    turned = replace(images, quarter_turns=torch.ones(60, dtype=torch.int64))
    joined = concatenate([images.subset(slice(0, 5)), turned.subset(slice(50, 60))])
    assert joined.images is images.images
    assert torch.equal(joined.pixels(), torch.cat([images.pixels(slice(0, 5)), turned.pixels(slice(50, 60))]))
    assert torch.equal(joined.labels, torch.cat([images.labels[:5], images.labels[50:]]))


def test_stores_of_their_own_are_joined(images):
    other = replace(images, images=255 - images.images)
    joined = concatenate([images.subset(slice(0, 5)), other.subset(slice(50, 60)), images])
    assert torch.equal(
        joined.pixels(), torch.cat([images.pixels(slice(0, 5)), other.pixels(slice(50, 60)), images.pixels()])
    )


def test_classes_become_a_set(images):
    made = from_classes(
        images.images, {"p": [4, 2], "q": [], "r": [0]}, {"p": "x", "q": "y", "r": "x"}, {"p": 0, "q": 0, "r": 3}
    )
    assert (made.class_names, made.coarse_names) == (("p", "q", "r"), ("x", "y"))
    assert (made.labels.tolist(), made.coarse_labels.tolist()) == ([0, 0, 2], [0, 0, 0])
    assert torch.equal(made.pixels()[:2] * 255, images.images[[4, 2]].float())
    assert torch.equal(made.pixels()[2] * 255, images.images[0].rot90(3, (1, 2)).float())


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


def test_the_last_images_of_each_class_are_held_out(images):
    novel = replace(images, class_names=tuple("uvwxyz"))
    # Class a loses four of its ten images: a third of the smallest class, six, is two of every class.
    train = images.subset(torch.tensor([i for i in range(60) if i % 6 or i < 36]))
    validation = replace(images, class_names=tuple("mnopqr"))
    task = make_task({"train": train, "test": novel, "val": validation}, held_out=1 / 3)
    assert task.held_out.labels.bincount().tolist() == [2] * 6
    assert task.training.labels.bincount().tolist() == [4] + [8] * 5
    assert (task.novel, task.validation) == (novel, validation)
    for label in range(6):
        rest, last = (part.subset(part.labels == label).pixels() for part in (task.training, task.held_out))
        assert torch.equal(torch.cat([rest, last]), train.subset(train.labels == label).pixels())
    chosen = make_task({"train": train, "test": novel}, classes=[5, 3], held_out=0.01)
    assert chosen.held_out.class_names == chosen.training.class_names == ("f", "d")
    assert chosen.held_out.labels.bincount().tolist() == [1, 1]


def test_validation_follows_the_chosen_classes_where_it_shares_them(images):
    task = make_task({"train": images, "test": images, "val": images}, classes=[1, 0])
    assert task.validation.class_names == ("b", "a")


@pytest.mark.parametrize(
    ("test", "validation", "message"),
    [
        ("uvwxyz", "abcmno", r"validation must have classes of its own; it shares 3 with training \(a, ...\)"),
        ("uvwxyz", "mnopqz", r"validation must have classes of its own; it shares 1 with test \(z, ...\)"),
        (
            "abcdef",
            "abcmno",
            r"validation must have the classes of training and test or none of them; it shares 3 of 6",
        ),
    ],
)
def test_validation_has_the_classes_of_training_and_test_or_its_own(images, test, validation, message):
    test, validation = (replace(images, class_names=tuple(names)) for names in (test, validation))
    with pytest.raises(UserError, match=message):
        make_task({"train": images, "test": test, "val": validation})


@pytest.mark.parametrize(
    ("fraction", "test_names", "message"),
    [
        (1.0, "uvwxyz", r"held_out: expected a number in \[0, 1\), got 1.0"),
        (0.96, "uvwxyz", "held_out: 0.96 leaves nothing of class a, which has 10 images"),
        (0.1, "abcdef", "held_out: the test split is held out already, expected 0, got 0.1"),
        (0.0, "abcxyz", r"dataset: training and test must have the same classes or none in common; they share 3 of 6"),
    ],
)
def test_tasks_that_cannot_be(images, fraction, test_names, message):
    with pytest.raises(UserError, match=message):
        make_task({"train": images, "test": replace(images, class_names=tuple(test_names))}, held_out=fraction)
