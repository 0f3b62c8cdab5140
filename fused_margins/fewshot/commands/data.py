"""The commands around a training: data sets and features of images before it, comparisons after it, and the doctor."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveFloat

from ..config import Side
from ..reports import Table
from ..terminal import UserError, console, progress, say
from . import POSITIONAL, Command

if TYPE_CHECKING:
    from ..datasets.download import Download

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


class Presets(Command):
    """List the settings of the papers on data sets that --preset starts from."""

    def main(self) -> int:
        from ..presets import PRESETS

        rows = []
        for name, config in PRESETS.items():
            loss = config.loss.model_dump(exclude={"name"})
            settings = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in list(loss.items())[:3])
            trained = f"{config.backbone.title}, {config.epochs} epochs of {config.labels} labels"
            rows.append([name, f"{config.loss.name} ({settings}) on {config.dataset}: {trained}"])
        console.print(Table("Presets", ["name", "what it is"], rows, numeric=False).rich())
        return 0


class Data(Command):
    """Download Omniglot, or say where another data set comes from; then decode it once and count what is there."""

    dataset: Annotated[str | None, POSITIONAL] = None
    """Name of a data set, folder:PATH, or features:FILE; without it, all of them are listed."""

    def main(self) -> int:
        console.print((_known() if self.dataset is None else _inventory(self.dataset)).rich())
        return 0


def _known() -> Table:
    """Name and description of each data set."""
    from ..datasets import LOADERS, OF_PATHS

    rows = [
        [f"{name}:PATH" if name in OF_PATHS else name, (loader.__doc__ or "").partition("\n")[0]]
        for name, loader in sorted(LOADERS.items())
    ]
    return Table("Data sets", ["name", "what it is"], rows, numeric=False)


def _fetch_all(downloads: "list[Download]", root: Path) -> None:
    """One after the other; an error names those behind it as well, so that who has no internet hears of all at once."""
    from ..datasets.download import fetch

    for number, download in enumerate(downloads):
        try:
            fetch(download, root)
        except UserError as error:
            behind = "".join(f"; likewise {d.url} at {root / d.place}" for d in downloads[number + 1 :])
            raise UserError(f"{error}{behind}") from None


def _inventory(name: str) -> Table:
    """What is there of a data set, Omniglot downloaded first."""
    from ..datasets import LOADERS, data_root, load, make_task, omniglot

    if name in LOADERS and name.startswith("omniglot"):
        _fetch_all(omniglot.missing(data_root()), data_root())
    splits, rows = load(name), []
    make_task(splits)  # or its classes cannot be trained and tested on, which it says
    for split, images in splits.items():
        found = (len(images.class_names), len(images))
        published = PUBLISHED.get(name, {}).get(split, found)
        complete = ""
        if name in PUBLISHED:
            complete = "yes" if found == published else "no: {} classes, {} images".format(*published)
        size = " x ".join(map(str, images.shape))
        rows.append([split, str(found[0]), str(len(images.coarse_names)), str(found[1]), size, complete])
    place = name if ":" in name else f"{name} in {data_root()}"
    return Table(place, ["split", "classes", "coarse", "images", "size", "as published"], rows)


class Embed(Command):
    """Make features of images by a pretrained network, once: every study then trains on them in seconds (--features).

    Called again after an interrupt it goes on where it stopped; a file of the same images, network and settings stays.
    """

    images: Annotated[Path, POSITIONAL]
    """Folder or zip archive with <class>/<image>, or {train,val,test}/<class>/<image>."""
    output: Path = Path("features.safetensors")
    """File to write."""
    model: str = "efficientnet-lite0"
    """Network: efficientnet-lite0, timm:NAME, torchvision:NAME, or package.module:attribute, any torch.nn.Module."""
    image_size: Side = 160
    """Width and height in pixels to which the whole image is resized."""
    mean: tuple[float, float, float] | None = None
    """Mean of red, green and blue, 0 to 1, that the network wants (if not given, its own, or that of ImageNet)."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    """Their deviation."""
    without: tuple[str, ...] = ()
    """Classes to leave out."""
    group: str | None = None
    """Regular expression: images of a class in whose names it finds the same text are of one thing, as frames are."""
    split: Literal["class", "image"] = "class"
    """Where the images have no splits: classes apart (class), or a third of each one's images or groups (image)."""
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 32
    """Images at a time."""

    def main(self) -> int:
        from ..embedding import embed, find_images, load_extractor

        extractor = load_extractor(self.model, self.mean, self.std)
        sources = find_images(self.images, self.without, self.group)
        try:
            with progress(f"embedding {self.images}", len(sources.files), "images") as advance:
                features = embed(
                    sources,
                    extractor,
                    self.output,
                    image_size=self.image_size,
                    batch_size=self.batch_size,
                    by_image=self.split == "image",
                    advance=advance,
                )
        except KeyboardInterrupt:
            say(f"stopped; the same command goes on with {self.output}")
            raise
        count, width = features.features.shape
        say(f"features: {self.output}, {count} x {width} of {len(features.class_names)} classes")
        return 0


class Compare(Command):
    """Tabulate finished runs: settings that differ, figures, and paired differences to the first group of runs.

    Runs that differ only in their seed are one group, shown as mean and 95% interval.
    """

    runs: Annotated[tuple[Path, ...], POSITIONAL]
    """Folders of runs, or with runs below them; the first run's group is what the others are compared with."""
    output: Path | None = None
    """File to write as well: .html, .md or .json."""

    def main(self) -> int:
        from ..report import SUFFIXES, Comparison, read_runs

        if self.output is not None and self.output.suffix not in SUFFIXES:
            raise UserError(f"output: expected a file name ending in {', '.join(SUFFIXES)}, got {self.output}")
        runs, left_out = read_runs(self.runs)
        for what in left_out:
            say(f"left out: {what}")
        comparison = Comparison(runs)
        for table in comparison.tables():
            console.print(table.rich())
        if self.output is not None:
            comparison.write(self.output)
            say(f"written: {self.output}")
        return 0


class Doctor(Command):
    """Show versions and backends, and check every backend against the reference (ten seconds)."""

    device: str = "cpu"
    """Device to check: cpu or cuda."""

    def main(self) -> int:
        from ... import doctor

        return doctor.main(["--device", self.device])
