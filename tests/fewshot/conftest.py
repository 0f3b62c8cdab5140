"""A data set and a configuration small enough to train in well under a second."""

import hashlib
import importlib
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from fused_margins.fewshot import datasets, report
from fused_margins.fewshot.cli import main
from fused_margins.fewshot.config import Augmentation, Backbone, TrainConfig
from fused_margins.fewshot.datasets import ImageSet, load
from fused_margins.fewshot.objectives import SOFTMAX, available

needs_cpu_backend = pytest.mark.skipif("cpu" not in available("cpu", [SOFTMAX]), reason="the cpu backend is not built")


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    # Tiny networks gain nothing from threads, and the bitwise tests must not depend on how many there are.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def _dynamo() -> None:
    """The first optimizer imports it, for seconds, and half a million objects: here nobody takes them for garbage."""
    importlib.import_module("torch._dynamo")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Of decoded images, and of what was said of files once."""
    datasets.sources.say_once.cache_clear()
    monkeypatch.setenv("FUSED_MARGINS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def pictures() -> None:
    """For tests that look at the pictures of a report, which take far longer than the training they show."""


@pytest.fixture(autouse=True)
def _no_pictures(request, monkeypatch):
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(report, "_draw", lambda run, trainer, task: [])


@pytest.fixture
def blank_pictures(monkeypatch) -> None:
    """For tests of studies whose pictures nobody looks at: each is there, of one pixel."""
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **options: Image.new("L", (1, 1)).save(file, "png"))


@pytest.fixture(scope="session")
def _few() -> dict[str, ImageSet]:
    return {split: images.subset(torch.arange(0, len(images), 5)) for split, images in load("digits").items()}


@pytest.fixture
def few_digits(monkeypatch, _few) -> None:
    """Every fifth image of the digits: enough where it is not the numbers that count."""
    with_digits(monkeypatch, _few)


def with_digits(patch: pytest.MonkeyPatch, splits: dict[str, ImageSet]) -> None:
    patch.setitem(datasets.LOADERS, "digits", lambda *args: splits)


SMALL = ["--blocks", "2", "--channels", "4", "--embedding-size", "8", "--epochs", "2"]


def train(folder, *options):
    """The exit code of a small training."""
    return main(["train", "--output", str(folder), *SMALL, "--episodes", "5", *options])


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory) -> Path:
    """The folder of a run of the command, which no test may change."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    options = [*SMALL, "--loss", "margin-softmax", "--margin", "-0.3", "--neighbours", "1", "--episodes", "5"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "_draw", lambda run, trainer, task: [])
        assert main(["train", "--output", str(folder), *options]) == 0
    return folder


@pytest.fixture
def trained(trained_once, tmp_path) -> Path:
    """A copy of that run: margin softmax of margin -0.3, two epochs, judged by the nearest neighbour."""
    return Path(shutil.copytree(trained_once, tmp_path / "run"))


@pytest.fixture
def images() -> ImageSet:
    """60 images of 8 x 8 in six classes (three coarse ones): a bright patch whose place is the class, and noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(6).repeat(10)
    pixels = torch.randint(0, 60, (60, 1, 8, 8), generator=generator, dtype=torch.uint8)
    for i, label in enumerate(labels.tolist()):
        pixels[i, 0, label : label + 3, label : label + 3] += 150
    return ImageSet(pixels, labels, labels % 3, tuple("abcdef"), ("x", "y", "z"))


@pytest.fixture
def config() -> TrainConfig:
    return TrainConfig(
        backbone=Backbone(blocks=2, channels=4, embedding_size=8),
        augmentation=Augmentation(rotation_deg=5, shift=0.05, zoom=0.05),
        epochs=3,
        batch_size=16,
        seed=3,
    )


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, str]]:
    """Name and digest of every file in a folder, hidden ones included."""
    return lambda folder: {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.fixture(autouse=True)
def interrupts_interrupt() -> Iterator[None]:
    """Ctrl-C means what it means in a terminal, also where the tests run in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """The data root, which a test fills."""
    monkeypatch.setenv("FUSED_MARGINS_DATA", str(tmp_path / "data"))
    return tmp_path / "data"
