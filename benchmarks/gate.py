"""Who computes the row's function: nobody else gets a figure.

Ours must satisfy the tolerance rule of the tests (`fused_margins.ops.cases`): an error against float64 of at most
that of the reference in the same dtype, plus a small stated term. A peer rounds where it likes, all of its logits to
bfloat16 for instance, so it must be near enough to be the same function and no more: PEER_TOLERANCE, relative, in the
root mean square.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fused_margins.ops import cases
from fused_margins.ops.draw.reference import log_weight
from fused_margins.ops.similarity import accumulation_dtype, admitted, pair_similarity, similarity_matrix, unit_rows

from .workload import Contestant, Inputs, Judge, Outputs, Step

PEER_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
# Of a loss and its gradients, in roundings of their largest value: a handful of operations after the op's.
LOSS_ROUNDINGS = 64
# Of a choice, in roundings of the largest similarity that the lengths allow: it compares two, each computed in a few.
CHOICE_ROUNDINGS = 16
DRAW_DEVIATIONS = 6
ENTRIES_AT_ONCE = 1 << 26  # of a float64 matrix: half a GiB, and a few times that with what it is made of


def judge_op(op: cases.OpCases, prepare: Callable[[Inputs, str], Step]) -> Callable[[Inputs], Judge]:
    """For an op: ours by the op's own cases, peers against the reference in float64."""

    def judge_for(inputs: Inputs) -> Judge:
        dtype, device = inputs["x"].dtype, str(inputs["x"].device)
        exact = cases.convert(inputs, torch.float64, device)
        truths = _Truths(lambda changed: prepare(cases.convert(changed, torch.float64, device), "reference"), inputs)

        def judge(contestant: Contestant, outputs: Outputs) -> list[str]:
            if contestant.backend == "reference":
                return []  # it is the definition
            if contestant.backend is not None:
                return cases.disagreements(op, inputs, contestant.backend, dtype, device=device)
            return _peer_faults(
                op.observed(outputs, exact, False), op.observed(truths.of(contestant), exact, False), dtype
            )

        return judge

    return judge_for


def judge_loss(
    prepare: Callable[[Inputs, str], Step], prepare_truth: Callable[[Inputs], Step] | None = None
) -> Callable[[Inputs], Judge]:
    """For a loss and its gradients, or any function of "embeddings".

    Args:
        prepare: makes our step on a backend.
        prepare_truth: the step that is exact on inputs in float64; None: ours on "reference".
    """

    def judge_for(inputs: Inputs) -> Judge:
        dtype = inputs["embeddings"].dtype
        exact = prepare_truth or (lambda changed: prepare(changed, "reference"))
        truths = _Truths(lambda changed: exact(_doubled(changed)), inputs)
        same_dtype = _Truths(lambda changed: prepare(changed, "reference"), inputs)

        def judge(contestant: Contestant, outputs: Outputs) -> list[str]:
            truth = truths.of(contestant)
            if contestant.backend is None:
                return _peer_faults(outputs, truth, dtype)
            faults = _unlike(outputs, truth)
            if faults:
                return faults
            for name, expected in truth.items():
                error = cases.largest(outputs[name] - expected)
                granted = cases.largest(same_dtype.of(contestant)[name] - expected)
                eps = LOSS_ROUNDINGS * torch.finfo(accumulation_dtype(dtype)).eps + torch.finfo(outputs[name].dtype).eps
                granted += eps * cases.largest(expected)
                if not error <= granted:
                    faults.append(f"{name}: error {error:.3g}, granted {granted:.3g}")
            return faults

        return judge

    return judge_for


def judge_choice(problem: Callable[[Inputs], Inputs]) -> Callable[[Inputs], Judge]:
    """For "index" (B,) and perhaps "similarity" (B,): by what a choice loses against the best one.

    `problem` gives x, y, row_labels, column_labels, self_index, similarity and relation of the inputs. The
    similarities come from float64 matrix products of some rows at a time: the op's definition would take minutes at
    the sizes that are measured, and the whole matrix tens of gigabytes.
    """

    def judge_for(inputs: Inputs) -> Judge:
        p = problem(inputs)
        x, y = p["x"].double(), p["y"].double()
        best = _best(x, y, p)
        u_largest, _ = cases.reach(x, y, p["similarity"])
        granted = CHOICE_ROUNDINGS * torch.finfo(accumulation_dtype(p["x"].dtype)).eps * u_largest

        def judge(contestant: Contestant, outputs: Outputs) -> list[str]:
            index = outputs["index"]
            found = index >= 0
            if not torch.equal(found, best > -torch.inf):
                return ["index: a choice where there is none, or none where there is one"]
            chosen = _chosen(x, y, p, index.clamp(0, len(y) - 1))
            errors = {"index": (best - chosen)[found]}
            if "similarity" in outputs:
                errors["similarity"] = (outputs["similarity"] - best)[found]
            return [
                f"{name}: off by {cases.largest(error):.3g}, granted {granted:.3g}"
                for name, error in errors.items()
                if not cases.largest(error) <= granted
            ]

        return judge

    return judge_for


def _best(x: Tensor, y: Tensor, p: Inputs) -> Tensor:
    """The largest similarity that each row admits (B,)."""
    best = []
    step = max(1, ENTRIES_AT_ONCE // max(1, len(y)))
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        own = None if p["self_index"] is None else p["self_index"][rows]
        mask = admitted(p["row_labels"][rows], p["column_labels"], p["relation"], own)
        best.append(similarity_matrix(x[rows], y, p["similarity"]).masked_fill_(~mask, -torch.inf).amax(1))
    return torch.cat(best)


def _chosen(x: Tensor, y: Tensor, p: Inputs, index: Tensor) -> Tensor:
    """The similarity of each row to its column (B,), -inf for one that it may not choose."""
    same = p["row_labels"] == p["column_labels"][index]
    allowed = {"same": same, "different": ~same, "any": torch.ones_like(same)}[p["relation"]]
    if p["self_index"] is not None:
        allowed = allowed & (index != p["self_index"])
    return pair_similarity(x, y[index], p["similarity"]).masked_fill(~allowed, -torch.inf)


def judge_draw(problem: Callable[[Inputs], Inputs]) -> Callable[[Inputs], Judge]:
    """For "index" (B,), drawn by `fused_margins.ops.draw`'s weights: every column open to its row; the sums over rows
    of the drawn log weight's deviation from its mean, and of the square of that, within DRAW_DEVIATIONS standard
    deviations of what they should be, all of which the weights tell.

    `problem` gives x, y, row_labels and column_labels of the inputs; every row has a column within the cut-off.
    """

    def judge_for(inputs: Inputs) -> Judge:
        p = problem(inputs)
        x, y = (unit_rows(p[side].double()) for side in "xy")
        step = max(1, ENTRIES_AT_ONCE // max(1, len(y)))

        def log_weights(start: int) -> Tensor:
            rows = slice(start, start + step)
            mask = admitted(p["row_labels"][rows], p["column_labels"], "different", None)
            return log_weight(2 - 2 * x[rows] @ y.T, x.shape[1]).masked_fill_(~mask, -torch.inf)

        def judge(contestant: Contestant, outputs: Outputs) -> list[str]:
            index = outputs["index"]
            off, variance = x.new_zeros(2), x.new_zeros(2)  # of both sums: what they are too large by, their variances
            if tuple(index.shape) != (len(x),) or not bool(((index >= 0) & (index < len(y))).all()):
                return ["index: expected a column for every row"]
            for start in range(0, len(x), step):
                weight = log_weights(start)
                drawn = weight.gather(1, index[start : start + step, None])[:, 0]
                if not bool(drawn.isfinite().all()):
                    return [f"index: {int((~drawn.isfinite()).sum())} columns that are not open to their row"]
                probability, finite = weight.softmax(1), weight.masked_fill(weight == -torch.inf, 0.0)
                mean = (probability * finite).sum(1)
                powers = [(probability * (finite - mean[:, None]) ** n).sum(1) for n in (2, 4)]
                off += torch.stack([(drawn - mean).sum(), ((drawn - mean).square() - powers[0]).sum()])
                variance += torch.stack([powers[0].sum(), (powers[1] - powers[0].square()).sum()])
            allowed = DRAW_DEVIATIONS * variance.clamp(min=0).sqrt() + 1e-9 * len(x)  # and rounding
            return [
                f"index: the {what} of log weights is off by {float(o):.3g}, granted {float(a):.3g}"
                for what, o, a in zip(("mean", "variance"), off, allowed)
                if not abs(o) <= a
            ]

        return judge

    return judge_for


class _Truths:
    """The outputs to compare with, computed once for each set of changed inputs."""

    def __init__(self, prepare: Callable[[Inputs], Step], inputs: Inputs) -> None:
        self.prepare, self.inputs = prepare, inputs
        self.known: dict[str, Outputs] = {}

    def of(self, contestant: Contestant) -> Outputs:
        key = repr(sorted(contestant.changes.items()))
        if key not in self.known:
            self.known[key] = self.prepare(self.inputs | contestant.changes)()
        return self.known[key]


def _doubled(inputs: Inputs) -> Inputs:
    return {n: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in inputs.items()}


def _unlike(outputs: Outputs, truth: Outputs) -> list[str]:
    """Outputs that are missing or of another shape."""
    shapes = {name: tuple(outputs[name].shape) if name in outputs else None for name in truth}
    return [f"{n}: expected shape {tuple(t.shape)}, got {shapes[n]}" for n, t in truth.items() if shapes[n] != t.shape]


def _peer_faults(outputs: Outputs, truth: Outputs, dtype: torch.dtype) -> list[str]:
    faults = _unlike(outputs, truth)
    if faults:
        return faults
    for name, expected in truth.items():
        error, size = float((outputs[name].double() - expected).norm()), float(expected.norm())
        if not error <= PEER_TOLERANCE[dtype] * size:
            faults.append(f"{name}: relative error {error / max(size, 1e-300):.3g}, granted {PEER_TOLERANCE[dtype]:g}")
    return faults
