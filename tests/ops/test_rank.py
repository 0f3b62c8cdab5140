"""The nearest column by Euclidean distance on a GPU: found by products, where those can tell, else by the distances."""

import pytest
import torch

from fused_margins.ops.nearest import nearest


def found(x, y, dtype, device_for):
    device = device_for("nearest", "triton")
    labels = [torch.zeros(len(t), dtype=torch.int64, device=device) for t in (x, y)]
    options = {"similarity": "negative_squared_euclidean", "relation": "any"}
    x, y = (t.to(device, dtype) for t in (x, y))
    return [nearest(x, y, *labels, **options, backend=backend) for backend in ("triton", "reference")]


def assert_same(results):
    (similarity, index), (expected, expected_index) = results
    assert torch.equal(index, expected_index)
    torch.testing.assert_close(similarity, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([[1e20]], [[1e20], [0.0]]),  # squares overflow
        ([[1e19]], [[2e19], [-1e18]]),
        ([[1e-25]], [[3e-25], [1e-25]]),  # or vanish
        ([[1.0]], [[torch.nan], [5.0]]),
        ([[1.0]], [[torch.inf], [5.0]]),
        ([[torch.nan]], [[1.0], [5.0]]),
    ],
)
def test_numbers_that_squares_leave(x, y, dtype, device_for):
    assert_same(found(torch.tensor(x), torch.tensor(y), dtype, device_for))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_distances_go_to_the_lowest_column(dtype, device_for):
    x, y = torch.full((1, 8), 100.0), torch.zeros(3, 8)
    y[1, 0], y[2, 0] = 1e-6, 2e-6  # nearer, but not in these dtypes
    assert_same(found(x, y, dtype, device_for))
    g = torch.Generator().manual_seed(0)
    y = torch.randn(130, 24, generator=g)
    assert_same(found(y[100:] + 1, torch.cat([y, y]), dtype, device_for))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [24, 136])
def test_far_from_the_origin(width, dtype, device_for):
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, width, generator=g) + 100 for n in (9, 130))
    (similarity, index), (expected, _) = found(x, y, dtype, device_for)
    torch.testing.assert_close(similarity, expected)
    assert (index >= 0).all()
