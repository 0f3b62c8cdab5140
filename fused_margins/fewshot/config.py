"""Every setting of a training run, typed: what is not listed here is rejected, and what is stored suffices to rerun."""

import math
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from .terminal import UserError

if TYPE_CHECKING:
    from typing_extensions import Self


def _in_float32(value: float) -> float:
    if value and not 1e-38 <= abs(value) <= 1e38:
        raise ValueError("Input should be 0 or from 1e-38 to 1e38, as kernels compute in float32")
    return value


Number = Annotated[float, AfterValidator(_in_float32)]
Positive = Annotated[Number, Field(gt=0)]
AtLeast0 = Annotated[Number, Field(ge=0)]
# Counts end where nothing more could be meant.
Count = Annotated[int, Field(ge=1, le=100_000)]
Side = Annotated[int, Field(ge=1, le=1024)]
Epochs = Annotated[int, Field(ge=1, le=1_000_000)]
AtLeast0Epochs = Annotated[int, Field(ge=0, le=1_000_000)]
Memory = Annotated[int, Field(ge=0, le=10_000_000)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
TOLERANCE = 1e-3  # of the parity of backends: relative to the largest entry of a gradient

Positives = Literal["easy", "random", "hard", "all"]
Negatives = Literal["semihard", "hard", "random", "distance-weighted"]


class Settings(BaseModel):
    """Frozen, and closed to names that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    def but(self, **changes: Any) -> "Self":
        """The same with changes, which are not checked.

        >>> Softmax().but(scale=30.0)
        Softmax(name='softmax', scale=30.0)
        """
        return self.model_copy(update=changes)


class Softmax(Settings):
    """Normalised softmax: cosine logits without a margin."""

    name: Literal["softmax"] = "softmax"
    scale: Positive = 10.0
    """Scale of cosine logits."""


class MarginSoftmax(Settings):
    """Softmax with a margin of either sign on the true class."""

    name: Literal["margin-softmax"] = "margin-softmax"
    scale: Positive = 10.0
    margin: Number = 0.0
    """Margin; those of softmaxes are of either sign, that of arcface in radians."""
    similarity: Literal["cosine", "dot"] = "cosine"
    """What the logits are made of."""


class CosFace(Settings):
    """CosFace (Wang et al. 2018): margin-softmax with the authors' scale and margin."""

    name: Literal["cosface"] = "cosface"
    scale: Positive = 64.0
    margin: Number = 0.35


class ArcFace(Settings):
    """ArcFace (Deng et al. 2019): softmax with a margin in radians on the angle with the true class."""

    name: Literal["arcface"] = "arcface"
    scale: Positive = 64.0
    margin: Annotated[Number, Field(ge=-math.pi, le=math.pi)] = 0.5


class Triplet(Settings):
    """Triplet loss; `positives` and `negatives` say which of an anchor's samples make its triplets."""

    name: Literal["triplet"] = "triplet"
    positives: Positives = "easy"
    """Positives: the nearest of the class (easy), the farthest, one at random, or all."""
    negatives: Negatives = "semihard"
    """Negatives; infonce alone takes all."""
    margin: AtLeast0 = 0.2
    memory: Memory = 0
    """Former embeddings to search as well (cross-batch memory)."""


class MarginLoss(Settings):
    """Margin loss with a learnable boundary `beta` between positive and negative distances."""

    name: Literal["margin"] = "margin"
    positives: Positives = "easy"
    negatives: Negatives = "distance-weighted"
    margin: AtLeast0 = 0.2
    beta: Positive = 1.2
    """First boundary."""
    memory: Memory = 0


class InfoNCE(Settings):
    """InfoNCE: the positive against all samples of other classes, or against one of them."""

    name: Literal["infonce"] = "infonce"
    positives: Positives = "easy"
    negatives: Literal[Negatives, "all"] = "all"
    temperature: Positive = 0.1
    """Temperature of the logits."""
    memory: Memory = 0


class Magnet(Settings):
    """Magnet loss over clusters, after some epochs of softmax that give the first index its shape."""

    name: Literal["magnet"] = "magnet"
    alpha: Number = 0.3
    """Gap that is asked for, in units of twice the variance."""
    variance_floor: Positive = 1e-4
    """Smallest variance to divide by."""
    clusters_per_class: Count = 5
    """Clusters of each class."""
    num_clusters: Annotated[Count, Field(ge=2)] = 6
    """Clusters in a batch."""
    samples_per_cluster: Annotated[Count, Field(ge=2)] = 8
    """Samples of each cluster in a batch."""
    warm_epochs: AtLeast0Epochs = 5
    """Epochs of softmax at first."""
    refresh_epochs: Epochs = 1
    """Epochs between two clusterings."""
    scale: Positive = 10.0


LossSettings = Softmax | MarginSoftmax | CosFace | ArcFace | Triplet | MarginLoss | InfoNCE | Magnet
Loss = Annotated[LossSettings, Field(discriminator="name")]
LOSSES: dict[str, type[LossSettings]] = {
    settings.model_fields["name"].default: settings for settings in get_args(LossSettings)
}


class Backbone(Settings):
    """The network. A setting that is not given is the network's own; one that it does not have is an error."""

    name: Literal["convnet", "conv4", "resnet12", "resnet18", "linear", "mlp"] = "convnet"
    """Network: a small one for quick runs, one of the papers', or for features a linear map, alone or after a hidden
    layer (mlp). On features linear takes the place of convnet."""
    blocks: Annotated[int, Field(ge=1, le=30)] | None = None
    """Blocks of convnet, each of which halves the image (3 if not given)."""
    channels: Count | None = None
    """Channels of the first stage (32 for convnet, 64 for the papers' if not given), or width of mlp's layer (512)."""
    embedding_size: Count | None = None
    """Width of a linear head (if not given, 32 for convnet, 128 for linear and mlp; none for the papers' networks:
    their features are the embedding)."""
    normalize: bool = True
    """Give embeddings unit length."""
    standardize: bool = False
    """Give the pixels of each channel, or each feature, mean 0 and deviation 1 over the training set."""
    drop_rate: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Features that a ResNet drops in training: as dropout in its first two stages, as DropBlock in its last two."""
    dropblock_size: Side = 5
    """Side of the squares that DropBlock drops."""
    dropblock_steps: Annotated[int, Field(ge=1, le=10**12)] = 40_000
    """Steps in which DropBlock's rate rises from 0 to drop_rate."""

    @property
    def title(self) -> str:
        """For a heading.

        >>> Backbone(name="conv4", channels=32).title
        'conv4 of 32 channels'
        """
        return self.name + (f" of {self.channels} channels" if self.channels else "")

    @field_validator("blocks")
    @classmethod
    def _only_of_convnet(cls, blocks: int | None, info: ValidationInfo) -> int | None:
        name = info.data.get("name", "convnet")
        if blocks is not None and name != "convnet":
            raise ValueError(f"only convnet takes a number of blocks, not {name}")
        return blocks

    @field_validator("drop_rate", "dropblock_size", "dropblock_steps")
    @classmethod
    def _only_of_resnets(cls, value: float, info: ValidationInfo) -> float:
        name = info.data.get("name", "convnet")
        if value != cls.model_fields[info.field_name or ""].default and not name.startswith("resnet"):
            raise ValueError(f"only resnet12 and resnet18 drop features, not {name}")
        return value


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
    crop_padding: Annotated[int, Field(ge=0, le=1024)] = 0
    """Largest shift either way by whole pixels: a crop of the image padded with so much black (4 for 32 pixels)."""
    resized_crop: bool = False
    """Enlarge a random part, of 8% to 100% of the area and an aspect of 3/4 to 4/3, to the whole image."""
    color_jitter: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Largest relative change either way of brightness, contrast and saturation (0.4 is usual)."""


class TrainConfig(Settings):
    """One training run."""

    dataset: str = "digits"
    """Name of a data set (`fused-margins data` lists them), folder:PATH, or features:FILE, short --features FILE."""
    image_size: Side | None = None
    """Width and height of the images in pixels; by default what is usual for the data set."""
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of each training class to keep for judging, where the data set has no such images of its own."""
    labels: Literal["fine", "coarse"] = "fine"
    """Labels to train on; the evaluation always judges on the fine ones."""
    classes: tuple[int, ...] | None = None
    """Train on these fine classes only; the others become novel classes."""
    loss: Loss = MarginSoftmax()
    backbone: Backbone = Backbone()
    augmentation: Augmentation = Augmentation()
    epochs: Epochs = 40
    """Passes over the training set."""
    batch_size: Annotated[Count, Field(ge=2)] = 128
    """Largest number of images in a batch; with samples_per_class few classes make smaller ones."""
    samples_per_class: Annotated[Count, Field(ge=2)] | None = None
    """Make each batch of classes with this many samples each, instead of shuffling all images."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """Adam, or SGD with Nesterov's momentum of 0.9."""
    learning_rate: Positive = 3e-3
    """Peak of the schedule."""
    schedule: Literal["one-cycle", "warmup-cosine", "warmup-steps"] = "one-cycle"
    """Learning rate, step by step: one cycle; or a linear rise from a sixteenth of the peak, and then a cosine to 1e-6,
    or the peak, divided by ten after half and after three quarters of the epochs."""
    warmup_epochs: AtLeast0Epochs | None = None
    """Epochs in which warmup-cosine and warmup-steps rise (a quarter of all if not given)."""
    weight_decay: AtLeast0 = 0.0
    """L2 penalty that is added to the gradients."""
    seed: Seed = 0
    """Seed of initial weights, batches, augmentation and mining."""
    backend: str = "auto"
    """Backend of the loss kernels: auto, reference, cpu, ..."""
    device: str = "cpu"
    """Where model and losses live: cpu, cuda, cuda:1, ..."""
    perturbation: AtLeast0 = 0.0
    """Relative change of the network's first weights: at 1e-7 it shows what rounding alone does to a run."""
    validation_episodes: Annotated[int, Field(ge=0, le=100_000)] = 0
    """Episodes after every epoch, always the same ones, that tell whether a training converged: of validation classes,
    or else of held-out images; 0 for none."""
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Threads of torch; by default as many as torch takes. The last bits of a convolution depend on them."""

    @property
    def data(self) -> str:
        """The data set, for a heading: of a path its last part.

        >>> TrainConfig(dataset="features:/data/birds.safetensors").data, TrainConfig(dataset="cub").data
        ('birds', 'cub')
        """
        kind, _, path = self.dataset.partition(":")
        if not path:
            return kind
        return Path(path).stem if kind == "features" else f"{kind}:{Path(path).stem}"


class Judging(Settings):
    """How a trained network is judged."""

    episodes: Count = 600
    """Few-shot episodes for each number of ways and shots."""
    ways: Annotated[tuple[Annotated[Count, Field(ge=2)], ...], Field(min_length=1)] | None = None
    """Novel classes of an episode (if not given, 5, or all where there are fewer)."""
    shots: Annotated[tuple[Count, ...], Field(min_length=1)] = (1, 5)
    """Labelled images of each class of an episode."""
    queries: Count = 16
    """Images of each class to be recognised; fewer where the classes are too small for as many."""
    neighbours: Annotated[tuple[Count, ...], Field(min_length=1)] = (10,)
    """Nearest clusters that the k-nearest-cluster classifier asks, one figure for each number."""
    knc_clusters: Count = 5
    """Clusters of each class that this classifier has."""
    all_ways: bool = False
    """Also 1-shot episodes of all novel classes at once, by the nearest centroid."""
    official_runs: bool = False
    """Also the official one-shot runs of Omniglot."""
    judging_seed: Seed = 0
    """Seed of episodes and clusterings; the same for every network, so that all see the same episodes."""


def make_loss(name: str, **options: object) -> LossSettings:
    """Settings of the loss `name`, with `options` over its defaults; a `UserError` names what does not fit.

    >>> make_loss("margin-softmax", margin=-0.3).margin
    -0.3
    """
    settings = LOSSES.get(name)
    if settings is None:
        raise UserError(f"loss: expected one of {', '.join(LOSSES)}, got {name!r}")
    known = [option for option in settings.model_fields if option != "name"]
    for option in options:
        if option not in known:
            raise UserError(f"loss: {name} has no option {option!r}, it takes {', '.join(known)}")
    try:
        return settings.model_validate(options)
    except ValidationError as error:
        raise UserError(f"loss: {name}: {explain_validation(error)}") from None


def changed_loss(loss: LossSettings, name: str | None = None, **options: object) -> LossSettings:
    """The loss with `options` over its settings, or another loss with them over its defaults.

    >>> changed_loss(MarginSoftmax(scale=5.0), margin="0.1")
    MarginSoftmax(name='margin-softmax', scale=5.0, margin=0.1, similarity='cosine')
    """
    kept = loss.model_dump(exclude={"name"}) if name in (None, loss.name) else {}
    return make_loss(name or loss.name, **kept | options)


def explain_validation(error: ValidationError) -> str:
    """The first problem in one line: where it is, what was expected, and what came."""
    problem = error.errors(include_url=False)[0]
    place = [str(part) for part in problem["loc"]]
    if place[:1] == ["loss"]:
        del place[1:2]  # which of the losses it is
    where = ".".join(place)
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] in ("model_type", "model_attributes_type"):
        message = "Input should be an object"  # pydantic names the class
    return f"{where or 'settings'}: {message}, got {reprlib.repr(problem['input'])}"


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names.

    >>> flat_settings({"epochs": 2, "loss": {"name": "magnet", "alpha": 0.3}})
    {'epochs': 2, 'loss.name': 'magnet', 'loss.alpha': 0.3}
    """
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= flat_settings(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def contradictions(kept: TrainConfig, asked: TrainConfig) -> list[str]:
    """What two configurations do not agree in, a text each.

    >>> contradictions(TrainConfig(epochs=2), TrainConfig(epochs=9, loss=Triplet()))
    ["loss.name = 'margin-softmax', not 'triplet'", 'epochs = 2, not 9']
    """
    ours, theirs = (flat_settings(config.model_dump()) for config in (kept, asked))
    changed = [n for n in ours if n in theirs and ours[n] != theirs[n]]
    if "loss.name" in changed:  # what the two losses are set to does not compare
        changed = [n for n in changed if n == "loss.name" or not n.startswith("loss.")]
    return [f"{n} = {ours[n]!r}, not {theirs[n]!r}" for n in changed]
