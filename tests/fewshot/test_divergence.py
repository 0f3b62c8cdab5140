"""Trainings that go wrong: they end with a word about it, or survive."""

from dataclasses import replace

import pytest
import torch

from fused_margins.fewshot import trainer as trainer_module
from fused_margins.fewshot.config import LOSSES, Backbone, make_loss
from fused_margins.fewshot.runs import Run
from fused_margins.fewshot.terminal import UserError
from fused_margins.fewshot.trainer import Trainer, resume

from .trainings import MAGNET, StopAfter, loss_named


def test_divergence_is_reported_and_does_not_reach_the_checkpoint(images, config, tmp_path, contents):
    config = config.but(
        loss=make_loss("margin-softmax", similarity="dot"),
        backbone=Backbone(blocks=2, channels=4, embedding_size=8, normalize=False),
        learning_rate=1e30,
    )
    run = Run.create(tmp_path / "run", config)
    trainer = Trainer(config, images)
    trainer.train(run, StopAfter(0))
    before = contents(run.folder)
    with pytest.raises(UserError, match=r"training diverged: loss (nan|inf) in epoch 0"):
        trainer.train(run)
    assert contents(run.folder) == before


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_embeddings_that_are_not_finite_end_the_training_at_that_step(images, config, name, bad, tmp_path, contents):
    """Whatever the loss makes of them: here it is as good as can be."""
    loss = loss_named(name)
    trainer = Trainer(config.but(loss=loss, epochs=4), images)
    forward, steps = trainer.model.forward, []

    def spoilt(*args):
        embeddings = forward(*args)
        if trainer.model.training:
            steps.append(trainer.steps_done)
        return embeddings.index_fill(0, torch.tensor([3]), bad) if trainer.steps_done == 6 else embeddings

    trainer.model.forward = spoilt
    trainer.objective.forward = lambda embeddings, batch: embeddings.nan_to_num(0, 0, 0).square().sum() * 0
    if name == "magnet":
        trainer.objective.index.update_losses = lambda *args: None
    run = Run.create(tmp_path / "run", trainer.config)
    with pytest.raises(UserError, match="training diverged: loss nan in epoch 1, batch "):
        trainer.train(run)
    assert steps[-1] == 6
    assert all(row["loss"] == 0 for row in trainer.history)
    assert len(run.read_metrics()) == 1
    assert resume(run, images).steps_done == 0  # from before


def test_a_network_that_died_in_its_last_step_is_neither_saved_nor_judged(images, config, tmp_path):
    run = Run.create(tmp_path / "run", config)
    trainer = Trainer(config, images)

    def die():
        if trainer.steps_done == trainer.total_steps - 1:
            update = trainer.optimizer.step
            trainer.optimizer.step = lambda: (update(), next(trainer.model.parameters()).data.fill_(float("inf")))

    with pytest.raises(UserError, match="training diverged: weights that are not finite in epoch 2, batch 4"):
        trainer.train(run, on_step=die)
    assert resume(run, images).steps_done == 0
    with pytest.raises(UserError, match="training diverged: embeddings that are not finite"):
        trainer.embed(images)
    with pytest.raises(UserError, match="training diverged: embeddings that are not finite"):
        trainer.embed_pixels(images.pixels())


def test_embeddings_whose_distances_are_not_finite_are_a_divergence(images, config):
    trainer = Trainer(config, images)
    trainer.model.forward = lambda *args: torch.full((len(args[0]), 8), 1e25)
    with pytest.raises(UserError, match="training diverged"):
        trainer.embed(images)


@pytest.mark.parametrize("normalize", [True, False])
def test_vanishing_variance_is_survived(images, config, normalize):
    # All images alike: every embedding is the same point, clusters have no width, and k-means has nothing to divide.
    alike = replace(images, images=images.images[:1].expand_as(images.images).contiguous())
    backbone = config.backbone.but(normalize=normalize)
    config = config.but(
        loss=MAGNET, backbone=backbone, augmentation=config.augmentation.but(rotation_deg=0.0, shift=0.0, zoom=0.0)
    )
    trainer = Trainer(config, alike)
    assert trainer.train()
    assert all(0 <= row["loss"] < 10 for row in trainer.history)
    assert float(trainer.objective.index.variance) == pytest.approx(MAGNET.variance_floor)  # the floor was reached
    assert len(trainer.objective.index.centroids) == 6  # one cluster a class is all that can be filled
    assert trainer.embed(alike).isfinite().all()


def test_classes_smaller_than_their_clusters_are_survived(images, config):
    # Class "a" keeps a single image, "b" two; five clusters are asked of each.
    kept = torch.cat([(images.labels == c).nonzero()[:n, 0] for c, n in enumerate([1, 2, 10, 10, 10, 10])])
    small = replace(
        images, images=images.images[kept], labels=images.labels[kept], coarse_labels=images.coarse_labels[kept]
    )
    loss = make_loss("magnet", warm_epochs=0, clusters_per_class=5, num_clusters=4, samples_per_cluster=4)
    trainer = Trainer(config.but(loss=loss, epochs=6), small)
    assert trainer.train()
    assert all(torch.tensor(row["loss"]).isfinite() for row in trainer.history)


def test_a_device_that_torch_says_much_of_gets_a_line(monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("Could not run. " * 100)

    monkeypatch.setattr(torch, "zeros", fail)
    with pytest.raises(UserError, match="device: 'mps' cannot be used: Could not run") as error:
        trainer_module.usable_device("mps")
    assert len(str(error.value)) < 250
