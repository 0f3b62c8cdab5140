"""Settings survive a round trip, and nothing unknown or out of range gets in."""

import pytest
from pydantic import ValidationError

from fused_margins.fewshot.cli import parse
from fused_margins.fewshot.config import LOSSES, Backbone, TrainConfig, make_loss


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_survives_a_round_trip_through_json(name):
    config = TrainConfig(loss=make_loss(name), classes=(1, 4), epochs=7, samples_per_class=4)
    again = TrainConfig.model_validate_json(config.model_dump_json())
    assert again == config
    assert type(again.loss) is type(config.loss)
    assert again.loss.name == name


@pytest.mark.parametrize(
    "settings",
    [
        {"epoch": 3},
        {"backbone": {"chanels": 8}},
        {"loss": {"name": "magnet", "margin": 0.1}},
        {"loss": {"name": "nonsense"}},
        {"epochs": 0},
        {"learning_rate": 0.0},
        {"augmentation": {"zoom": 1.0}},
        {"optimizer": "lion"},
        {"schedule": "step"},
        {"warmup_epochs": -1},
        {"backbone": {"name": "vgg"}},
        {"backbone": {"drop_rate": 1.0, "name": "resnet12"}},
    ],
)
def test_unknown_names_and_values_out_of_range_are_rejected(settings):
    with pytest.raises(ValidationError):
        TrainConfig.model_validate(settings)


def test_settings_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        TrainConfig().epochs = 3


def test_a_backbone_takes_its_own_settings_only():
    assert Backbone(name="resnet12", drop_rate=0.1, channels=8).drop_rate == 0.1
    with pytest.raises(ValidationError, match=r"blocks\n.*only convnet takes a number of blocks, not conv4"):
        Backbone(name="conv4", blocks=4)
    for name in ("convnet", "conv4"):
        for option, value in {"drop_rate": 0.1, "dropblock_size": 3, "dropblock_steps": 7}.items():
            message = rf"{option}\n.*only resnet12 and resnet18 drop features, not {name}"
            with pytest.raises(ValidationError, match=message):
                Backbone(name=name, **{option: value})


def test_a_backbone_stored_before_it_had_a_name_is_a_convnet():
    stored = {"blocks": 2, "channels": 4, "embedding_size": 8, "normalize": True}
    assert TrainConfig.model_validate({"backbone": stored}).backbone == Backbone(
        name="convnet", blocks=2, channels=4, embedding_size=8
    )


def test_the_flags_of_backbone_and_optimisation():
    flags = "--backbone resnet12 --channels 8 --embedding-size 16 --drop-rate 0.1 --dropblock-size 2 --standardize"
    more = "--optimizer sgd --schedule warmup-cosine --warmup-epochs 2"
    settings = parse(["train", *flags.split(), *more.split()]).settings()
    assert settings.backbone == Backbone(
        name="resnet12", channels=8, embedding_size=16, drop_rate=0.1, dropblock_size=2, standardize=True
    )
    assert (settings.optimizer, settings.schedule, settings.warmup_epochs) == ("sgd", "warmup-cosine", 2)


def test_options_are_read_as_people_write_them():
    written = "sweep --preset neg-cosine-cub --margin -0.3 -1e-3 0 --held_out=0.1 --image-size None"
    command = parse(written.split())
    assert command.margin == (-0.3, -0.001, 0.0)
    assert (command.config.dataset, command.config.held_out, command.config.image_size) == ("cub", 0.1, None)
    assert all(parse(["train", "--loss", name]).settings().loss.scale == 64 for name in ("cosface", "arcface"))
