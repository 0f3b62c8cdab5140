"""The plan of a step: memory by hand, what a forward saves as the kernel says it, and sizes that are none."""

import dataclasses
import itertools
from functools import partial
from pathlib import Path

import pytest
import torch

from fused_margins.backends import registry
from fused_margins.distributed import ShardedMarginSoftmaxLoss
from fused_margins.distributed.plan import DEVICES, main, plan
from fused_margins.ops.contrast import contrast

from . import ranks

CPU = dataclasses.replace(DEVICES["h200"], ranks_of_node=0, dtype=torch.float32)


@pytest.mark.parametrize(("optimizer", "kept"), [("sgd", 1), ("adamw", 2)])
def test_memory_of_a_rank(optimizer, kept):
    whole = plan(1000, 8, 3, 5, CPU, optimizer=optimizer)
    assert (whole.classes, whole.rows) == (334, 334)
    made = 2 * (optimizer == "adamw")
    held = whole.memory["saved by the forward"]
    assert sum(whole.memory.values()) - held == 4 * 334 * 8 * (2 + kept + made) + 15 * 8 * 12
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


def grown(rank: int, optimizer: str, rate: float) -> int:
    """Bytes that a process takes at most for two steps, beyond what it had before."""
    loss_and_steps(8, 4, optimizer, rate, 2)  # whatever the first calls load
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    loss_and_steps(CLASSES, WIDTH, optimizer, rate, ROWS)
    return memory("VmHWM") - before


def loss_and_steps(classes: int, width: int, optimizer: str, rate: float, rows: int) -> None:
    loss = ShardedMarginSoftmaxLoss(classes, width, sample_rate=rate)
    steps = {"sgd": partial(torch.optim.SGD, momentum=0.9), "adamw": torch.optim.AdamW}[optimizer](
        loss.parameters(), 0.1
    )
    loss.attach(steps)
    x, labels = torch.randn(rows, width, requires_grad=True), torch.randint(classes, (rows,))
    for _ in range(2):
        steps.zero_grad()
        loss(x, labels).backward()
        steps.step()


def memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


CLASSES, WIDTH, ROWS = 40_000, 256, 16


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is Linux's")
def test_the_peak_of_a_process_is_the_planned_one_and_shrinks_with_the_rate(tmp_path, device_for):
    device_for("contrast", "cpu")
    planned, found = {}, {}
    for case in itertools.product(("sgd", "adamw"), (1.0, 0.1)):
        planned[case] = plan(CLASSES, WIDTH, 1, ROWS, CPU, rate=case[1], optimizer=case[0]).peak
        (found[case],) = ranks.run(grown, 1, tmp_path, *case)
    assert planned == pytest.approx(found, rel=0.1)
    for optimizer, least in (("sgd", 1.2), ("adamw", 1.5)):
        assert found[optimizer, 1.0] > least * found[optimizer, 0.1], optimizer


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([1_000_000, 8, 4_000_000], "It would with --batch 2000000."),
        ([1_000_000_000, 4, 128], "It would with --ranks 64."),
        ([100_000_000, 4, 128], "It would with --rate 0.05, or with --ranks 8."),
        ([40_000_000, 1, 20_000_000, "--rate", "0.1"], "It would with --"),
        ([10**12, 1, 10**9], "No rate, ranks and batch make it: narrower vectors."),
    ],
)
def test_what_does_not_fit_is_said_with_ways_that_do(arguments, said, capsys):
    classes, ranks, batch, *more = map(str, arguments)
    asked = ["--classes", classes, "--ranks", ranks, "--batch", batch, *more]
    assert main(asked) == 1
    out = capsys.readouterr().out
    assert "which are 80% of 141.0 GB. " in out
    assert said in out
    if "It would with" not in out:
        return
    for way in out.split("It would with ")[1].strip().rstrip(".").split(", or with "):
        assert main([*asked, *way.split()]) == 0, way
        assert "It fits: " in capsys.readouterr().out


@pytest.mark.parametrize("device", ["h200", "cpu"])
def test_sizes_are_checked_before_anything_is_measured(device, capsys):
    assert main(["--classes", "1000", "--ranks", "0", "--device", device]) == 2
    assert capsys.readouterr().err == "error: ranks: expected at least 1, got 0\n"
    assert main(["--classes", "1000", "--batch", "-1", "--device", device]) == 2
    assert capsys.readouterr().err == "error: batch: expected at least 1, got -1\n"


def test_without_the_kernels_a_step_takes_more():
    of_rank = plan(100_000, 512, 1, 1024, DEVICES["h200"])
    assert of_rank.without == 2 * 4 * 1024 * 100_000
    assert of_rank.seconds_without > 1.5 * sum(of_rank.seconds.values())
