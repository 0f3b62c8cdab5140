"""The correctness check: an implementation that does not compute the row's function gets no figure.

Everybody is compared with the definition in float64. A peer rounds where it likes, all of its logits to bfloat16 for
instance, so it must be near enough to be the same function and no more: TOLERANCE, relative, in the root mean square.
Ours must also satisfy the rule of the tests (`fused_margins.ops.cases`) on the same inputs, where their definition is
not too large to compute.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_margins.ops import cases
from fused_margins.ops.sample.reference import log_weight

from .workload import Check, Implementation, Inputs, Outputs, Step

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
# Of a choice, in roundings of the largest similarity that the lengths allow: it compares two, each computed in a few.
CHOICE_ROUNDINGS = 16
SAMPLE_DEVIATIONS = 6
ENTRIES_AT_ONCE = 1 << 26  # of a float64 matrix: half a GiB, and a few times that with what it is made of
MOST_PRODUCTS = 1 << 31  # B x N x D that the rule of the tests is applied to

# An op's name and its arguments that compute a workload's inputs.
OpCall = Callable[[Inputs], tuple[str, Inputs]]


def _broken_rules(call: OpCall | None, inputs: Inputs, implementation: Implementation) -> list[str]:
    if call is None or implementation.backend in (None, "auto", "reference"):  # the last is the definition
        return []
    name, arguments = call(inputs | implementation.changes)
    x = arguments["x"]
    if len(x) * len(arguments.get("y", x)) * x.shape[1] > MOST_PRODUCTS:
        return []
    return cases.disagreements(cases.load(name), arguments, implementation.backend, x.dtype, device=x.device.type)


def check_values(
    inputs: Inputs,
    truth: Callable[[Inputs], Step],
    call: OpCall | None = None,
    observed: Callable[[Outputs, Inputs, bool], Outputs] = lambda outputs, inputs, exact: outputs,
) -> Check:
    """For outputs and gradients that are numbers.

    Args:
        truth: makes the step that is exact on inputs in float64.
        call: what the rule of the tests is applied to; None: nothing.
        observed: what of the outputs is compared, as in an op's ``cases.py``.
    """
    first = next(t for t in inputs.values() if isinstance(t, Tensor))
    known: dict[str, Outputs] = {}

    def check(implementation: Implementation, outputs: Outputs) -> list[str]:
        changed, exact = repr(implementation.changes), _in_float64(inputs | implementation.changes)
        if changed not in known:
            known[changed] = observed(truth(exact)(), exact, False)
        faults = _faults(observed(outputs, exact, False), known[changed], first.dtype)
        return faults or _broken_rules(call, inputs, implementation)

    return check


def _in_float64(inputs: Inputs) -> Inputs:
    """One tensor under two names stays one."""
    tensors = {id(t): t for t in inputs.values() if isinstance(t, Tensor) and t.is_floating_point()}
    doubled = {key: t.double() for key, t in tensors.items()}
    return {name: doubled.get(id(value), value) for name, value in inputs.items()}


def _faults(outputs: Outputs, truth: Outputs, dtype: torch.dtype) -> list[str]:
    shapes = {name: tuple(outputs[name].shape) if name in outputs else None for name in truth}
    faults = [
        f"{n}: expected shape {tuple(t.shape)}, got {shapes[n]}" for n, t in truth.items() if shapes[n] != t.shape
    ]
    if faults:
        return faults
    for name, expected in truth.items():
        error, size = float((outputs[name].double() - expected).norm()), float(expected.norm())
        if not error <= TOLERANCE[dtype] * size:
            faults.append(f"{name}: relative error {error / max(size, 1e-300):.3g}, granted {TOLERANCE[dtype]:g}")
    return faults


def check_choice(inputs: Inputs, search: Callable[[Inputs], Inputs]) -> Check:
    """For "index" (B,) and perhaps "similarity" (B,): by what a choice loses against the best one.

    `search` gives the arguments of `nearest`. The similarities are float64 matrix products of some rows at a time: the
    op's definition would take minutes at the sizes that are measured, and the whole matrix tens of gigabytes.
    """
    p = search(inputs)
    best = torch.cat([u.amax(1) for _, u in _similarities(p)])
    longest = [cases.largest((p[side].double() - p["y"].double().mean(0)).norm(dim=1)) for side in "xy"]
    u_largest = 1.0 if p.get("similarity", "cosine") == "cosine" else sum(longest) ** 2
    granted = CHOICE_ROUNDINGS * torch.finfo(torch.float32).eps * u_largest

    def check(implementation: Implementation, outputs: Outputs) -> list[str]:
        index = outputs["index"]
        found = index >= 0
        if not torch.equal(found, best > -torch.inf):
            return ["index: a choice where there is none, or none where there is one"]
        column = index.clamp(0, len(p["y"]) - 1)[:, None]
        chosen = torch.cat([u.gather(1, column[rows])[:, 0] for rows, u in _similarities(p)])
        errors = {"index": (best - chosen)[found]}
        if "similarity" in outputs:
            errors["similarity"] = (outputs["similarity"] - best)[found]
        faults = [
            f"{name}: off by {cases.largest(error):.3g}, granted {granted:.3g}"
            for name, error in errors.items()
            if not cases.largest(error) <= granted
        ]
        return faults or _broken_rules(lambda _: ("nearest", p), inputs, implementation)

    return check


def _similarities(p: Inputs) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows, and their similarities to all columns in float64, -inf where a row does not admit the column."""
    x, y = p["x"].double(), p["y"].double()
    cosine = p.get("similarity", "cosine") == "cosine"
    # Squared distances are centred: else the square cancels far from the origin.
    x, y = (F.normalize(t) if cosine else t - p["y"].double().mean(0) for t in (x, y))
    step = max(1, ENTRIES_AT_ONCE // max(1, len(y)))
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        u = x[rows] @ y.T
        if not cosine:
            u.mul_(2).sub_(y.square().sum(1)).sub_(x[rows].square().sum(1, keepdim=True))
        if p["relation"] != "any":
            same = p["row_labels"][rows, None] == p["column_labels"]
            u.masked_fill_(same if p["relation"] == "different" else ~same, -torch.inf)
        if p["self_index"] is not None:
            u.scatter_(1, p["self_index"][rows, None], -torch.inf)
        yield rows, u


def check_sample(inputs: Inputs, search: Callable[[Inputs], Inputs]) -> Check:
    """For "index" (B,), sampled by the weights of `fused_margins.ops.sample`: every column open to its row, and the sum
    over rows of the log weight's deviation from its mean within SAMPLE_DEVIATIONS standard deviations of 0, both of
    which the weights tell. `search` as above; every row has a column within the cut-off.
    """
    p = search(inputs)

    def check(implementation: Implementation, outputs: Outputs) -> list[str]:
        index, off, variance = outputs["index"], 0.0, 0.0
        if tuple(index.shape) != (len(p["x"]),) or not bool(((index >= 0) & (index < len(p["y"]))).all()):
            return ["index: expected a column for every row"]
        for rows, u in _similarities(p):
            weight = log_weight(2 - 2 * u, p["x"].shape[1]).masked_fill_(u == -torch.inf, -torch.inf)
            sampled = weight.gather(1, index[rows, None])[:, 0]
            if not bool(sampled.isfinite().all()):
                return [f"index: {int((~sampled.isfinite()).sum())} columns that are not open to their row"]
            probability, finite = weight.softmax(1), weight.masked_fill_(weight == -torch.inf, 0.0)
            mean = (probability * finite).sum(1)
            off += float((sampled - mean).sum())
            variance += float((probability * (finite - mean[:, None]).square()).sum())
        allowed = SAMPLE_DEVIATIONS * variance**0.5 + 1e-9 * len(p["x"])  # and rounding
        if not abs(off) <= allowed:
            return [f"index: the mean of log weights is off by {off:.3g}, granted {allowed:.3g}"]
        return _broken_rules(lambda _: ("sample", p), inputs, implementation)

    return check
