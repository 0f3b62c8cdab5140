"""Arguments of public functions and modules, drawn by their names: no function and no loss is named here."""

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_margins.core.enums import BeyondPi, MarginType, Reduction, Similarity
from fused_margins.core.indices import UNADMITTED
from fused_margins.core.margins import MARGIN_GRADIENTS
from fused_margins.mining import NEGATIVES
from fused_margins.mining.positives import POSITIVES

SIZES = (0, 1, 1, 2, 3, 4, 5, 7, 9, 17)
DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
WORDS: dict[str, tuple[str, ...]] = {
    "similarity": Similarity.names(),
    "margin_type": MarginType.names(),
    "beyond_pi": BeyondPi.names(),
    "margin_gradient": MARGIN_GRADIENTS,
    "reduction": Reduction.names(),
    "positives": POSITIVES,
    "negatives": (*NEGATIVES, "all"),
    "strategy": ("hard", "easy", "semihard"),
    "backend": ("auto", "auto", "cpu", "reference"),
}
POSITIVE = (
    "scale",
    "beta",
    "temperature",
    "variance_floor",
    "angular_multiplier",
    "alpha",
    "concentration",
    "softmax_scale",
    "lower_length",
    "la",
    "gamma",
)
FLAGS = ("normalize", "learnable_scale", "learnable_margin", "plus", "drop_dissimilar")
COUNTS = (
    "clusters_per_class",
    "centers_per_class",
    "sub_centers",
    "num_iterations",
    "num_restarts",
    "num_clusters",
    "samples_per_cluster",
    "num_neighbours",
)


class Draws:
    """Values for the parameters of one case, which have the sizes and the dtype of the case."""

    def __init__(self, name: str) -> None:
        self.random = random.Random(name)
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(62))
        pick = self.random.choice
        self.rows, self.columns, self.width, self.classes = pick(SIZES), pick(SIZES), pick(SIZES), max(pick(SIZES), 1)
        self.dtype = pick(DTYPES)
        self.sound = self.random.random() < 0.6  # numbers as people have them, and no mutation

    def often(self, share: float) -> bool:
        return self.random.random() < share

    def value(self, name: str) -> Any:
        """Of a parameter of that name; in most cases one that it takes."""
        pick = self.random.choice
        if name in ("embeddings", "weight", "centroids", "reference_embeddings"):
            rows = {"embeddings": self.rows, "weight": self.classes}.get(name, self.columns)
            return self.matrix(rows)
        if name in WORDS:
            return pick(WORDS[name])
        if name in FLAGS:
            return pick((True, False))
        if name in COUNTS:
            return pick((1, 2, 3, 5))
        simple: dict[str, Callable[[], Any]] = {
            "labels": lambda: self.labels(self.rows),
            "reference_labels": lambda: self.labels(self.columns),
            "clusters": lambda: torch.arange(self.rows) % self.classes,
            "cluster_labels": lambda: self.labels(self.classes),
            "sample_ids": lambda: torch.randint(-1, 6, (self.rows,), generator=self.generator),
            "self_index": lambda: torch.randint(-1, max(self.columns, 1), (self.rows,), generator=self.generator),
            "positive_similarity": lambda: self.matrix(self.rows)[:, :1].sum(1),
            "losses": lambda: self.vector(self.rows),
            "class_weight": lambda: self.vector(self.classes).abs(),
            "logit_bias": lambda: self.vector(self.classes),
            "counts": lambda: torch.randint(1, 99, (self.classes,), generator=self.generator).to(self.dtype),
            "center_temperature": lambda: pick((0.0, 0.0, 0.3)),
            "max_margin": lambda: pick((0.5, -0.1)),
            "power": lambda: pick((0.25, 0.0, 1.0)),
            "tau": lambda: pick((1.0, -0.5)),
            "momentum": lambda: pick((0.0, 0.1, 1.0)),
            "lower_margin": lambda: pick((0.0, 0.2)),
            "upper_margin": lambda: pick((0.5, 0.8)),
            "upper_length": lambda: pick((40.0, 110.0)),
            "regularizer": lambda: pick((0.0, 35.0)),
            "std": lambda: pick((0.0, 0.1)),
            "duplicates_above": lambda: pick((0.9999, 0.5)),
            "base": lambda: pick((0.5, 0.0)),
            "margin": lambda: self.factor(pick((0.0, 0.35, -0.3, 1.0))),
            "angular_margin_rad": lambda: self.factor(pick((0.0, 0.5, -0.5))),
            "label_smoothing": lambda: pick((0.0, 0.1, 1.0)),
            "ignore_index": lambda: pick((-100, -1, 0, 300)),
            "num_classes": lambda: self.classes,
            "embedding_size": lambda: max(self.width, 1),
            "size": lambda: pick((1, 3, 20)),
            "generator": lambda: self.random.getrandbits(32),
        }
        if name in simple:
            return simple[name]()
        if name in POSITIVE:
            number = pick((1.0, 0.1, 3.0, 30.0))
            return self.factor(number) if name == "scale" else number
        raise LookupError(f"no draw for a parameter {name}")

    def matrix(self, rows: int) -> Tensor:
        """(rows, D) of any strides, with equal rows and values that are none."""
        shape, pick = (rows, self.width), self.random.choice
        t = torch.randn(shape, generator=self.generator, dtype=torch.float64) * pick((1, 1, 1, 0.01, 100))
        if self.often(0.2):
            t = torch.randint(-2, 3, shape, generator=self.generator).double()
        info = torch.finfo(self.dtype)
        if rows and self.often(0.2):
            t[: rows // 2 + 1] = t[-1].clone()
        if rows and self.often(0.15):
            t[self.random.randrange(rows)] = pick((0.0, info.tiny, info.tiny / 8, info.max, info.max**0.5, 1e4))
        if rows and self.width and self.often(0.2):
            row, column = self.random.randrange(rows), pick((slice(None), self.random.randrange(self.width)))
            t[row, column] = pick((torch.nan, torch.inf, -torch.inf))
        t = t.to(self.dtype)
        layouts: tuple[Callable[[], Tensor], ...] = (
            lambda: t,
            lambda: t,
            lambda: t.T.contiguous().T,
            lambda: torch.stack([t, t], 2)[:, :, 0],
            lambda: torch.cat([t, t], 0)[:rows],
            lambda: t[:1].expand(rows, -1) if rows else t,
        )
        return pick(layouts)()

    def vector(self, size: int) -> Tensor:
        t = torch.randn(size, generator=self.generator)
        return t.double() if self.dtype == torch.float64 else t

    def labels(self, size: int) -> Tensor:
        dtype = self.random.choice((torch.int64, torch.int64, torch.int32, torch.int8, torch.uint8))
        t = torch.randint(self.classes, (size,), generator=self.generator)
        if size and self.often(0.25):
            t[self.random.randrange(size)] = self.random.choice((-100, -1, UNADMITTED, self.classes, 2**40))
        info = torch.iinfo(dtype)
        return t.to(dtype) if not size or info.min <= int(t.min()) <= int(t.max()) <= info.max else t

    def factor(self, number: float) -> float | Tensor:
        """One of all, a class or a row."""
        number *= self.random.choice((1, 1, 1, 1, -1))
        t = torch.tensor(number, dtype=torch.float64 if self.dtype == torch.float64 else torch.float32)
        shapes = (t, t.expand(self.classes), t.expand(self.rows, 1).clone())
        return number if self.often(0.7) else self.random.choice(shapes)
