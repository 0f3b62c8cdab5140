"""The subcommand that makes features of images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ..embedding import embed, find_images
from ..errors import UserError
from ..extractors import Channels, load_extractor
from ..terminal import progress, say


@dataclass(frozen=True)
class Embed:
    """Make features of images by a pretrained network, once: every study then trains on them in seconds (--features).

    Called again after an interrupt it goes on where it stopped.
    """

    images: tyro.conf.Positional[Path]
    """Folder or zip archive with <class>/<image>, or {train,val,test}/<class>/<image>."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("features.safetensors")
    """File to write."""
    model: str = "efficientnet-lite0"
    """Network: efficientnet-lite0, timm:NAME, torchvision:NAME, or package.module:attribute, any torch.nn.Module."""
    image_size: int = 160
    """Width and height in pixels to which the whole image is resized."""
    mean: Channels | None = None
    """Mean of red, green and blue, 0 to 1, that the network wants (if not given, its own, or that of ImageNet)."""
    std: Channels | None = None
    """Their deviation."""
    without: tuple[str, ...] = ()
    """Classes to leave out."""
    group: str | None = None
    """Regular expression: images of a class in whose names it finds the same text are of one thing, as frames are."""
    split: Annotated[str, tyro.conf.arg(metavar="{class,image}")] = "class"
    """Where the images have no splits: classes apart (class), or a third of each one's images or groups (image)."""
    batch_size: int = 32
    """Images at a time."""

    def main(self) -> int:
        for name, value, largest in (("image_size", self.image_size, 1024), ("batch_size", self.batch_size, 4096)):
            if not 1 <= value <= largest:
                raise UserError(f"{name}: expected 1 to {largest}, got {value}")
        if self.split not in ("class", "image"):
            raise UserError(f"split: expected class or image, got {self.split!r}")
        extractor = load_extractor(self.model, self.mean, self.std)
        sources = find_images(self.images, self.without, self.group)
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
        count, width = features.features.shape
        say(f"written: {self.output}, {count} x {width} features of {len(features.class_names)} classes")
        return 0
