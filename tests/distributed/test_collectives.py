"""Each exchange against one process that has every rank's rows, forward, backward and twice backward."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_margins.distributed import collectives as c
from fused_margins.distributed.collectives import combine, gather_rows, own_rows, replicate_rows, share, sum_over_ranks

from . import ranks

COUNTS = [(2, 2, 2), (3, 0, 1), (0, 0, 2), (0, 0, 0)]


def parts(counts: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    draws = torch.Generator().manual_seed(1)
    return [torch.randn(n, 3, dtype=dtype, generator=draws).requires_grad_() for n in counts]


def weight_of(rank: int, x: Tensor) -> Tensor:
    """What a rank multiplies by, different on each."""
    return torch.linspace(-1, 1, x.numel(), dtype=x.dtype).reshape(x.shape) + rank


def with_gradients(value: Tensor, x: Tensor) -> list[Tensor]:
    """The value, its gradient, and that of the gradient's square."""
    (grad,) = torch.autograd.grad(value, x, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), x)
    return [value.detach(), grad.detach(), second]


def gathered(rank: int, counts: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    x = parts(counts, dtype)[rank]
    every = gather_rows(x, c.row_counts(len(x), x.device))
    return with_gradients(sum_over_ranks((weight_of(rank, every) * every**3).sum()), x)


def replicated(rank: int, counts: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    x = parts(counts, dtype)[rank]
    every = replicate_rows(x, counts)
    return with_gradients((weight_of(0, every) * every**3).sum(), x)


def returned(rank: int, counts: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    x = parts(counts, dtype)[rank]
    mine = own_rows(replicate_rows(x, counts) ** 3, counts)
    return with_gradients(sum_over_ranks((weight_of(rank, mine) * mine).sum()), x)


def shared(rank: int, counts: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    x = parts((2,), dtype)[0]  # the same on all ranks
    return with_gradients(sum_over_ranks((weight_of(rank, x) * share(x) ** 3).sum()), x)


def in_one_process(function: Callable[..., Any], counts: tuple[int, ...], dtype: torch.dtype) -> list[list[Tensor]]:
    own = parts(counts, dtype)
    if function is shared:
        x = parts((2,), dtype)[0]
        return [with_gradients(sum((weight_of(r, x) * x**3).sum() for r in range(len(counts))), x)] * len(counts)
    if function is returned:
        value = sum((weight_of(r, x) * x**3).sum() for r, x in enumerate(own))
    else:
        every = torch.cat(own)
        value = sum((weight_of(r, every) * every**3).sum() for r in range(len(own) if function is gathered else 1))
    return [with_gradients(value, x) for x in own]


def all_cases(rank: int, dtype: torch.dtype) -> list[list[Tensor]]:
    return [f(rank, counts, dtype) for f, counts in itertools.product(FUNCTIONS, COUNTS)]


FUNCTIONS = [gathered, replicated, returned, shared]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_values_and_gradients_are_those_of_one_process(dtype: torch.dtype, tmp_path: Path) -> None:
    found = ranks.run(all_cases, 3, tmp_path, dtype)
    for i, (function, counts) in enumerate(itertools.product(FUNCTIONS, COUNTS)):
        for rank, expected in enumerate(in_one_process(function, counts, dtype)):
            for name, got, want in zip(("value", "gradient", "second"), found[rank][i], expected):
                torch.testing.assert_close(
                    got, want, msg=lambda text, f=function, n=name, k=counts: f"{n} of {f.__name__} {k}: {text}"
                )


def combined(rank: int, shape: str) -> list[Tensor]:
    lse, other = columns(shape)
    lse, other = lse[rank].clone().requires_grad_(), other[rank].clone().requires_grad_()
    return first_and_second(*combine(lse, other), lse, other)


def first_and_second(total: Tensor, summed: Tensor, lse: Tensor, other: Tensor) -> list[Tensor]:
    finite = torch.where(total == -torch.inf, 0.0, total)
    grads = torch.autograd.grad((finite.sin() * summed).sum(), (lse, other), create_graph=True)
    return [total.detach(), summed.detach(), *(g.detach() for g in grads)]


def columns(shape: str) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(2)
    lse, other = (torch.randn(3, 5, dtype=torch.float64, generator=draws) * 3 for _ in range(2))
    if shape == "empty":
        lse[:, 1], lse[0, 2], lse[1:, 3] = -torch.inf, -torch.inf, -torch.inf
    if shape == "far":
        lse[0] += 5000.0
    return lse, other


def combinations(rank: int) -> list[list[Tensor]]:
    return [combined(rank, shape) for shape in SHAPES]


SHAPES = ["plain", "empty", "far"]


def test_log_sum_exps_combine_as_one(tmp_path: Path) -> None:
    found = ranks.run(combinations, 3, tmp_path)
    for i, shape in enumerate(SHAPES):
        lse, other = (t.requires_grad_() for t in columns(shape))
        empty = (lse == -torch.inf).all(0)
        # A column that nobody has takes no gradient with it.
        total = torch.where(empty, -torch.inf, torch.logsumexp(torch.where(empty, 0.0, lse), 0))
        *values, grad_lse, grad_other = first_and_second(total, other.sum(0), lse, other)
        for rank in range(3):
            for got, want in zip(found[rank][i], [*values, grad_lse[rank], grad_other[rank]]):
                torch.testing.assert_close(got, want, msg=lambda text, s=shape: f"{s}: {text}")


def test_counts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="counts: expected one of each of 1 ranks, got 2"):
        gather_rows(torch.ones(2, 3), [2, 0])
    with pytest.raises(ValueError, match="x: expected the 3 rows that counts says of rank 0, got 2"):
        gather_rows(torch.ones(2, 3), [3])
    with pytest.raises(ValueError, match="x: expected 3 rows, of all ranks together, got 2"):
        own_rows(torch.ones(2, 3), [3])


def failing(rank: int, how: str) -> None:
    if how == "raises" and rank == 1:
        raise RuntimeError("on purpose")
    if how == "dies" and rank == 1:
        import os

        os._exit(1)
    c.row_counts(1, torch.device("cpu"))


@pytest.mark.parametrize(("how", "text"), [("raises", "on purpose"), ("dies", "rank 1: died")])
def test_a_rank_that_fails_fails_the_test(how: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=text):
        ranks.run(failing, 2, tmp_path, how)
