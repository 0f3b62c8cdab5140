"""Checkpoints whose checksum is right and which no training wrote: refused in one line, or of no consequence."""

import math

import pytest
import torch

from fused_margins.fewshot.config import Backbone, make_loss
from fused_margins.fewshot.runs import Run
from fused_margins.fewshot.terminal import UserError
from fused_margins.fewshot.trainer import Trainer, resume

from .trainings import StopAfter, assert_same_bits


def _stopped(images, config, run, steps):
    """A trainer that was stopped after so many steps."""
    trainer = Trainer(config, images)
    trainer.train(run, StopAfter(steps))
    return trainer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 7e-3}, "learning_rate = 0.003, not 0.007"),
        ({"seed": 4}, "seed = 3, not 4"),
        ({"epochs": 9}, "epochs = 3, not 9"),
        ({"loss": make_loss("margin-softmax", margin=0.5)}, "loss.margin = 0.0, not 0.5"),
        ({"backbone": Backbone(blocks=2, channels=6, embedding_size=8)}, "backbone.channels = 4, not 6"),
    ],
)
def test_a_setting_that_changed_under_a_run_is_named(images, config, tmp_path, change, message):
    run = Run.create(tmp_path / "run", config)
    state = _stopped(images, config, run, 1).state_dict()
    run.save_config(config.but(**change))
    with pytest.raises(UserError, match=rf"checkpoint\.pt: it was trained with {message} as config\.json has it now"):
        resume(run, images)
    run.save_config(config)
    del state["config"]  # as an earlier version wrote it
    run.save_checkpoint(state)
    assert resume(run, images).steps_done == 1


@pytest.mark.parametrize("part", ["model", "objective"])
def test_a_checkpoint_with_weights_that_are_not_finite_is_refused(images, config, tmp_path, part):
    run = Run.create(tmp_path / "run", config)
    state = Trainer(config, images).state_dict()
    name, weight = next((n, w) for n, w in state[part].items() if isinstance(w, torch.Tensor) and w.ndim > 1)
    weight.data.flatten()[0] = float("nan")
    run.save_checkpoint(state)
    with pytest.raises(UserError, match=rf"checkpoint\.pt: not a usable checkpoint: {name} holds numbers that are not"):
        resume(run, images)


def test_settings_that_no_run_has_are_refused_in_our_words(images, config, tmp_path):
    run = Run.create(tmp_path / "run", config)
    state = _stopped(images, config, run, 1).state_dict()
    state["config"]["perturbation"] = math.nan
    run.save_checkpoint(state)
    with pytest.raises(UserError, match=r"checkpoint\.pt: not a usable checkpoint: perturbation: .*, got nan$"):
        resume(run, images)


def test_what_follows_from_settings_and_step_is_not_taken_from_a_checkpoint(images, config, tmp_path):
    """A stored schedule past its end, rates that are not numbers, betas of another type: the same bits all the same."""
    run = Run.create(tmp_path / "run", config)
    state = _stopped(images, config, run, 6).state_dict()
    for group in state["optimizer"]["param_groups"]:
        group.update(lr=float("nan"), betas=(2.0, "x"), weight_decay=3.0)
    run.save_checkpoint(state | {"scheduler": {"last_epoch": 999, "_last_lr": [float("nan")]}})
    resumed, whole = resume(run, images), Trainer(config, images)
    for completed in (resumed, whole):
        assert completed.train()
    assert_same_bits(resumed, whole)


def _first_moment(state, **changes):
    """A change of what the optimizer keeps of the first parameter."""
    moment = state["optimizer"]["state"][0]
    return {"optimizer": {"state": {0: {name: changes.get(name, value) for name, value in moment.items()}}}}


DAMAGED = {
    "moment-nan": (lambda s: _first_moment(s, exp_avg=s["optimizer"]["state"][0]["exp_avg"] * torch.nan), "not finite"),
    "moment-shape": (lambda s: _first_moment(s, exp_avg=torch.ones(3)), "expected exp_avg of shape"),
    "moment-type": (lambda s: _first_moment(s, step="a"), "expected step of shape"),
    "moment-missing": (lambda s: {"optimizer": {"state": {0: {}}}}, "expected exp_avg, exp_avg_sq, step of each"),
    "moment-of-none": (lambda s: {"optimizer": {"state": {99: s["optimizer"]["state"][0]}}}, "index out of range"),
    "order-twice": (lambda s: _order(torch.zeros(60, dtype=torch.int64)), "expected different integers"),
    "order-beyond": (lambda s: _order(torch.arange(1, 61)), "expected an order of 60 samples, got 1 to 60"),
    "order-short": (lambda s: _order(torch.arange(9)), "expected an order of 60 samples, got 9"),
    "position": (lambda s: _order(torch.arange(60), 77), "expected a position from 0 to 4, got 77"),
}


def _order(order, position=1):
    return {"objective": {"order": order, "position": position}}


@pytest.mark.parametrize(("damage", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_checkpoint_that_no_training_wrote_is_refused(images, config, tmp_path, damage, message):
    run = Run.create(tmp_path / "run", config)
    state = _stopped(images, config, run, 1).state_dict()
    change = damage(state)
    if "objective" in change:
        change = {"objective": state["objective"] | {"_extra_state": {"sampler": change["objective"]}}}
    run.save_checkpoint(state | change)
    with pytest.raises(UserError, match=rf"checkpoint\.pt: not a usable checkpoint: .*{message}"):
        resume(run, images)
