"""German traffic signs as features: a class has tracks, each one sign seen from a passing car, and it has a parent.

Source: Stallkamp et al., Man vs. computer: benchmarking machine learning algorithms for traffic sign recognition, 2012;
the classes by their official numbers.
"""

from dataclasses import replace
from pathlib import Path

import torch

from ..errors import UserError
from .features import Features, read_features, splits_of
from .images import ImageSet
from .registry import register

# Priority road, yield and stop (12, 13, 14) are alone in what they are.
PARENTS = {
    "speed limit": (*range(6), 7, 8),
    "other prohibition": (9, 10, 15, 16, 17),
    "danger": (11, *range(18, 32)),
    "mandatory": tuple(range(33, 41)),
    "end of restriction": (6, 32, 41, 42),
}


@register("gtsrb-tracks")
def load_tracks(path: Path) -> dict[str, ImageSet]:
    """Features of German traffic signs: the class is the coarse label, the track the fine one, of tracks held out."""
    features = _read(path)
    if features.group is None:
        raise UserError(f"{path}: expected a group for each track, there are no groups")
    tracks, number = features.group.unique(return_inverse=True)
    names = tuple(f"track {int(track)}" for track in tracks)
    # Every split names all tracks and has images of its own alone.
    of_tracks = replace(
        features,
        labels=number,
        class_names=names,
        coarse=features.labels,
        coarse_names=features.class_names,
        group=None,
    )
    images = of_tracks.images()
    assert features.split is not None
    return {s: images.subset((features.split == i).nonzero()[:, 0]) for s, i in (("train", 0), ("test", 2))}


@register("gtsrb-parents")
def load_parents(path: Path) -> dict[str, ImageSet]:
    """Features of German traffic signs in 40 of 43 classes, whose five kinds are the coarse labels."""
    features = _read(path)
    parent = torch.full((len(features.class_names),), -1)
    for number, classes in enumerate(PARENTS.values()):
        parent[list(classes)] = number
    chosen = (parent >= 0).nonzero()[:, 0].tolist()
    of_parents = replace(features, coarse=parent[features.labels].clamp(min=0), coarse_names=tuple(PARENTS))
    return {split: images.with_classes(chosen) for split, images in splits_of(of_parents).items()}


def _read(path: Path) -> Features:
    features = read_features(path)
    if [int(name) if name.isdecimal() else name for name in features.class_names] != list(range(43)):
        raise UserError(f"{path}: expected the 43 classes of GTSRB, 00000 to 00042, got {len(features.class_names)}")
    if features.split is None:
        raise UserError(f"{path}: expected a split by track (embed --group '^[0-9]+' --split image)")
    return features
