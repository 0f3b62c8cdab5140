"""The plan of a step: memory by hand, what a forward saves as the kernel says it, and sizes that are none."""

import dataclasses

import pytest
import torch

from fused_margins.backends import registry
from fused_margins.distributed.plan import DEVICES, main, plan
from fused_margins.ops.contrast import contrast

CPU = dataclasses.replace(DEVICES["h200"], ranks_of_node=0, dtype=torch.float32)


@pytest.mark.parametrize(("optimizer", "kept"), [("sgd", 1), ("adamw", 2)])
def test_memory_of_a_rank(optimizer, kept):
    whole = plan(1000, 8, 3, 5, CPU, optimizer=optimizer)
    assert (whole.classes, whole.rows) == (334, 334)
    assert sum(whole.memory.values()) - whole.memory["saved by the forward"] == 4 * 334 * 8 * (2 + kept) + 15 * 8 * 12
    sampled = plan(1000, 8, 3, 5, CPU, rate=0.1, optimizer=optimizer)
    assert sampled.rows == 34 + 5  # a tenth of 334, and a third of the positives of 15 rows
    assert sampled.memory["sampled rows, their gradient and state"] == 4 * 39 * 8 * (2 + kept)
    assert "gradient of the weight" not in sampled.memory


def test_what_a_forward_saves_is_what_the_kernel_saves(device_for):
    device_for("contrast", "cpu")
    x, y, target = torch.randn(15, 8), torch.randn(334, 8), torch.arange(15)
    kernel = registry.kernel("contrast", "cpu")
    a = contrast.checked(contrast.arguments(x, y, target, scale=30.0))
    saved = kernel.forward(a, kernel.plan(a, (True, True, False, False, False)))[-1]
    assert plan(1000, 8, 3, 5, CPU).memory["saved by the forward"] == saved.nbytes


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ranks": 0}, "ranks: expected at least 1, got 0"),
        ({"batch": 1.5}, "batch: expected an integer, got 1.5"),
        ({"rate": 0}, r"rate: expected a number in \(0, 1\], got 0"),
        ({"optimizer": "lion"}, "optimizer: expected one of 'sgd', 'adamw', got 'lion'"),
    ],
)
def test_sizes_that_are_none(changed, message):
    sizes = {"num_classes": 1000, "embedding_size": 8, "ranks": 3, "batch": 5, "device": CPU}
    with pytest.raises((TypeError, ValueError), match=message):
        plan(**(sizes | changed))


def test_what_does_not_fit_is_said_with_a_way_out(capsys):
    assert main(["--classes", "1000000000", "--ranks", "4"]) == 1
    assert "It does not fit: " in capsys.readouterr().out
    assert main(["--classes", "1000", "--ranks", "0"]) == 2
    assert capsys.readouterr().err == "error: ranks: expected at least 1, got 0\n"
