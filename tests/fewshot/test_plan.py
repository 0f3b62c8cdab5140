"""An estimate leaves no trace."""

import pytest

from fused_margins.fewshot.config import make_loss
from fused_margins.fewshot.datasets import Task
from fused_margins.fewshot.plan import estimate, plan_table
from fused_margins.fewshot.trainer import Trainer

from .trainings import MAGNET, assert_same_bits


@pytest.mark.parametrize("loss", [make_loss("margin-softmax"), MAGNET, make_loss("triplet", memory=16)])
def test_an_estimate_leaves_no_trace(images, config, tmp_path, loss):
    config = config.but(loss=loss)
    trainer = Trainer(config, images)
    times = estimate(trainer, warm_up=1, timed=2)
    assert times.epoch_seconds > 0
    assert times.total_seconds == pytest.approx(config.epochs * times.epoch_seconds)
    assert 0 < times.data_share < 1
    rows = dict(row for row in plan_table(trainer, Task(images, None, None), tmp_path / "run", times).rows)
    assert rows["training set"].startswith("60 images (1 x 8 x 8) of 6 classes")
    assert not (tmp_path / "run").exists()
    untouched = Trainer(config, images)
    for other in (trainer, untouched):
        other.train()
    assert_same_bits(trainer, untouched)


def test_a_training_that_has_begun_is_not_estimated(images, config):
    trainer = Trainer(config, images)
    trainer.update(trainer.loss_and_gradients(*trainer.next_batch()))
    with pytest.raises(ValueError, match="expected one that has not begun, it has done 1 steps"):
        estimate(trainer)
