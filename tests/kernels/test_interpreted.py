"""Every case on Triton's kernels, interpreted on the CPU, against the definition; gradients and outputs together.

Every pair of matrices comes in float32 and in bfloat16. What the two change is how tiles of similarities are made:
further cases with the same matrices, of other labels and options, come in one of them in turn. Some of those that save
weights come once more without room for any.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch

from fused_margins.backends import budget, epoch, registry
from fused_margins.backends.triton import launch
from fused_margins.backends.triton.constants import BN
from fused_margins.functional import margin_softmax, margin_softmax_loss
from fused_margins.ops import cases
from fused_margins.ops.contrast import contrast, triton_saved
from fused_margins.ops.contrast.epilogues import Epilogue
from fused_margins.ops.nearest import kernel_triton as nearest_in_triton
from tests.ops.suite.problems import make, refusal

pytestmark = pytest.mark.interpreted
DTYPES = [torch.float32, torch.bfloat16]
OPS = {name: cases.load(name) for name in registry.OPS if registry.has_kernel(name, "triton")}


def cases_in_dtypes(op: str) -> Iterator[tuple[cases.Case, torch.dtype]]:
    seen: list[tuple[list[torch.Tensor], str]] = []
    others = 0
    for case in OPS[op].CASES:
        inputs = case.make(torch.Generator().manual_seed(0))
        matrices = [inputs[name] for name in ("x", "y") if name in inputs], inputs.get("similarity", "cosine")
        if not any(are_equal(matrices, former) for former in seen):
            seen.append(matrices)
            yield from ((case, dtype) for dtype in DTYPES)
        else:
            yield case, DTYPES[others % 2]
            others += 1


def are_equal(first: tuple[list[torch.Tensor], str], second: tuple[list[torch.Tensor], str]) -> bool:
    (matrices, similarity), (others, another) = first, second
    alike = similarity == another and [t.stride() for t in matrices] == [t.stride() for t in others]
    return alike and all(map(torch.equal, matrices, others))


CASES = [
    pytest.param(op, case, dtype, id=f"{op}-{case.name}-{str(dtype).removeprefix('torch.')}")
    for op in OPS
    for case, dtype in cases_in_dtypes(op)
]


def in_dtypes_in_turn(chosen: Iterable[cases.Case]) -> list[Any]:
    return [
        pytest.param(case, dtype, id=f"{case.name}-{str(dtype).removeprefix('torch.')}")
        for case, dtype in zip(chosen, itertools.cycle(DTYPES))
    ]


def refused(op: str, case: cases.Case, dtype: torch.dtype) -> bool:
    """Whether the backend says that it does not take a case; then a call says the same."""
    reason = refusal(op, make(case, dtype, launch.device), "triton")
    if reason:
        with pytest.raises(RuntimeError, match=re.escape(reason)):
            cases.evaluate(OPS[op], make(case, dtype, launch.device), "triton")
    return reason is not None


@pytest.mark.parametrize(("op", "case", "dtype"), CASES)
def test_agrees_with_the_definition(op, case, dtype):
    inputs = make(case)
    if refused(op, case, dtype):
        return
    options = {"exact": case.exact, "gradients": bool(OPS[op].DIFFERENTIABLE), "device": launch.device}
    assert not cases.disagreements(OPS[op], inputs, "triton", dtype, **options), case.reason


@pytest.fixture
def most_columns(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Says how many columns are few; what is remembered of calls goes by another number."""

    def say(number: int) -> None:
        monkeypatch.setattr(triton_saved, "most_columns", number)
        epoch.begin()

    yield say
    epoch.begin()


def takes_one_tile(case: cases.Case) -> bool:
    """Whether a case is a loss whose columns fit one tile."""
    return triton_saved.fits_one_tile(contrast.checked(contrast.arguments(**make(case))))


@pytest.mark.parametrize(
    ("case", "dtype"),
    in_dtypes_in_turn(filter(takes_one_tile, OPS["contrast"].CASES)),
)
def test_losses_agree_as_if_their_columns_were_many(case, dtype, most_columns):
    most_columns(0)
    options = {"exact": case.exact, "gradients": True, "device": launch.device}
    assert not cases.disagreements(OPS["contrast"], make(case), "triton", dtype, **options), case.reason


def takes_one_launch(case: cases.Case) -> bool:
    """Whether a search is for one column, and not by distances, which are ranked first."""
    inputs = make(case)
    ranked = inputs.get("similarity") == "negative_squared_euclidean" and inputs.get("largest", True)
    return inputs.get("k", 1) == 1 and ("below" in inputs or not ranked)


@pytest.mark.parametrize(
    ("case", "dtype"),
    in_dtypes_in_turn(filter(takes_one_launch, OPS["nearest"].CASES)),
)
def test_neighbours_agree_as_if_the_batch_were_large(case, dtype, monkeypatch):
    monkeypatch.setattr(nearest_in_triton, "most_alone", 0)
    options = {"exact": case.exact, "gradients": False, "device": launch.device}
    assert not cases.disagreements(OPS["nearest"], make(case), "triton", dtype, **options), case.reason


def test_smoothed_labels_need_no_row_code(monkeypatch, most_columns):
    x, weight, picked = torch.randn(9, 6), torch.randn(5, 6), torch.arange(9) % 5
    expected = margin_softmax_loss(x, weight, picked, margin=0.2, label_smoothing=0.3, backend="reference")
    monkeypatch.setattr(margin_softmax, "cosine_sums", None)
    for most in (BN, 4):
        most_columns(most)
        smoothed = margin_softmax_loss(x, weight, picked, margin=0.2, label_smoothing=0.3, backend="triton")
        torch.testing.assert_close(smoothed, expected)


def test_many_rows_go_the_way_of_many_columns():
    """A program of few columns has all rows for some entries of the gradient of y."""
    for rows, expected in ((8192, True), (8193, False)):
        x, weight = torch.zeros(rows, 2), torch.zeros(3, 2)
        a = contrast.arguments(x, weight, torch.zeros(rows, dtype=torch.int64), epilogue=Epilogue.MARGIN_SOFTMAX)
        assert triton_saved.fits_one_tile(a) == expected


def test_the_gradient_of_a_margin_per_row_has_its_own_memory():
    """A compiled graph counts on tensors that begin where their memory does."""
    x, weight, margin = torch.randn(6, 8), torch.randn(BN + 1, 8), torch.full((6,), 0.1, requires_grad=True)
    options = {"margin": margin, "epilogue": "margin_softmax", "backend": "triton"}
    (grad,) = torch.autograd.grad(contrast(x, weight, torch.arange(6), **options), margin)
    assert grad.storage_offset() == 0
    assert grad.untyped_storage().nbytes() == 6 * 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_smoothing_of_no_rows(dtype):
    x, weight = torch.zeros(0, 6, dtype=dtype), torch.ones(BN + 1, 6, dtype=dtype)
    x.requires_grad_()
    options = {"epilogue": "margin_softmax", "smoothing": 0.3, "backend": "triton"}
    for columns in (5, BN + 1):
        loss = contrast(x, weight[:columns], torch.zeros(0, dtype=torch.int64), **options)
        loss.backward()
        assert loss == 0
        assert x.grad.shape == (0, 6)


PLANNED = [name for name in OPS if hasattr(registry.kernel(name, "triton"), "plan")]


@pytest.mark.parametrize(
    ("op", "case"),
    [pytest.param(name, case, id=f"{name}-{case.name}") for name in PLANNED for case in OPS[name].CASES[::6]],
)
def test_agrees_where_nothing_may_be_saved(op, case):
    inputs = make(case)
    if refused(op, case, torch.float32):
        return
    with budget.within_memory_budget(0):
        lines = cases.disagreements(OPS[op], inputs, "triton", torch.float32, exact=case.exact, device=launch.device)
    assert not lines, case.reason
