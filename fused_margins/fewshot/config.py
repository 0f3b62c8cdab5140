"""Every setting of a training run, typed: what is not listed here is rejected, and what is stored suffices to rerun."""

from typing import Annotated, Literal, get_args

import tyro
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import UserError

Positive = Annotated[float, Field(gt=0)]
AtLeast0 = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Negatives = Literal["semihard", "hard"]


class Settings(BaseModel):
    """Frozen, and closed to names that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class Softmax(Settings):
    """Normalised softmax: cosine logits without a margin."""

    name: Literal["softmax"] = "softmax"
    scale: Positive = 10.0


class MarginSoftmax(Settings):
    """Softmax with a margin of either sign on the true class."""

    name: Literal["margin-softmax"] = "margin-softmax"
    scale: Positive = 10.0
    margin: float = 0.0
    similarity: Literal["cosine", "dot"] = "cosine"


class Triplet(Settings):
    """Triplet loss with a positive drawn at random from the batch: what easy positives are compared with."""

    name: Literal["triplet"] = "triplet"
    margin: AtLeast0 = 0.2
    negatives: Negatives = "semihard"


class EasyPositiveTriplet(Settings):
    """Triplet loss with the nearest sample of the class as positive."""

    name: Literal["easy-positive-triplet"] = "easy-positive-triplet"
    margin: AtLeast0 = 0.2
    negatives: Negatives = "semihard"


class EasyPositiveMargin(Settings):
    """Margin loss with a learnable boundary `beta` and the nearest sample of the class as positive."""

    name: Literal["easy-positive-margin"] = "easy-positive-margin"
    margin: AtLeast0 = 0.2
    beta: Positive = 1.2


class EasyPositiveInfoNCE(Settings):
    """InfoNCE with the nearest sample of the class as positive."""

    name: Literal["easy-positive-infonce"] = "easy-positive-infonce"
    temperature: Positive = 0.1


class Magnet(Settings):
    """Magnet loss over clusters, after some epochs of softmax that give the first index its shape."""

    name: Literal["magnet"] = "magnet"
    alpha: float = 0.3
    variance_floor: Positive = 1e-4
    clusters_per_class: Count = 5
    num_clusters: Annotated[int, Field(ge=2)] = 6
    samples_per_cluster: Annotated[int, Field(ge=2)] = 8
    warm_epochs: Annotated[int, Field(ge=0)] = 5
    refresh_epochs: Count = 1
    scale: Positive = 10.0


LossSettings = (
    Softmax | MarginSoftmax | Triplet | EasyPositiveTriplet | EasyPositiveMargin | EasyPositiveInfoNCE | Magnet
)
Loss = Annotated[LossSettings, Field(discriminator="name")]
LossName = Literal[
    "softmax",
    "margin-softmax",
    "triplet",
    "easy-positive-triplet",
    "easy-positive-margin",
    "easy-positive-infonce",
    "magnet",
]
_LOSSES: dict[str, type[LossSettings]] = {
    settings.model_fields["name"].default: settings for settings in get_args(LossSettings)
}


class Backbone(Settings):
    """The convolutional network: blocks of conv, pool, batch norm, ReLU, then a linear head."""

    blocks: Count = 3
    """Blocks, each of which halves the image."""
    channels: Count = 32
    """Channels of every block."""
    embedding_size: Count = 32
    """Width of the embedding."""
    normalize: bool = True
    """Give embeddings unit length."""


class Augmentation(Settings):
    """Random maps and colours of training images; zeros and False switch each off."""

    rotation_deg: Annotated[float, Field(ge=0, le=180)] = 10.0
    """Largest rotation either way, in degrees."""
    shift: Annotated[float, Field(ge=0, lt=1)] = 0.07
    """Largest shift either way, as a fraction of width and height."""
    zoom: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Largest relative change of size either way."""
    flip: bool = False
    """Mirror half of the images, left to right."""
    crop_padding: Annotated[int, Field(ge=0)] = 0
    """Largest shift either way by whole pixels: a crop of the image padded with so much black (4 for 32 pixels)."""
    resized_crop: bool = False
    """Enlarge a random part, of 8% to 100% of the area and an aspect of 3/4 to 4/3, to the whole image."""
    color_jitter: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Largest relative change either way of brightness, contrast and saturation (0.4 is usual)."""


class TrainConfig(Settings):
    """One training run."""

    dataset: str = "digits"
    """Name of a registered data set."""
    labels: Literal["fine", "coarse"] = "fine"
    """Labels to train on; the evaluation always judges on the fine ones."""
    classes: tuple[int, ...] | None = None
    """Train on these fine classes only; the others become novel classes."""
    loss: tyro.conf.Suppress[Loss] = MarginSoftmax()
    backbone: Backbone = Backbone()
    augmentation: Augmentation = Augmentation()
    epochs: Count = 40
    """Passes over the training set."""
    batch_size: Annotated[int, Field(ge=2)] = 128
    """Largest number of images in a batch."""
    samples_per_class: Annotated[int, Field(ge=2)] | None = None
    """Make each batch of classes with this many samples each, instead of shuffling all images."""
    learning_rate: Positive = 3e-3
    """Peak of the one-cycle schedule."""
    weight_decay: AtLeast0 = 0.0
    """Weight decay of Adam."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of initial weights, batches, augmentation and mining."""
    backend: str = "auto"
    """Backend of the loss kernels: auto, reference, cpu, ..."""
    device: str = "cpu"
    """Where model and losses live: cpu, cuda, cuda:1, ..."""
    threads: Count | None = None
    """Threads of torch; by default as many as torch takes. The last bits of a convolution depend on them."""


def make_loss(name: str, **options: object) -> LossSettings:
    """Settings of the loss `name`, with `options` over its defaults; a `UserError` names what does not fit.

    >>> make_loss("margin-softmax", margin=-0.3).margin
    -0.3
    """
    settings = _LOSSES.get(name)
    if settings is None:
        raise UserError(f"loss: expected one of {', '.join(_LOSSES)}, got {name!r}")
    known = [option for option in settings.model_fields if option != "name"]
    for option in options:
        if option not in known:
            raise UserError(f"loss: {name} has no option {option!r}, it takes {', '.join(known)}")
    try:
        return settings.model_validate(options)
    except ValidationError as error:
        raise UserError(f"loss: {name}: {explain_validation(error)}") from None


def explain_validation(error: ValidationError) -> str:
    """The first problem in one line: where it is, what was expected, and what came."""
    problem = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in problem["loc"] if part not in _LOSSES)
    return f"{where or 'settings'}: {problem['msg']}, got {problem['input']!r}"
