"""What cannot be judged is said before a training, not after it."""

import dataclasses

import pytest
import torch

from fused_margins.fewshot import evaluation
from fused_margins.fewshot.config import Judging
from fused_margins.fewshot.datasets import ImageSet, Task, make_task
from fused_margins.fewshot.evaluation import check_judging, evaluate
from fused_margins.fewshot.terminal import UserError
from fused_margins.fewshot.trainer import Trainer


def _novel(images: ImageSet, sizes: list[int]) -> ImageSet:
    """The same images under other names, so many of each class."""
    kept = torch.cat([torch.nonzero(images.labels == c)[:size, 0] for c, size in enumerate(sizes)])
    return dataclasses.replace(images.subset(kept), class_names=tuple("ghijkl"))


@pytest.mark.parametrize("asked", [{"ways": (2,)}, {"shots": (1000,)}, {"queries": 3}])
def test_what_asks_for_novel_classes_wants_some(images, asked):
    task = Task(images, images, None)
    check_judging(task, Judging(episodes=3, neighbours=(3,)), "digits")
    with pytest.raises(UserError, match=f"{next(iter(asked))}: digits has no novel classes for episodes"):
        check_judging(task, Judging(**asked), "digits")


@pytest.mark.parametrize("asked", [{"neighbours": (3,)}, {"knc_clusters": 3}])
def test_what_asks_for_held_out_images_wants_some(images, asked):
    task = Task(images, None, images)
    check_judging(task, Judging(shots=(1,), queries=3), "cub")
    with pytest.raises(UserError, match=f"{next(iter(asked))}: cub has no held-out images"):
        check_judging(task, Judging(**asked), "cub")


def test_shots_must_leave_an_image_of_every_class_to_ask_for(images):
    task = make_task({"train": images, "test": _novel(images, [10, 4, 10, 10, 10, 10])})
    check_judging(task, Judging(shots=(1, 3)), "digits")
    with pytest.raises(UserError, match="shots: expected fewer than the 4 images of class h of digits, got 4"):
        check_judging(task, Judging(shots=(1, 4)), "digits")


def test_official_runs_are_for_images_of_one_channel(images, monkeypatch):
    task = make_task({"train": images, "test": images})
    monkeypatch.setattr(evaluation, "one_shot_runs", lambda size: None)
    check_judging(task, Judging(official_runs=True), "omniglot-background")
    with pytest.raises(UserError, match="official_runs: the training classes of omniglot are of the runs' own"):
        check_judging(task, Judging(official_runs=True), "omniglot")
    colour = dataclasses.replace(images, images=images.images.expand(-1, 3, -1, -1))
    task = make_task({"train": colour, "test": colour})
    with pytest.raises(UserError, match="official_runs: expected images of one channel as these drawings have, got 3"):
        check_judging(task, Judging(official_runs=True), "digits")


def test_official_runs_that_are_missing_are_named_before_the_training(images, monkeypatch, tmp_path):
    monkeypatch.setenv("FUSED_MARGINS_DATA", str(tmp_path))
    with pytest.raises(UserError, match="all_runs"):
        check_judging(make_task({"train": images, "test": images}), Judging(official_runs=True), "omniglot-background")


def test_what_is_allowed_can_be_judged(images, config):
    """The least class has one image more than there are shots."""
    task = make_task({"train": images, "test": _novel(images, [10, 4, 10, 10, 10, 10])})
    judging = Judging(shots=(3,), episodes=4)
    check_judging(task, judging, "digits")
    figures = evaluate(Trainer(config, task.training), task, judging)
    assert 0 <= figures["novel_5way_3shot"] <= 1
