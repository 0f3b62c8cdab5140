"""Autocast narrows the two matrices as it does for a matrix product, and nothing else."""

import pytest
import torch

from fused_margins.backends import registry
from fused_margins.ops import cases
from fused_margins.ops.cases import Inputs
from fused_margins.ops.fields import Embeddings
from tests.ops.suite.problems import DIFFERENTIABLE, OPS, device_of, make, pairs, richest

PAIRS = pairs()


def inputs_of(op: str, backend: str, dtype: torch.dtype) -> Inputs:
    case = richest(op, backend) if op in DIFFERENTIABLE else OPS[op].CASES[0]
    return make(case, dtype, device_of(backend))


def matrices(op: str) -> list[str]:
    return [n for n, f in registry.OPS[op].fields.items() if isinstance(f, Embeddings)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("op", "backend"), PAIRS)
def test_autocast_is_the_narrow_op(op, narrow, backend):
    inputs = inputs_of(op, backend, torch.float32)
    with torch.autocast(device_of(backend), dtype=narrow):
        got = cases.evaluate(OPS[op], inputs, backend)
    narrowed = inputs | {n: inputs[n].to(narrow) for n in matrices(op)}
    expected = cases.evaluate(OPS[op], narrowed, backend)
    assert got.keys() == expected.keys()
    for name, value in got.items():
        if name.removeprefix("grad_") in matrices(op):
            assert value.dtype == torch.float32  # that of the tensor that was given
        else:
            assert value.dtype == expected[name].dtype
        # Gradients of a tensor that is used twice may be added before or after they are rounded.
        error = 4 * torch.finfo(narrow).eps * cases.largest(expected[name]) if name.startswith("grad") else 0.0
        torch.testing.assert_close(value, expected[name].to(value), rtol=0, atol=error)


@pytest.mark.parametrize(("op", "backend"), PAIRS)
def test_float64_is_left_alone(op, backend):
    inputs = inputs_of(op, backend, torch.float64)
    expected = cases.evaluate(OPS[op], inputs, backend)
    with torch.autocast(device_of(backend), dtype=torch.bfloat16):
        got = cases.evaluate(OPS[op], inputs, backend)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize(("op", "backend"), pairs(DIFFERENTIABLE))
def test_second_derivatives_under_autocast(op, backend):
    inputs = inputs_of(op, backend, torch.float32)

    def second() -> torch.Tensor:
        x = inputs["x"].detach().requires_grad_()
        outputs = OPS[op].run(inputs | {"x": x}, backend).values()
        value = sum(t.where(t.isfinite(), 0.0).float().square().sum() for t in outputs)
        (first,) = torch.autograd.grad(value, x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    expected = second()
    with torch.autocast(device_of(backend), dtype=torch.bfloat16):
        got = second()
    assert got.dtype == torch.float32
    # Two gradients in bfloat16, each rounded to 8 bits.
    torch.testing.assert_close(got, expected, rtol=0.1, atol=0.1 * cases.largest(expected))
