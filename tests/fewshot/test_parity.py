"""The comparison of backends: nothing to report for equal ones, and a wrong one does not pass."""

import math
import types

import pytest
import torch

from fused_margins.backends import registry
from fused_margins.fewshot.config import TOLERANCE, make_loss
from fused_margins.fewshot.studies.parity import Parity, relative_difference
from fused_margins.fewshot.terminal import UserError
from fused_margins.fewshot.trainer import Trainer

from .conftest import needs_cpu_backend
from .trainings import loss_named

LOSSES = [make_loss("margin-softmax", margin=-0.3), *map(loss_named, ("triplet", "margin", "infonce", "magnet"))]
IDS = [loss.name for loss in LOSSES]


@pytest.mark.parametrize("loss", LOSSES, ids=IDS)
def test_a_backend_equals_itself_to_the_bit_and_the_first_model_trains_as_if_it_were_alone(images, config, loss):
    config = config.but(loss=loss, backend="reference")
    parity = Parity(config, images, ("reference", "reference"))
    steps = list(parity.steps())
    assert len(steps) == parity.first.total_steps
    assert all(s.loss_difference == s.gradient_difference == s.drift == 0 for s in steps)
    alone = Trainer(config, images)
    alone.train()
    assert parity.first.history == alone.history
    for (name, a), b in zip(alone.model.state_dict().items(), parity.first.model.state_dict().values()):
        assert torch.equal(a, b), name


@needs_cpu_backend
@pytest.mark.parametrize("loss", LOSSES, ids=IDS)
def test_the_cpu_backend_agrees_with_the_reference(images, config, loss):
    steps = list(Parity(config.but(loss=loss), images, ("reference", "cpu")).steps())
    assert max(s.loss_difference for s in steps) <= TOLERANCE
    assert max(s.gradient_difference for s in steps) <= TOLERANCE


def _wrong_kernel(gradient_factor=1.0, added_loss=0.0):
    """The C++ forward or backward, with a mistake."""
    right = registry.kernel("contrast", "cpu")

    def forward(a, plan):
        positive, negative_lse, loss, saved = right.forward(a, plan)
        return positive, negative_lse, loss + added_loss, saved

    def backward(*args):
        grad_x, *rest = right.backward(*args)
        return (grad_x * gradient_factor, *rest)

    return types.SimpleNamespace(**(vars(right) | {"forward": forward, "backward": backward}))


@needs_cpu_backend
@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"gradient_factor": 1.01}, "gradient_difference"),
        ({"added_loss": 0.01}, "loss_difference"),
        ({"gradient_factor": math.nan}, "gradient_difference"),
        ({"added_loss": math.nan}, "loss_difference"),
    ],
)
def test_a_wrong_backend_is_caught(images, config, wrong, field):
    parity = Parity(config, images, ("reference", "cpu"))
    with registry.substitute("contrast", "cpu", _wrong_kernel(**wrong)):
        steps = list(parity.steps(3))
    assert steps
    assert all(getattr(s, field) > TOLERANCE for s in steps)
    assert steps[0].worst_parameter


def test_a_training_that_diverges_is_not_within_the_tolerance(images, config):
    config = config.but(learning_rate=1e30, optimizer="sgd")
    with pytest.raises(UserError, match="training diverged"):
        list(Parity(config, images, ("reference", "reference")).steps())


def test_two_backends_are_wanted(images, config):
    with pytest.raises(UserError, match="backends: expected two names"):
        Parity(config, images, ("reference",))


def test_relative_difference_is_symmetric_and_bounded():
    zeros, ones = torch.zeros(3), torch.ones(3)
    assert relative_difference(zeros, zeros) == 0
    assert relative_difference(zeros, ones) == relative_difference(ones, zeros) == 1
    assert relative_difference(ones, -ones) == 2
    assert relative_difference(torch.tensor(2.0), torch.tensor(1.0)) == 0.5
    for bad in (math.nan, math.inf, -math.inf):
        broken = torch.tensor([1.0, bad, 1.0])
        assert relative_difference(broken, ones) == relative_difference(ones, broken) == math.inf
        assert relative_difference(broken, broken) == 0
        other = torch.tensor([1.0, bad, 3.0])  # beside what both have the difference counts
        assert relative_difference(broken, other) == relative_difference(other, broken) == pytest.approx(2 / 3)
