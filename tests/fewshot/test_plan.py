"""An estimate leaves no trace, and a log is made only where it can be."""

import sys
import types
from typing import ClassVar

import pytest
import torch

from fused_margins.fewshot.config import make_loss
from fused_margins.fewshot.datasets import Task
from fused_margins.fewshot.errors import UserError
from fused_margins.fewshot.plan import estimate, plan_table
from fused_margins.fewshot.tensorboard import tensorboard_log
from fused_margins.fewshot.trainer import Trainer

MAGNET = make_loss("magnet", warm_epochs=1, clusters_per_class=2, num_clusters=3, samples_per_cluster=4)


@pytest.mark.parametrize("loss", [make_loss("margin-softmax"), MAGNET, make_loss("triplet", memory=16)])
def test_an_estimate_leaves_no_trace(images, config, tmp_path, loss):
    config = config.model_copy(update={"loss": loss})
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
    assert trainer.history == untouched.history
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), untouched.model.parameters()))


def test_a_training_that_has_begun_is_not_estimated(images, config):
    trainer = Trainer(config, images)
    trainer.update(trainer.loss_and_gradients(*trainer.next_batch()))
    with pytest.raises(ValueError, match="expected one that has not begun, it has done 1 steps"):
        estimate(trainer)


class Writer:
    """What torch.utils.tensorboard would write to."""

    made: ClassVar[list] = []

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.points, self.closed = folder, purge_step, [], False
        Writer.made.append(self)

    def add_scalar(self, name, value, step):
        self.points.append((name, value, step))

    def close(self):
        self.closed = True


def test_tensorboard_gets_every_step_and_the_figures(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    with tensorboard_log(tmp_path, steps_done=7) as log:
        log.step(7, 0.5, 0.1)
        log.figures(8, {"nmi": 0.4, "modes": None})
    (writer,) = Writer.made
    assert (writer.folder, writer.purge_step, writer.closed) == (str(tmp_path / "tensorboard"), 7, True)
    assert writer.points == [("train/loss", 0.5, 7), ("train/learning_rate", 0.1, 7), ("evaluation/nmi", 0.4, 8)]


def test_without_tensorboard_it_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"), tensorboard_log(tmp_path):
        pass
