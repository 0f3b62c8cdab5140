"""`scores`: its formula, vectors of any length, and numbers of 16 bits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fused_margins.core.enums import Similarity
from fused_margins.ops import cases
from fused_margins.ops.cases import Inputs
from fused_margins.ops.scores import scores
from tests.conftest import backends
from tests.ops.by_hand import in_numbers, of_row, similarities
from tests.ops.drawn import matrices, self_index_of

OP = cases.load("scores")
EUCLIDEAN = "negative_squared_euclidean"
on_every_backend = pytest.mark.parametrize("backend", backends("scores"))
on_every_kernel = pytest.mark.parametrize("backend", backends("scores", reference=False))
on_cpu = pytest.mark.parametrize("backend", [b for b in backends("scores") if b == "cpu"])


def by_hand(inputs: Inputs) -> Tensor:
    inputs = in_numbers(inputs)
    z = similarities(inputs["x"], inputs["y"], inputs.get("similarity", "cosine"))
    for i, row in enumerate(z):
        for j, u in enumerate(row):
            is_target = "target" in inputs and inputs["target"][i] == j
            u -= of_row(inputs.get("margin", 0.0), i) if is_target else 0.0
            row[j] = of_row(inputs.get("scale", 1.0), i) * u + of_row(inputs.get("bias", 0.0), j)
    return inputs.get("sign", 1) * torch.tensor(z, dtype=torch.float64).reshape(len(inputs["x"]), len(inputs["y"]))


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in OP.CASES])
def test_the_definition_is_its_formula(case):
    inputs = case.make(torch.Generator().manual_seed(0))
    got = OP.run(inputs, "reference")["scores"]
    torch.testing.assert_close(got, by_hand(inputs), rtol=1e-11, atol=1e-11)


@on_every_backend
@pytest.mark.parametrize("value", [9, -2, 2**40, -(2**63)])
def test_a_target_out_of_range_raises(value, backend):
    target = torch.tensor([0, 1, -1, 3, value, 9])  # the first bad row is named, -1 is none
    with pytest.raises(IndexError) as raised:
        scores(torch.randn(6, 4), torch.randn(9, 4), target, margin=0.1, backend=backend)
    assert str(raised.value) == f"target: expected values in [0, 9) or -1 (ignored), got {value} in row 4"
    target = torch.tensor([0, -100, -1, 0, 0, 0])
    with pytest.raises(IndexError, match=r"target: .* or -100 \(ignored\), got -1 in row 2"):
        scores(torch.randn(6, 4), torch.randn(9, 4), target, ignore_index=-100, backend=backend)


@on_every_backend
@pytest.mark.parametrize("value", [0.0, -2.0, torch.nan])
@pytest.mark.parametrize("rows", [(), (6,)], ids=["single", "rows"])
def test_a_scale_that_is_not_positive(value, rows, backend):
    scale = torch.ones(rows)
    scale.view(-1)[-1] = value
    with pytest.raises(ValueError, match=r"scale: expected positive values, got "):
        scores(torch.randn(6, 4), torch.randn(9, 4), scale=scale, backend=backend)


@on_every_backend
@pytest.mark.interpreted
def test_signs(backend):
    """A sign is 1 or -1; with -1 distances are written without a negative zero."""
    x = torch.randint(-4, 5, (8, 5)).float()  # numbers whose centre is exact, and so every distance
    x[3] = x[2]
    with pytest.raises(ValueError, match=r"sign: expected 1 or -1, got 0"):
        scores(x, x, sign=0, backend=backend)
    plain = scores(x, x, similarity=EUCLIDEAN, backend=backend)
    negated = scores(x, x, similarity=EUCLIDEAN, sign=-1, backend=backend)
    assert torch.equal(negated, -plain)
    assert negated[2, 3] == 0
    assert not negated.signbit().any()


@on_cpu
@pytest.mark.parametrize("length", [1e-38, 1e-30, 1e-20, 1e-3, 1e18, 1e30, 1e38])
@pytest.mark.interpreted
def test_cosines_of_vectors_of_any_length(length, backend):
    """Squares of these lengths leave float32's range; the C++ kernels square in double."""
    g = torch.Generator().manual_seed(0)
    direction = torch.randn(5, 9, generator=g)
    x = (F.normalize(direction) * length).requires_grad_()
    y = torch.randn(7, 9, generator=g)
    u = scores(x, y, backend=backend)
    exact = x.detach().double().requires_grad_()
    truth = scores(exact, y.double(), backend="reference")
    torch.testing.assert_close(u.double(), truth, rtol=0, atol=1e-6)
    weights = torch.randn(5, 7, generator=g)
    (grad,) = torch.autograd.grad(u, x, weights)
    (expected,) = torch.autograd.grad(truth, exact, weights.double())
    torch.testing.assert_close(grad.double() * length, expected * length, rtol=1e-5, atol=1e-5)


@on_every_backend
@pytest.mark.parametrize("length", [1e-300, 1e-160, 1e160, 1e300])
def test_cosines_of_float64_vectors_of_any_length(length, backend, device_for):
    """Squares of these lengths leave float64's range, too."""
    device_for("scores", backend)
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 9, generator=g, dtype=torch.float64) for n in (5, 7))
    long = (x * length).requires_grad_()
    u = scores(long, y, backend=backend)
    expected = scores(x.requires_grad_(), y, backend="reference")
    torch.testing.assert_close(u, expected, rtol=0, atol=1e-14)
    weights = torch.randn(5, 7, generator=g, dtype=torch.float64)
    (grad,) = torch.autograd.grad(u, long, weights)
    torch.testing.assert_close(grad * length, torch.autograd.grad(expected, x, weights)[0], rtol=1e-12, atol=1e-13)


@on_every_backend
@pytest.mark.interpreted
def test_vectors_of_subnormal_numbers_count_as_zero(backend, device_for):
    device_for("scores", backend)
    x = torch.full((2, 4), 1e-41, requires_grad=True)
    u = scores(x, torch.ones(3, 4), backend=backend)
    assert not u.any()
    assert not torch.autograd.grad(u.sum(), x)[0].any()


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.interpreted
def test_no_distance_is_negative(backend, dtype, device_for):
    device_for("scores", backend)
    x = (5 + torch.randn(60, 33)).to(dtype)
    u = scores(x, x, similarity=EUCLIDEAN, backend=backend)
    assert (u <= 0).all()


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_are_rounded_to_the_nearest_number_of_16_bits(backend, dtype, device_for):
    """A product of 1 and a scale is any float32: between two neighbours, half-way, subnormal, too large."""
    device_for("scores", backend)
    every = torch.arange(1, 2**15).to(torch.int16).view(dtype).float()
    finite = every[every.isfinite()]
    halfway = finite[1:] / 2 + finite[:-1] / 2  # exact in float32
    scale = torch.cat([halfway, halfway.nextafter(finite[1:]), halfway.nextafter(finite[:-1]), halfway * 1.0001])
    scale = torch.cat([scale, torch.tensor([65519.0, 65520.0, 65521.0, 3.38e38, 3.4e38])])
    x = torch.ones(scale.shape[0], 1, dtype=dtype)
    for sign in (1, -1):
        z = scores(x, sign * torch.ones(1, 1, dtype=dtype), scale=scale, similarity="dot", backend=backend)[:, 0]
        assert torch.equal(z, (sign * scale).to(dtype))


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_16_bits_is_read_and_written(backend, dtype):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    z = scores(every[:, None], torch.ones(1, 1, dtype=dtype), similarity="dot", backend=backend)
    torch.testing.assert_close(z[:, 0], every, rtol=0, atol=0, equal_nan=True)


@on_every_backend
@pytest.mark.parametrize("similarity", Similarity.names())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.interpreted
def test_not_a_number_stays_in_its_row(backend, dtype, similarity):
    x, y = torch.randn(5, 6).to(dtype), torch.randn(7, 6).to(dtype)
    x[2, 3] = torch.nan
    rows = scores(x, y, similarity=similarity, backend=backend).isnan().any(1)
    assert rows.tolist() == [False, False, True, False, False]


@on_every_kernel
@pytest.mark.interpreted
def test_half_precision_whose_squares_overflow(backend, device_for):
    """|x|^2 of 96 numbers near 300 is 8.6e6, and |x - y|^2 1.2e5: above float16's 65504."""
    inputs = OP.CASES[0].make(torch.Generator().manual_seed(0))
    inputs |= {n: 300 + 25 * torch.randn(inputs[n].shape[0], 96).double() for n in ("x", "y")}
    assert cases.disagreements(OP, inputs, backend, torch.float16, device=device_for("scores", backend)) == []


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.interpreted
def test_a_value_that_is_not_a_number_is_alone_in_the_gradient(backend, dtype, device_for):
    device_for("scores", backend)
    x, y = torch.randn(6, 4).to(dtype), torch.randn(5, 4).to(dtype).requires_grad_()
    x[1, 3] = torch.nan
    (grad,) = torch.autograd.grad(scores(x, y, similarity="dot", backend=backend).sum(), y)
    assert grad.isnan().all(0).tolist() == [False, False, False, True]
    assert not grad[:, :3].isnan().any()


@on_every_backend
@pytest.mark.interpreted
def test_second_derivative_at_a_distance_of_zero(backend, device_for):
    device_for("scores", backend)
    x = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    distances = -scores(x, x.detach(), similarity="negative_squared_euclidean", backend=backend).diagonal()
    (first,) = torch.autograd.grad(distances.sum(), x, create_graph=True)
    torch.testing.assert_close(first, torch.zeros_like(x), rtol=0, atol=1e-13)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, torch.full_like(x, 2.0))


@pytest.mark.parametrize("backend", [b for b in backends("scores", reference=False) if b != "cpu"])  # gigabytes
def test_more_scores_than_32_bits_count(backend, device_for):
    device, side = device_for("scores", backend), 46_400  # its square is more than 2^31
    picked = torch.tensor([0, 7, side // 2, side - 2, side - 1], device=device)
    x, y = (torch.randn(side, 2, generator=torch.Generator().manual_seed(s)).to(device).half() for s in (0, 1))
    x, y = x.requires_grad_(), y.requires_grad_()
    incoming = torch.zeros(side, device=device).index_fill_(0, picked, 1.0).half()
    z = scores(x, y, similarity="dot", backend=backend)
    grads = torch.autograd.grad(z, (x, y), incoming[:, None].expand_as(z))
    few, all_columns = x.detach()[picked].double().requires_grad_(), y.detach().double().requires_grad_()
    expected = few @ all_columns.T
    of_few, of_columns = torch.autograd.grad(expected.sum(), (few, all_columns))
    torch.testing.assert_close(z[picked].double(), expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(grads[0][picked].double(), of_few, rtol=1e-2, atol=1.0)
    torch.testing.assert_close(grads[1].double(), of_columns, rtol=1e-2, atol=1e-2)


@on_every_kernel
@settings(max_examples=75)
@given(inputs=matrices(), dtype=st.sampled_from([torch.float64, torch.float32]), data=st.data())
def test_what_is_drawn_agrees(inputs, dtype, backend, data):
    rows, columns = inputs["x"].shape[0], inputs["y"].shape[0]
    inputs |= {"target": self_index_of(data.draw, rows, columns), "margin": torch.linspace(-1, 1, rows).double()}
    inputs |= {"scale": torch.tensor(3.0).double(), "bias": torch.ones(columns).double()}
    assert cases.disagreements(OP, inputs, backend, dtype) == []


@on_every_backend
def test_a_column_that_is_not_finite_spoils_no_other(backend):
    x, y = torch.randn(3, 2).double(), torch.randn(5, 2).double()
    expected = scores(x, y, similarity=EUCLIDEAN, backend="reference")
    for bad in (torch.nan, torch.inf):
        y[2, 1] = bad
        u = scores(x, y, similarity=EUCLIDEAN, backend=backend)
        assert not u[:, 2].isfinite().any()
        others = [0, 1, 3, 4]
        torch.testing.assert_close(u[:, others], expected[:, others])


@on_every_kernel
def test_a_number_beyond_the_range_of_the_dtype_is_refused(backend):
    x = torch.eye(3)
    with pytest.raises(ValueError, match=r"^scale: expected a number in the range of torch.float32, got 1e\+300"):
        scores(x, x, scale=1e300, backend=backend)
    assert scores(x.double(), x.double(), scale=1e300, backend=backend).isfinite().all()


@on_cpu
@pytest.mark.parametrize("similarity", ["cosine", EUCLIDEAN])
@pytest.mark.parametrize("needs", ["xy", "x", "y"])
def test_gradients_over_several_chunks_of_columns(similarity, needs, backend):
    """1100 rows have chunks of 256 columns, or more with many threads, but never of 2300; the last ends in a block."""
    generator = torch.Generator().manual_seed(0)
    matrices = {name: torch.randn(n, 5, generator=generator) for name, n in (("x", 1100), ("y", 2300))}
    weight = torch.randn(1100, 2300, generator=generator)

    def gradients(dtype, backend):
        inputs = {name: t.to(dtype).requires_grad_(name in needs) for name, t in matrices.items()}
        values = scores(inputs["x"], inputs["y"], similarity=similarity, backend=backend)
        return torch.autograd.grad((values * weight.to(dtype)).sum(), [inputs[name] for name in needs])

    for ours, truth in zip(gradients(torch.float32, backend), gradients(torch.float64, "reference")):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5 * float(truth.abs().max()))
