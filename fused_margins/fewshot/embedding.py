"""From a folder of images to a file of features, once: resumable, whole or not there, and with the source's checksum.

While it runs, the rows that are done stand beside the file to be, in `.NAME.rows`, with a note of what they are of.
"""

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .datasets.decoding import PHOTO
from .datasets.features import SPLITS, Features, split_images, write_features
from .datasets.folders import files_by_split
from .datasets.sources import Read, Tree
from .errors import UserError, printable
from .extractors import Extractor
from .runs import read_json, write_json
from .terminal import say


@dataclass(frozen=True)
class Sources:
    """Image files with their labels, in order."""

    files: Sequence[tuple[Tree, str]]
    labels: Tensor  # (N,), int64
    class_names: tuple[str, ...]
    group: Tensor | None  # (N,), int64
    split: Tensor | None  # (N,), int64: index into SPLITS

    def checksum(self) -> str:
        """SHA-256 of all names and bytes."""
        digest = hashlib.sha256()
        with self.reader() as read:
            for tree, name in self.files:
                data = read(tree, name)
                digest.update(f"{name!r} {len(data)}\n".encode())
                digest.update(data)
        return digest.hexdigest()

    @contextmanager
    def reader(self) -> Iterator[Callable[[Tree, str], bytes]]:
        with ExitStack() as stack:
            open_trees: dict[Tree, Read] = {}

            def read(tree: Tree, name: str) -> bytes:
                if tree not in open_trees:
                    open_trees[tree] = stack.enter_context(tree.open())
                return open_trees[tree](name)

            yield read


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
    """Write the features of all images to `output`, from where an interrupted call had come to.

    Images that cannot be read are left out, each with its name and the reason.

    Args:
        sources: what to read.
        extractor: what makes features of it.
        output: the file to be, `.safetensors`.
        image_size: to which the whole image is resized, in pixels.
        batch_size: images at a time.
        by_image: where the source has no splits, hold out a third of each class instead of a fifth of the classes.
        advance: called after every image.
    """
    if output.suffix != ".safetensors":
        raise UserError(f"output: expected a name that ends in .safetensors, got {output}")
    if not sources.files:
        raise UserError("images: none of any class")
    note = {
        "model": extractor.name,
        "mean": list(extractor.mean),
        "std": list(extractor.std),
        "image_size": image_size,
        "batch_size": batch_size,  # the last bits depend on it
        "source_sha256": sources.checksum(),
    }
    rows_path, note_path = (output.with_name(f".{output.name}.{kind}") for kind in ("rows", "json"))
    rows = _rows(sources, extractor, note, rows_path, note_path, advance)
    usable = rows.isfinite().all(1)
    if not usable.any():
        raise UserError(f"images: none of the {len(usable)} could be read")
    labels, group, split = (None if t is None else t[usable] for t in (sources.labels, sources.group, sources.split))
    assert labels is not None
    if split is None and by_image:
        split = split_images(labels, group)
    features = Features(rows[usable], labels, sources.class_names, split=split, group=group)
    write_features(output, features, {name: json.dumps(value) for name, value in note.items()})
    rows_path.unlink()
    note_path.unlink()
    return features


def _rows(
    sources: Sources,
    extractor: Extractor,
    note: dict[str, object],
    rows_path: Path,
    note_path: Path,
    advance: Callable[[], None],
) -> Tensor:
    """Features (N, D), a row of NaN for an image that cannot be read."""
    image_size, batch_size = int(str(note["image_size"])), int(str(note["batch_size"]))
    stored = read_json(note_path) if rows_path.exists() else {}
    width = stored.pop("width", 0)
    if stored != note or not width:
        width = extractor(torch.zeros(1, 3, image_size, image_size)).shape[1]
        rows_path.parent.mkdir(parents=True, exist_ok=True)
        rows_path.write_bytes(b"")
        write_json(note_path, {**note, "width": width})
    count = len(sources.files)
    # Whole batches: the last bits of a row depend on those beside it.
    done = rows_path.stat().st_size // (4 * width * batch_size) * batch_size
    for _ in range(done):
        advance()
    with open(rows_path, "rb+") as file, sources.reader() as read:
        file.truncate(4 * width * done)
        file.seek(0, 2)
        for start in range(done, count, batch_size):
            pixels = [
                _decoded(read, tree, name, image_size) for tree, name in sources.files[start : start + batch_size]
            ]
            good = torch.tensor([p is not None for p in pixels])
            batch = torch.full((len(pixels), width), math.nan)
            if good.any():
                images = torch.from_numpy(np.stack([p for p in pixels if p is not None]))
                batch[good] = extractor(images.float() / 255)
            if not batch[good].isfinite().all():
                tree, name = sources.files[start + int((good & ~batch.isfinite().all(1)).nonzero()[0])]
                raise UserError(f"model: {extractor.name} makes features of {tree.where(name)} that are not finite")
            file.write(batch.numpy().tobytes())
            file.flush()
            for _ in pixels:
                advance()
    return torch.from_numpy(np.fromfile(rows_path, dtype=np.float32).reshape(count, width))


def _decoded(read: Callable[[Tree, str], bytes], tree: Tree, name: str, size: int) -> np.ndarray | None:
    with contextlib.suppress(UserError):
        data = read(tree, name)
        try:
            return PHOTO(data, size)
        except Exception as error:  # damage shows itself in many ways, all of which mean the same to the user
            reason = str(error) or type(error).__name__
            say(f"{tree.where(name)}: left out, not a readable image ({reason})")
    return None
