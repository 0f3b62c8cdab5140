"""Rows brought to a length of 1, as theirs are."""

import pytest
import torch
from pytorch_metric_learning import distances

from fused_margins.compat.pytorch_metric_learning.rows import both_rows, rows_of

ROWS = torch.tensor([[3.0, 4.0], [1e-13, -1e-14], [0.0, 0.0], [-1e-3, 2.0]], dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_rows_and_their_gradients_are_theirs(dtype, autocast):
    of_both = []
    for unit in (lambda x: rows_of(distances.LpDistance(), x), torch.nn.functional.normalize):
        x = ROWS.to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            u = unit(x)
        (gradient,) = torch.autograd.grad((u * torch.arange(8).view(4, 2)).sum(), x)
        of_both.append((u, gradient))
    for got, want in zip(*of_both):
        torch.testing.assert_close(got / want.abs().amax(1, True), want / want.abs().amax(1, True), equal_nan=True)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, in forward mode
def test_rows_are_differentiable_twice_and_forward():
    x = ROWS[[0, 3]].clone().requires_grad_()
    unit = lambda x: rows_of(distances.CosineSimilarity(), x)  # noqa: E731
    assert torch.autograd.gradcheck(unit, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(unit, x)


def test_other_rows_are_left_to_the_distance():
    for distance in (distances.LpDistance(normalize_embeddings=False), distances.LpDistance(p=1)):
        assert torch.equal(rows_of(distance, ROWS), distance.maybe_normalize(ROWS))
    x, y = both_rows(distances.LpDistance(), ROWS, ROWS)
    assert x is y
