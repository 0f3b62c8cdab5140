"""CIFAR-FS (Bertinetto et al., Meta-learning with differentiable closed-form solvers, 2019), made of CIFAR-100."""

from pathlib import Path

from ..errors import UserError
from .folders import SPLITS, Files, class_folders, classes_in, image_sets
from .images import ImageSet
from .lists import Once, lines
from .sources import Tree, find, left_out, require

# Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009: five classes each.
SUPERCLASSES = {
    "aquatic_mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food_containers": "bottle bowl can cup plate",
    "fruit_and_vegetables": "apple mushroom orange pear sweet_pepper",
    "household_electrical_devices": "clock keyboard lamp telephone television",
    "household_furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large_carnivores": "bear leopard lion tiger wolf",
    "large_man-made_outdoor_things": "bridge castle house road skyscraper",
    "large_natural_outdoor_scenes": "cloud forest mountain plain sea",
    "large_omnivores_and_herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium_mammals": "fox porcupine possum raccoon skunk",
    "non-insect_invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small_mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles_1": "bicycle bus motorcycle pickup_truck train",
    "vehicles_2": "lawn_mower rocket streetcar tank tractor",
}
COARSE = {fine: coarse for coarse, members in SUPERCLASSES.items() for fine in members.split()}
_GUIDE = "CIFAR-FS is linked from https://github.com/bertinetto/r2d2: put cifar-fs.zip or the unpacked folder there."


def load(root: Path, image_size: int = 32) -> dict[str, ImageSet]:
    """CIFAR-FS: 64, 16 and 20 classes, each with 600 images; coarse classes are the superclasses of CIFAR-100.

    Read from `cifar-fs/{train,val,test}/<class>/`, or as its authors published it, from `cifar100/data/<class>/` with
    the splits in `cifar100/splits/bertinetto/{train,val,test}.txt`.
    """
    places = ["cifar-fs", "cifar_fs", "CIFAR-FS"]
    tree = find(root, places, holding="train/")
    original = find(root, ["cifar100"], holding="splits/bertinetto/train.txt") if tree is None else None
    if original is None:
        tree = require(root, places, _GUIDE, holding="train/")
        splits = class_folders(tree)
        missing = sorted(COARSE.keys() - {name for classes in splits.values() for name in classes})
        if missing:
            raise UserError(f"{tree.where('')}: {missing[0]} is in no split ({len(missing)} of 100 classes missing)")
    else:
        tree, splits = original, _listed(original)
    for split, classes in splits.items():
        unknown = sorted(classes.keys() - COARSE.keys())
        if unknown:
            raise UserError(f"{tree.where('')}: {split}: {unknown[0]} is not a class of CIFAR-100")
    return image_sets("cifar-fs", splits, image_size, COARSE)


def _listed(tree: Tree) -> dict[str, Files]:
    """The classes that a list of names chooses for each split."""
    folders = classes_in(tree, "data/")
    splits: dict[str, Files] = {}
    classes = Once("class")
    for split in SPLITS:
        file = f"splits/bertinetto/{split}.txt"
        names = []
        for line in lines(tree, file):
            if line.text not in folders:
                raise line.error(f"there is no folder data/{line.text}")
            if classes.add(line, line.text, f"in {split}"):
                names.append(line.text)
        if not names:
            raise UserError(f"{tree.where(file)}: no classes in this list")
        splits[split] = {name: folders[name] for name in sorted(names)}
    left_out(tree.where("splits/bertinetto"), "listed twice", classes.repeated)
    return splits
