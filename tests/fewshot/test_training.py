"""Training: it learns, it repeats itself bit by bit, it survives interrupts, and collapse does not break it."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from fused_margins.fewshot import trainer as trainer_module
from fused_margins.fewshot.config import LOSSES, Backbone, TrainConfig, make_loss
from fused_margins.fewshot.metrics import discriminability
from fused_margins.fewshot.optimization import build_optimizer
from fused_margins.fewshot.runs import Run
from fused_margins.fewshot.terminal import UserError
from fused_margins.fewshot.trainer import Trainer, resume

from .trainings import MAGNET, StopAfter, assert_same_bits, loss_named


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_separates_the_classes(images, config, name):
    wide = Backbone(blocks=2, channels=16, embedding_size=8)
    trainer = Trainer(config.but(loss=loss_named(name), epochs=12, backbone=wide, learning_rate=1e-2), images)
    before = discriminability(trainer.embed(images), images.labels)
    assert trainer.train()
    assert [row["epoch"] for row in trainer.history] == list(range(12))
    assert discriminability(trainer.embed(images), images.labels) > 2 * before


@pytest.mark.parametrize(
    ("name", "samples_per_class"), [*((name, None) for name in LOSSES), ("softmax", 4), ("triplet", 4)]
)
def test_the_same_seed_gives_the_same_bits_and_leaves_the_host_alone(images, config, name, samples_per_class):
    config = config.but(loss=loss_named(name), samples_per_class=samples_per_class)
    host = torch.get_rng_state()
    first = Trainer(config, images)
    first.train()
    assert torch.equal(torch.get_rng_state(), host)
    torch.rand(17)  # what the host draws must not matter either
    second = Trainer(config, images)
    second.train()
    assert_same_bits(first, second)
    other = Trainer(config.but(seed=4), images)
    assert not other.train(stop=StopAfter(5))
    assert other.history[0] != first.history[0]


def test_the_magnet_index_is_refreshed_when_it_is_due(images, config, monkeypatch):
    loss = MAGNET.but(warm_epochs=1, refresh_epochs=2)
    trainer = Trainer(config.but(loss=loss, epochs=6), images)
    fitted_in = []
    fit = trainer.objective.index.fit
    monkeypatch.setattr(trainer.objective.index, "fit", lambda *args: fitted_in.append(trainer.epoch) or fit(*args))
    trainer.train()
    assert fitted_in == [1, 3, 5]


def test_a_run_does_not_resume_on_other_data(images, config, tmp_path):
    run = Run.create(tmp_path, config)
    assert not Trainer(config, images).train(run, StopAfter(2))
    before = run.metrics_path.exists() and run.metrics_path.read_bytes()
    for other in (
        replace(images, images=images.images ^ 1),
        replace(images, labels=images.labels.flip(0)),
        images.subset(slice(0, len(images) - 1)),
    ):
        with pytest.raises(UserError, match="dataset: digits holds other images or labels than when this run began"):
            resume(run, other)
    assert (run.metrics_path.exists() and run.metrics_path.read_bytes()) == before
    assert resume(run, images).train(run)


@pytest.mark.parametrize("name", ["margin-softmax", "triplet", "margin", "infonce", "triplet with memory", "magnet"])
def test_an_interrupted_run_resumes_to_the_same_bits(images, config, tmp_path, name):
    config = config.but(loss=loss_named(name))
    whole_run = Run.create(tmp_path / "whole", config)
    whole = Trainer(config, images)
    assert whole.train(whole_run)

    for steps in (0, 1, 4, 6, 10):  # before the start, within epochs, between epochs of four or five
        run = Run.create(tmp_path / f"interrupted after {steps}", config)
        stopped = Trainer(config, images)
        assert not stopped.train(run, StopAfter(steps))
        assert stopped.steps_done == steps
        run.append_metrics({"epoch": 99})  # as if more had been logged than was saved
        resumed = resume(run, images)
        assert resumed.steps_done == steps
        assert resumed.train(run)

        assert_same_bits(whole, resumed)
        assert run.metrics_path.read_bytes() == whole_run.metrics_path.read_bytes()


@pytest.fixture
def large_images(images):
    """The images at 32 x 32 pixels, in three channels of different brightness."""
    pixels = images.images.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    return replace(images, images=torch.cat([pixels, pixels // 2, 255 - pixels], dim=1))


BACKBONES = {
    "convnet": Backbone(blocks=3, channels=4, embedding_size=8),
    "conv4": Backbone(name="conv4", channels=4, standardize=True),
    "resnet12": Backbone(name="resnet12", channels=2, drop_rate=0.1, dropblock_size=2, dropblock_steps=5),
    "resnet18": Backbone(
        name="resnet18", channels=2, embedding_size=6, drop_rate=0.1, dropblock_size=4, dropblock_steps=5
    ),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_learns(large_images, config, name):
    backbone = BACKBONES[name].but(channels=4, drop_rate=0.0)
    config = config.but(backbone=backbone, epochs=9, learning_rate=0.01)
    trainer = Trainer(config, large_images)
    trainer.train()
    predicted = trainer.objective.classifier().predictions(trainer.embed(large_images)).argmax(1)
    assert (predicted == large_images.labels).float().mean() > 0.9


@pytest.mark.parametrize(
    ("name", "optimizer", "schedule"),
    [
        ("convnet", "adam", "warmup-cosine"),
        ("conv4", "sgd", "one-cycle"),
        ("resnet12", "adam", "warmup-steps"),
        ("resnet18", "sgd", "one-cycle"),
    ],
)
def test_every_backbone_and_optimizer_resumes_to_the_same_bits(
    large_images, config, tmp_path, name, optimizer, schedule
):
    config = config.but(backbone=BACKBONES[name], optimizer=optimizer, schedule=schedule, epochs=4)
    host = torch.get_rng_state()
    whole = Trainer(config, large_images)
    whole.train()
    assert torch.equal(torch.get_rng_state(), host)

    run = Run.create(tmp_path / "run", config)
    assert not Trainer(config, large_images).train(run, StopAfter(6))
    torch.rand(17)  # what the host draws must not matter
    resumed = resume(run, large_images)
    assert resumed.train(run)
    assert_same_bits(whole, resumed)


def test_features_are_dropped_by_the_seed(large_images, config):
    backbone = BACKBONES["resnet12"].but(dropblock_steps=10**9)  # so that steps alone change nothing
    config = config.but(backbone=backbone)
    losses = []
    for _ in range(2):
        trainer = Trainer(config, large_images)
        images, batch = trainer.next_batch()
        for _ in range(2):  # the same batch twice: another draw each time
            losses.append(float(trainer.loss_and_gradients(images, batch)))
    assert losses[:2] == losses[2:]
    assert losses[0] != losses[1]


def test_the_network_is_given_the_statistics_of_the_training_pixels(large_images, config):
    config = config.but(backbone=BACKBONES["conv4"])
    model = Trainer(config, large_images).model
    pixels = large_images.pixels().double()
    torch.testing.assert_close(model.pixel_mean.flatten().double(), pixels.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(
        model.pixel_std.flatten().double(), pixels.transpose(0, 1).flatten(1).std(dim=1, correction=0)
    )
    parts = trainer_module._pixel_statistics(large_images, at_once=7)
    torch.testing.assert_close(parts[0].float(), model.pixel_mean.flatten())
    black = replace(large_images, images=torch.zeros_like(large_images.images))
    assert Trainer(config, black).embed(black).isfinite().all()


def _learning_rates(trainer):
    rates = []
    while not trainer.finished:
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.update(trainer.loss_and_gradients(*trainer.next_batch()))
    return rates


def test_warmup_and_cosine_in_steps(images, config):
    config = config.but(schedule="warmup-cosine", epochs=4, warmup_epochs=1, learning_rate=0.016)
    rates = _learning_rates(Trainer(config, images))
    assert rates[:5] == pytest.approx([0.001, 0.00475, 0.0085, 0.01225, 0.016])  # four steps of warm-up
    assert rates[10] == pytest.approx(0.008 + 0.5e-6)  # half-way down
    assert len(rates) == 16
    assert all(a > b for a, b in pairwise(rates[4:]))
    assert 1e-6 < rates[-1] < 0.0004


def test_warmup_and_steps(images, config):
    config = config.but(schedule="warmup-steps", epochs=4, warmup_epochs=1, learning_rate=0.016)
    rates = _learning_rates(Trainer(config, images))
    expected = [0.001, 0.00475, 0.0085, 0.01225, *[0.016] * 4, *[0.0016] * 4, *[0.00016] * 4]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize(("epochs", "warmup_epochs", "peak_at"), [(8, None, 8), (3, None, 0), (3, 0, 0), (3, 2, 8)])
def test_where_the_warmup_ends(images, config, epochs, warmup_epochs, peak_at):
    config = config.but(schedule="warmup-cosine", epochs=epochs, warmup_epochs=warmup_epochs, learning_rate=0.01)
    rates = _learning_rates(Trainer(config, images))
    assert rates.index(max(rates)) == peak_at
    assert max(rates) == pytest.approx(0.01)


def test_a_warmup_that_does_not_fit_is_named(images, config):
    with pytest.raises(UserError, match="warmup_epochs: expected fewer than the 3 epochs, got 3"):
        Trainer(config.but(schedule="warmup-cosine", warmup_epochs=3), images)
    with pytest.raises(UserError, match="warmup_epochs: expected at most half of the 4 epochs, got 3"):
        Trainer(config.but(schedule="warmup-steps", epochs=4, warmup_epochs=3), images)
    with pytest.raises(UserError, match="warmup_epochs: the schedule one-cycle has none"):
        Trainer(config.but(warmup_epochs=1), images)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_steps_are_those_of_the_definition(optimizer):
    config = TrainConfig(optimizer=optimizer, learning_rate=0.1, weight_decay=0.01)
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 5)) for _ in range(2))
    fused = build_optimizer(config, [ours])
    if optimizer == "adam":
        plain = torch.optim.Adam([theirs], 0.1, weight_decay=0.01, foreach=False)
    else:
        plain = torch.optim.SGD([theirs], 0.1, momentum=0.9, nesterov=True, weight_decay=0.01, foreach=False)
    for _ in range(4):
        for parameter, algorithm in ((ours, fused), (theirs, plain)):
            algorithm.zero_grad()
            parameter.square().square().sum().backward()
            algorithm.step()
    torch.testing.assert_close(ours, theirs)
    assert (ours - torch.linspace(-1, 1, 5)).abs().max() > 0.1


def test_a_run_is_saved_as_it_goes(images, config, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "CHECKPOINT_SECONDS", 0.0)
    run = Run.create(tmp_path / "run", config)

    class PowerCut(Exception):
        pass

    def cut():
        if len(run.read_metrics()) == 2:
            raise PowerCut

    trainer = Trainer(config, images)
    with pytest.raises(PowerCut):
        trainer.train(run, on_step=cut)
    resumed = resume(run, images)
    assert resumed.epoch == 2
    resumed.train(run)
    whole = Trainer(config, images)
    whole.train()
    assert_same_bits(whole, resumed)


def test_the_length_of_a_training_is_known_without_counting(images, config):
    for loss in (make_loss("softmax"), MAGNET):
        trainer = Trainer(config.but(loss=loss, epochs=1_000_000), images)
        for epoch in (0, 1, 2, 7):
            counted = sum(trainer.objective.num_batches(e) for e in range(epoch))
            assert trainer.objective.steps_before(epoch) == counted
        assert trainer.total_steps == trainer.objective.steps_before(1_000_000)


def test_magnet_sees_its_images_whatever_the_number_of_clusters(images, config):
    """Of two classes with a cluster each a batch has two clusters, however many were asked for."""
    loss = make_loss("magnet", warm_epochs=0, clusters_per_class=1, num_clusters=6, samples_per_cluster=4)
    two = images.with_classes([0, 1])
    trainer = Trainer(config.but(loss=loss), two)
    seen = sum(len(trainer.next_batch()[0]) for _ in range(trainer.objective.num_batches(0)))
    assert len(two) - 8 < seen <= len(two)
