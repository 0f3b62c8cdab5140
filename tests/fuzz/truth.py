"""Whether a call is right against float64, or its error names an argument of the call.

The truth is the reference on the same inputs in float64, numbers in it handed over as tensors where a tensor may stand:
that goes another way through the library. A result is granted what the reference errs in the same dtype, and what a few
roundings of the inputs make of the truth. Two more rules know nothing of the implementation: a loss that depends on a
value is not finite where that value is not, and what a miner finds is of the class that it says.
"""

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fused_margins import losses, mining
from fused_margins.backends import registry
from fused_margins.clustering import kmeans_per_class
from fused_margins.core.enums import Relation, Similarity
from fused_margins.core.similarity import accumulation_dtype, admitted, pair_similarity
from fused_margins.ops.cases import largest, reach, similarity_of

from . import calls

if TYPE_CHECKING:
    from .calls import Call

DOCUMENTED = re.compile(  # the last two are torch's, of sizes that no memory has
    r"is not fitted|^backend '\w+' cannot run|were lost|can't allocate memory|Storage size calculation overflowed"
)


def judge(call: "Call", sound: bool) -> str | None:
    try:
        got = calls.execute(call)
    except Exception as error:
        return refused(call, sound, error)
    if any(t.is_meta for t in got):
        return None
    try:
        truth = calls.execute(in_float64(call))
    except Exception as error:
        return f"returned, where the truth raises {type(error).__name__}: {error}"
    if is_extreme(call) and not cosines(call):
        return hides(call, got) or finds_others(call, got)
    return differs(call, got, truth) or hides(call, got) or finds_others(call, got)


def in_float64(call: "Call") -> "Call":
    """By the reference, and a number as a tensor where that may be."""

    def change(name: str, value: Any) -> Any:
        if isinstance(value, calls.Call):
            return in_float64(value)
        if name == "backend" and value in ("auto", "cpu"):
            return "reference"
        if name in ("scale", "margin") and type(value) is float and not isinstance(call.target, type):
            t = torch.tensor(value, dtype=torch.float64)
            t.of_number = True  # type: ignore[attr-defined]  # nobody asks for its gradient
            return t
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return with_weights(with_backend(call)).map(change, torch.float64)


def with_weights(call: "Call") -> "Call":
    """Class weights of 1 where none are given: another way to the same loss."""
    maker = isinstance(call.target, type)
    kwargs = call.settings if maker else call.steps[0][1]
    num_classes = kwargs.get("num_classes", len(kwargs["weight"]) if isinstance(kwargs.get("weight"), Tensor) else 0)
    if "class_weight" not in calls.parameters(call.target) or kwargs.get("class_weight") is not None:
        return call
    if type(num_classes) is not int or not 0 < num_classes < 1000:
        return call
    ones = torch.ones(num_classes, dtype=torch.float64)
    ones.of_number = True  # type: ignore[attr-defined]
    kwargs = kwargs | {"class_weight": ones}
    return call._replace(settings=kwargs) if maker else call._replace(steps=[("__call__", kwargs)])


def with_backend(call: "Call", backend: str = "reference") -> "Call":
    """The backend said where it can be and is not."""

    def said(function: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        kwargs = {n: with_backend(v) if isinstance(v, calls.Call) else v for n, v in kwargs.items()}
        takes = "backend" in calls.parameters(function) and kwargs.get("backend", "auto") in ("auto", "cpu")
        return kwargs | {"backend": backend} if takes else kwargs

    if isinstance(call.target, type):
        return call._replace(settings=said(call.target, call.settings))
    return call._replace(steps=[(m, said(call.target, kwargs)) for m, kwargs in call.steps])


def rounded(call: "Call", seed: int, eps: float) -> "Call":
    """Every matrix as some roundings leave it."""
    g = torch.Generator().manual_seed(seed)

    def change(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() != 2 or value.is_nested:
            return value
        return value * (1 + 4 * eps * torch.randn(value.shape, generator=g, dtype=torch.float64))

    return call.map(change)


def refused(call: "Call", sound: bool, error: Exception) -> str | None:
    """What is wrong with an error."""
    if "got multiple values for keyword argument" in str(error):
        return None  # Python's own, and it names one
    names = {"loss", "the memory", "weight", "labels"}  # which a module holds, or calls an argument
    functions = [call.target, *(getattr(call.target, m) for m, _ in call.steps if isinstance(call.target, type))]
    functions += [v.target for v in call.settings.values() if isinstance(v, calls.Call)]
    for function in functions:
        names |= calls.parameters(function).keys()
    words = re.split(r", | and ", str(error).partition(":")[0])
    named = isinstance(error, TypeError | ValueError | IndexError) and ":" in str(error) and names.issuperset(words)
    if not named and not (type(error) is RuntimeError and DOCUMENTED.search(str(error))):
        return f"{type(error).__name__} that names no argument: {str(error)[:300]}"
    if sound and named and not str(error).startswith("backend: "):  # that a backend cannot do it is no fault
        try:
            calls.execute(with_backend(call))
        except Exception as other:
            return refused(call, False, other)
        return f"refused, which the reference is not: {error!r}"
    return None


def differs(call: "Call", got: list[Tensor], truth: list[Tensor]) -> str | None:
    """Where an output or a gradient is not what it should be."""
    if [t.shape for t in got] != [t.shape for t in truth]:
        return f"shapes {[tuple(t.shape) for t in got]}, expected {[tuple(t.shape) for t in truth]}"
    kwargs = call.steps[-1][1]
    if call.target is not kmeans_per_class and "embeddings" in kwargs and not got[-1].is_floating_point():
        got, truth = by_similarity(kwargs, got), by_similarity(kwargs, truth)
    if all(torch.equal(g.double(), t.to(g.dtype).double()) for g, t in zip(got, truth)):
        return None
    same, nearby = calls.execute(with_backend(call)), []
    of_weights = max(b.weight_error(call.dtype) for b in registry.BACKENDS)
    eps = torch.finfo(accumulation_dtype(call.dtype)).eps
    for s in range(8):
        nearby.append(calls.execute(rounded(in_float64(call), s, max(eps, of_weights) if s % 2 else eps)))
    nearby = [o for o in nearby if [t.shape for t in o] == [t.shape for t in truth]]
    num_outputs = len(calls.execute(call, gradients=False))
    for i, (g, t) in enumerate(zip(got, truth)):
        g64, t64, r = g.double(), t.to(g.dtype).double(), same[i].double()
        others = [o[i].double() for o in nearby]
        place = f"output {i}" if i < num_outputs else f"gradient {i - num_outputs}"
        what = f"{place}: {g.tolist()}, expected {t.tolist()}"[:800]
        if not g.is_floating_point():
            settled = torch.stack([o == t64 for o in (t64, *others)]).all(0)
            if bool((settled & (g64 != t64)).any()):
                return f"another choice, {what}"
            continue
        infinite = torch.stack([~o.isfinite() for o in (t64, *others)])
        if bool((infinite.all(0) & g64.isfinite()).any()):
            return f"finite where the truth is not, {what}"
        if i == num_outputs - 1 and not all(bool(o.isfinite().all()) for o in (*truth, *got[:num_outputs])):
            return None  # said loud enough; gradients of such a loss are nobody's
        if bool((~infinite.any(0) & r.isfinite() & ~g64.isfinite()).any()):
            return f"not finite where truth and reference are, {what}"
        fine = t64.isfinite() & g64.isfinite()
        error, info = largest((g64 - t64)[fine]), torch.finfo(g.dtype)
        granted = 4 * largest((r - t64)[fine].nan_to_num(torch.inf)) + 4 * info.eps * largest(t64[fine]) + info.tiny
        granted += 4 * max((largest((o - t64)[fine].nan_to_num(torch.inf)) for o in others), default=torch.inf)
        granted += floor(call, eps, of_weights if i >= num_outputs else 0.0)
        if not error <= granted:
            return f"error {error:.3g}, granted {granted:.3g}, {what}"
        if is_extreme(call):
            return None
    return None


def cosines(call: "Call") -> bool:
    """Whether lengths do not matter."""
    euclidean = ("magnet", "Magnet", "kmeans", "cluster")
    similarity = (call.settings | call.steps[-1][1]).get("similarity", "cosine")
    return similarity == "cosine" and not any(word in call.target.__name__ for word in euclidean)


def is_extreme(call: "Call") -> bool:
    """Whether derivatives of similarities, or squares, leave the range of float32."""
    for _, kwargs in call.steps:
        for t in kwargs.values():
            if isinstance(t, Tensor) and t.is_floating_point() and t.numel():
                size = t.double().abs()
                if bool(((size > 0) & (size < 1e-15) | (size > 1e15)).any()):
                    return True
    return False


def floor(call: "Call", eps: float, of_weights: float) -> float:
    """Roundings of a similarity, and of its derivative, that may cancel in the truth.

    of_weights: to what the derivatives are rounded before they are summed.
    """
    kwargs = call.settings | call.steps[-1][1]
    x = kwargs.get("embeddings")
    if x is None:
        return 0.0
    y = -x if "num_classes" in call.settings else x  # about as far away as what a module draws itself
    for name in ("weight", "reference_embeddings", "centroids"):
        y = y if kwargs.get(name) is None else kwargs[name]
    x, y = (t.double().nan_to_num(0.0, 0.0, 0.0) for t in (x, y))
    named = [similarity_of(kwargs)] if "similarity" in kwargs else [Similarity.COSINE, Similarity.DOT]
    sizes, factors = zip(*(reach(x, y, similarity) for similarity in named))
    scale = kwargs.get("scale", 64.0)
    scale = max(1.0, largest(scale.double().nan_to_num()) if isinstance(scale, Tensor) else float(scale))
    steepest = max(1.0, *(f for pair in factors for f in pair)) * scale
    usual = "angular" if call.target is losses.ArcFaceLoss else "additive"
    is_angle = kwargs.get("margin_type", usual) != "additive"
    of_angle = 2 * eps**0.5 * scale * len(x) if is_angle else 0.0  # of arccos at its ends
    return (8 * eps * (1 + scale * max(sizes)) * max(1, len(x), len(y)) + of_weights) * steepest + of_angle


def by_similarity(kwargs: dict[str, Any], outputs: list[Tensor]) -> list[Tensor]:
    """A choice among embeddings counts by its similarity."""
    *rest, index = outputs
    x, y = kwargs["embeddings"].double(), kwargs.get("reference_embeddings")
    y = x if y is None else y.double()
    if not y.shape[0] or index.dim() != 1 or len(index) != len(x):
        return outputs
    u = pair_similarity(x, y[index.clamp(0, len(y) - 1)], similarity_of(kwargs))
    return [*rest, torch.where(index == -1, -torch.inf, u).to(accumulation_dtype(kwargs["embeddings"].dtype))]


def hides(call: "Call", got: list[Tensor]) -> str | None:
    """What is not finite, and whether a loss that depends on it says so."""
    method, kwargs = call.steps[0]
    x = kwargs.get("embeddings")
    if "loss" not in call.target.__name__.lower() or not isinstance(x, Tensor) or bool(x.isfinite().all()):
        return None
    outcomes = []
    for s in range(2):
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(s), dtype=torch.float64)
        finite = torch.where(x.isfinite(), x.double(), noise).to(x.dtype)
        first = call._replace(steps=[(method, kwargs | {"embeddings": finite})])
        outcomes.append(calls.execute(in_float64(first), False)[0])
    depends = (outcomes[0] != outcomes[1]) & outcomes[0].isfinite() & outcomes[1].isfinite()
    hidden = bool((depends & got[0].isfinite()).any())
    return f"finite, but depends on what is not: {got[0].tolist()}" if hidden else None


def finds_others(call: "Call", got: list[Tensor]) -> str | None:
    """Whether a miner's columns are open to its rows, and whether it finds one where there is one."""
    if getattr(mining, call.target.__name__, None) is not call.target:
        return None
    kwargs = call.steps[0][1]
    labels, others, itself = kwargs["labels"], kwargs.get("reference_labels"), kwargs.get("self_index")
    if others is None:
        others, itself = labels, torch.arange(len(labels)) if itself is None else itself
    relations = (Relation.SAME, Relation.DIFFERENT)
    if call.target is mining.batch_lacks:
        lacking = [~admitted(labels.long(), others.long(), relation, itself).any(1) for relation in relations]
        right = all(map(torch.equal, got, lacking))
        return None if right else f"found {got}, expected {lacking}"
    relation = relations[0 if "positive" in call.target.__name__ else 1]
    mask = admitted(labels.long(), others.long(), relation, itself)
    if call.target is mining.all_positives:
        right = torch.equal(mask.nonzero().T, torch.stack(got))
        return None if right else f"pairs {torch.stack(got).tolist()}, expected {mask.nonzero().T.tolist()}"
    index = got[-1]
    if not len(others):
        return None if bool((index == -1).all()) else f"found {index.tolist()} among none"
    fine = (index == -1) | mask.gather(1, index.clamp(0, len(others) - 1)[:, None])[:, 0]
    if "embeddings" not in kwargs:
        fine &= (index == -1) == ~mask.any(1)
    return None if bool(fine.all()) else f"found {index.tolist()}, admitted {mask.int().tolist()}"
