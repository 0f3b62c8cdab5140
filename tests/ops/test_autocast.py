"""Autocast narrows the two matrices as it does for a matrix product, and nothing else."""

import pytest
import torch

from fused_margins.ops import cases, registry
from fused_margins.ops.cases import Inputs

BACKENDS = [b.name for b in registry.BACKENDS]
NAMES = {
    "magnet": "batch-mean",
    "contrast": "scale-rows",
    "draw": "different",
    "margin_softmax": "scale-rows",
    "nearest": "cosine-same",
    "scores": "learnable-cosine",
}


def inputs_of(op: str, dtype: torch.dtype) -> Inputs:
    case = next(c for c in cases.load(op).CASES if c.name == NAMES[op])
    return cases.convert(case.make(torch.Generator().manual_seed(0)), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", registry.OPS)
def test_autocast_is_the_narrow_op(op, narrow, backend, device_for):
    device_for(op, backend)
    inputs = inputs_of(op, torch.float32)
    with torch.autocast("cpu", dtype=narrow):
        got = cases.evaluate(cases.load(op), inputs, backend)
    narrowed = inputs | {n: inputs[n].to(narrow) for n in ("x", "y") if n in inputs}
    expected = cases.evaluate(cases.load(op), narrowed, backend)
    assert got.keys() == expected.keys()
    for name, value in got.items():
        if name in ("grad_x", "grad_y"):
            assert value.dtype == torch.float32  # that of the tensor that was given
        else:
            assert value.dtype == expected[name].dtype
        # Gradients of a tensor that is used twice may be added before or after they are rounded.
        error = 4 * torch.finfo(narrow).eps * cases.largest(expected[name]) if name.startswith("grad") else 0.0
        torch.testing.assert_close(value, expected[name].to(value), rtol=0, atol=error)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", registry.OPS)
def test_float64_is_left_alone(op, backend, device_for):
    device_for(op, backend)
    inputs = inputs_of(op, torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = cases.evaluate(cases.load(op), inputs, backend)
    for name, value in cases.evaluate(cases.load(op), inputs, backend).items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives_under_autocast(backend, device_for):
    device_for("scores", backend)
    inputs = inputs_of("scores", torch.float32)

    def second() -> torch.Tensor:
        x = inputs["x"].detach().requires_grad_()
        z = cases.load("scores").run(inputs | {"x": x}, backend)["scores"]
        (first,) = torch.autograd.grad(z.float().square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    expected = second()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = second()
    assert got.dtype == torch.float32
    # Two gradients in bfloat16, each rounded to 8 bits.
    torch.testing.assert_close(got, expected, rtol=0.1, atol=0.1 * cases.largest(expected))
