"""Gradients from exponentials that a forward of `contrast` kept, interpreted on the CPU, against the definition."""

import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import fused_margins
from fused_margins.backends import budget, epoch
from fused_margins.backends.triton import launch
from fused_margins.backends.triton.constants import BN
from fused_margins.core import indices
from fused_margins.core.margins import apply_margin
from fused_margins.ops import cases
from fused_margins.ops.contrast import contrast, kernel_triton, triton_exponentials, triton_saved
from fused_margins.ops.contrast.op import Contrast
from tests.ops.suite.problems import make

pytestmark = pytest.mark.interpreted
CONTRAST = cases.load("contrast")
BF16, BOTH = torch.bfloat16, (True, True, False, False, False)


@pytest.fixture(autouse=True)
def of_many_columns(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Calls whose columns fit one tile keep no exponentials: here they go as larger ones do, none as one before."""
    monkeypatch.setattr(triton_saved, "most_columns", 0)
    epoch.begin()
    yield
    epoch.begin()


def with_a_number_as_scale(inputs: cases.Inputs) -> cases.Inputs:
    scale = inputs["scale"]
    return inputs | {"scale": float(scale.max()) if isinstance(scale, Tensor) and scale.numel() else scale}


def blocks(inputs: cases.Inputs) -> int:
    """Of columns whose exponentials a call keeps."""
    a = contrast.checked(contrast.arguments(**cases.convert(inputs, BF16)))
    if kernel_triton.can_run(contrast.problem(a)) is not None:
        return 0
    return triton_saved.most_blocks(a, BOTH) if triton_saved.keeps_exponentials(a, BOTH) else 0


def kept() -> Iterator[Any]:
    """Cases that keep all of their columns, and all but the last block of them."""
    with budget.within_exponential_budget(None), mock.patch.object(triton_saved, "most_columns", 0):
        for case in CONTRAST.CASES:
            inputs = with_a_number_as_scale(make(case))
            for fewer in range(min(2, blocks(inputs))):
                yield pytest.param(case, fewer, id=f"{case.name}{'-some' * fewer}")


def of_blocks(inputs: cases.Inputs, fewer: int) -> int:
    rows, width = inputs["x"].shape
    return 2 * BN * (rows + width) * (blocks(inputs) - fewer)


@pytest.mark.parametrize(("case", "fewer"), list(kept()))
def test_agrees_with_the_definition(case, fewer):
    inputs = with_a_number_as_scale(make(case))
    with budget.within_exponential_budget(None):
        num_bytes = of_blocks(inputs, fewer)
    with budget.within_exponential_budget(num_bytes):
        assert blocks(inputs) > 0
        lines = cases.disagreements(CONTRAST, inputs, "triton", BF16, exact=case.exact, device=launch.device)
    assert not lines, case.reason


def rows_of(kind: str, size: int, width: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(size, width, generator=g), torch.randn(classes, width, generator=g)
    target = torch.randint(classes, (size,), generator=g)
    if kind == "trained":
        x = y[target] + 0.3 * x
    elif kind == "opposed":
        x = 0.3 * x - y[target]
    elif kind == "equal":
        x = x[:1].expand(size, width)
    elif kind == "everything on one line":  # sums of exponentials from e^-s to e^s, side by side
        y = y[:1] * (1 + y[:, :1].abs())
        x = y[0] * torch.tensor([1.0, -1.0]).repeat(size)[:size, None]
    elif kind in ("two sides", "one opposite"):  # sums of exponentials from e^-s to e^s, and gradients across them
        y = y[:1] + 0.03 * y
        sides = torch.where(torch.arange(size) < (size // 2 if kind == "two sides" else 1), -1.0, 1.0)
        x = sides[:, None] * y[0] + 0.03 * x
    elif kind == "any length":
        y, x = y * 10.0 ** torch.randint(-18, 18, (classes, 1), generator=g), x * 1e-12
    return x.to(BF16), y.to(BF16), target


def summed(out: Any) -> Tensor:
    """A number of every output."""
    g = torch.Generator().manual_seed(1)
    outs = out if isinstance(out, tuple) else (out,)
    return torch.stack([(t * torch.randn(t.shape, generator=g, dtype=torch.float64)).sum() for t in outs]).sum()


def gradients(x: Tensor, y: Tensor, target: Tensor, backend: str, **options: Any) -> list[Tensor]:
    x, y = (t.clone().requires_grad_() for t in (x, y))
    return [t.double() for t in torch.autograd.grad(summed(contrast(x, y, target, backend=backend, **options)), (x, y))]


def reach(x: Tensor, y: Tensor, target: Tensor, scale: float, epilogue: str, margin: float, angle: float) -> Any:
    """Norms of the gradients of unit vectors, with the part along each: of that by the negatives, and by the positives,
    which may cancel."""
    a, b = (torch.nn.functional.normalize(t.double(), dim=1).requires_grad_() for t in (x, y))
    u = a @ b.T
    own = torch.nn.functional.one_hot(target, len(y)).bool()
    negative_lse, positive = (scale * u).masked_fill(own, -math.inf).logsumexp(1), u[own]
    parts = []
    for of_positive, of_negatives in ((positive.detach(), negative_lse), (positive, negative_lse.detach())):
        out: Any = of_positive, of_negatives
        if epilogue != "none":
            z = scale * (apply_margin(of_positive, angle, "angular") - margin)
            out = torch.nn.functional.softplus(of_negatives - z).mean()
        parts.append(torch.autograd.grad(summed(out), (a, b), retain_graph=True))
    return [sum(t.norm() for t in of_vectors) for of_vectors in zip(*parts)]


def error(got: Tensor, truth: Tensor) -> float:
    return float((got - truth).norm() / truth.norm())


KINDS = ["random", "trained", "opposed", "equal", "everything on one line", "any length"]
EPILOGUES = ["none", "margin_softmax", "info_nce"]
SCALES = [0.1, 16.0, 64.0]
EACH = [(kind, 70.0, epilogue) for kind in KINDS for epilogue in EPILOGUES]
EACH += [(kind, SCALES[(k + e) % 3], epilogue) for k, kind in enumerate(KINDS) for e, epilogue in enumerate(EPILOGUES)]


@pytest.mark.parametrize(("kind", "scale", "epilogue"), EACH)
def test_errors_are_a_few_roundings(kind, scale, epilogue):
    """Of E, of c a and of b, and of the result: each 2^-9 at most, and not all at once. Where a column's gradient is
    along the column, what is left is the rounding of that part."""
    x, y, target = rows_of(kind, 24, 40, 140)
    options: dict[str, Any] = {"scale": scale, "epilogue": epilogue}
    margin, angle = (-0.1, 0.3) if epilogue == "margin_softmax" else (0.0, 0.0)
    with budget.within_exponential_budget(None):
        got = gradients(x, y, target, "triton", margin=margin, angle_rad=angle, **options)
    truth = gradients(x.double(), y.double(), target, "reference", margin=margin, angle_rad=angle, **options)
    norms = reach(x, y, target, margin=margin, angle=angle, **options)
    for g, t, vectors, norm in zip(got, truth, (x, y), norms):
        lengths = vectors.double().norm(dim=1, keepdim=True)
        assert g.isfinite().all()
        assert ((g - t) * lengths).norm() <= 3 * 2**-9 * norm


def test_a_positive_among_the_negatives_does_not_cancel_with_rounding():
    """Where it dominates its row, all but the rounding of exp(z) - S would."""
    x, y, target = rows_of("trained", 24, 40, 140)
    options = {"scale": 15.0, "epilogue": "info_nce", "relation": "any"}
    truth = gradients(x.double(), y.double(), target, "reference", **options)
    with budget.within_exponential_budget(None):
        got = gradients(x, y, target, "triton", **options)
    assert all(error(g, t) < 2**-7 for g, t in zip(got, truth))


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("of_row", ["target out of range", "ignored, not a number"])
def test_a_row_without_a_gradient_reaches_no_column(monkeypatch, of_row, epilogue):
    monkeypatch.setattr(indices, "raises_everywhere", lambda: False)  # as on a GPU, which makes such a row NaN
    x, y, target = rows_of("random", 24, 40, 140)
    options = {"scale": 30.0, "epilogue": epilogue, "reduction": "sum"}
    rest = [t.double() for t in (x, y)]
    rest[0][5] = 0
    ignored = target.clone()
    ignored[5] = -1
    truth = gradients(*rest, ignored, "reference", **options)
    if of_row == "target out of range":
        target[5] = 140
    else:
        target[5], x[5] = -1, torch.nan
    with budget.within_exponential_budget(None):
        got = gradients(x, y, target, "triton", **options)
    others = torch.arange(24) != 5
    assert error(got[0][others], truth[0][others]) < 2**-7
    assert error(got[1], truth[1]) < 2**-7


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", ["two sides", "one opposite"])
def test_small_sums_beside_large_ones_leave_both_their_gradients(kind, reduction):
    x, y, target = rows_of(kind, 24, 40, 140)
    options = {"scale": 70.0, "epilogue": "margin_softmax", "margin": 0.1, "reduction": reduction}
    truth = gradients(x.double(), y.double(), target, "reference", **options)
    with budget.within_exponential_budget(None):
        got = gradients(x, y, target, "triton", **options)
    assert all(error(g, t) < 0.3 for g, t in zip(got, truth))  # 2^-9 over the sine of the cone; without one side 1


def test_nothing_is_kept_unless_it_is_asked_for():
    x, y, target = rows_of("random", 24, 40, 300)
    a = Contrast(x, y, target, scale=16.0)
    assert triton_saved.most_blocks(a, BOTH) == 0
    with budget.within_exponential_budget(None):
        assert triton_saved.most_blocks(a, BOTH) == 3
        assert triton_saved.most_blocks(a, (False,) * 5) == 0
        for other in (
            {"scale": 70.1}, {"scale": 70.0, "y": y[:1].expand(22_100, -1)}, {"scale": torch.tensor(16.0)},
            {"bias": torch.zeros(300)}, {"self_index": target}, {"x": x.half(), "y": y.half()},
            {"x": x.float(), "y": y.float()},
        ):  # fmt: skip
            changed = a._replace(**other)
            assert not triton_saved.keeps_exponentials(changed, BOTH)


def test_of_many_classes():
    """Of which a third is kept."""
    x, y, target = rows_of("trained", 8, 16, 4_000)
    options = {"scale": 64.0, "epilogue": "margin_softmax", "margin": 0.35}
    truth = gradients(x.double(), y.double(), target, "reference", **options)
    with budget.within_exponential_budget(2 * (8 + 16) * 1_400):
        got = gradients(x, y, target, "triton", **options)
    assert all(error(g, t) < 2**-7 for g, t in zip(got, truth))


def test_explain_says_what_is_kept(capsys):
    asked = {"rows": 1024, "columns": 100_000, "width": 512, "dtype": BF16, "device": launch.device, "scale": 30.0}
    fused_margins.explain("contrast", **asked)
    with budget.within_exponential_budget(150 * 2**20):
        fused_margins.explain("contrast", **asked)
    today, kept = (line for line in capsys.readouterr().out.splitlines() if "triton" in line)
    assert today.endswith("computes 100% of the softmax weights again: 4.00 products")
    assert kept.endswith(
        "it keeps exponentials of 51% of the columns, 150.4 MiB, which with gradients take another 103.0 MiB while the "
        "backward runs: 3.49 products"
    )


SETTING = "allow_bf16_reduced_precision_reduction"


@pytest.mark.parametrize("asked", [(True, True), (False, True), (False, False)])
def test_products_are_added_up_in_float32_and_leave_the_settings_as_they_were(asked):
    settings = torch.backends.cuda.matmul
    if not hasattr(settings, f"{SETTING}_split_k"):
        pytest.skip("torch has one setting here before 2.9")
    before = read_setting()
    setattr(settings, SETTING, asked)
    a = torch.empty(4, 8, dtype=BF16, device="meta")
    try:
        assert triton_exponentials.product(a, a.T).dtype == torch.float32
        assert read_setting() == asked
    finally:
        setattr(settings, SETTING, before)


def read_setting() -> tuple[bool, bool]:
    settings = torch.backends.cuda.matmul
    return getattr(settings, SETTING), getattr(settings, f"{SETTING}_split_k")
