"""The subcommand `data`: get a data set, or hear where it comes from, and check what is there."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from ..datasets import LOADERS, data_root, load, make_task, omniglot
from ..datasets.download import Download, fetch
from ..datasets.registry import OF_PATHS
from ..errors import UserError
from ..tables import Table
from ..terminal import console

# Classes and images of each split, as published.
PUBLISHED = {
    "omniglot": {"train": (4112, 82240), "val": (688, 13760), "test": (1692, 33840)},
    "omniglot-background": {"train": (3856, 77120), "test": (659, 13180)},
    "omniglot-alphabets": {"train": (964, 13496), "test": (964, 5784)},
    "cifar-fs": {"train": (64, 38400), "val": (16, 9600), "test": (20, 12000)},
    "mini-imagenet": {"train": (64, 38400), "val": (16, 9600), "test": (20, 12000)},
    "cub": {"train": (100, 5885), "val": (50, 2950), "test": (50, 2953)},
    "cub-retrieval": {"train": (100, 5864), "test": (100, 5924)},
}


@dataclass(frozen=True)
class Data:
    """Download Omniglot, or say where another data set comes from; then decode it once and count what is there."""

    name: tyro.conf.Positional[str | None] = None
    """Name of a data set, folder:PATH, or features:FILE; without it, all of them are listed."""

    def main(self) -> int:
        table = _known() if self.name is None else _inventory(self.name)
        console.print(table.rich())
        return 0


def _known() -> Table:
    """Name and description of each data set."""
    rows = [
        [f"{name}:PATH" if name in OF_PATHS else name, (loader.__doc__ or "").partition("\n")[0]]
        for name, loader in sorted(LOADERS.items())
    ]
    return Table("Data sets", ["name", "what it is"], rows, numeric=False)


def _fetch_all(downloads: Sequence[Download], root: Path) -> None:
    """One after the other; an error names those behind it as well, so that who has no internet hears of all at once."""
    for number, download in enumerate(downloads):
        try:
            fetch(download, root)
        except UserError as error:
            behind = "".join(f"; likewise {d.url} at {root / d.place}" for d in downloads[number + 1 :])
            raise UserError(f"{error}{behind}") from None


def _inventory(name: str) -> Table:
    """What is there of a data set, Omniglot downloaded first."""
    if name in LOADERS and name.startswith("omniglot"):
        _fetch_all(omniglot.missing(data_root()), data_root())
    splits, rows = load(name), []
    make_task(splits)  # or its classes cannot be trained and tested on, which it says
    for split, images in splits.items():
        found = (len(images.class_names), len(images))
        published = PUBLISHED.get(name, {}).get(split, found)
        complete = (
            ""
            if name not in PUBLISHED
            else "yes"
            if found == published
            else "no: {} classes, {} images".format(*published)
        )
        size = " x ".join(map(str, images.shape))
        rows.append([split, str(found[0]), str(len(images.coarse_names)), str(found[1]), size, complete])
    place = name if ":" in name else f"{name} in {data_root()}"
    return Table(place, ["split", "classes", "coarse", "images", "size", "as published"], rows)
