"""The same bits twice and on any number of threads; with and without a running maximum, the same numbers."""

import math
import threading
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fused_margins.ops import cases, native, registry
from fused_margins.ops.cases import Inputs

BACKENDS = [b.name for b in registry.BACKENDS if b.name != "reference"]  # the reference's bits are torch's business
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def large(op: str, dtype: torch.dtype, similarity: str, columns: int = 2311) -> Inputs:
    """Two chunks of columns, and work for 13 threads: csrc/common/threads.h gives one to every 5e5 multiply-adds."""
    g = torch.Generator().manual_seed(0)
    if op == "magnet":
        x = torch.randn(768, 512, generator=g, dtype=torch.float64)
        clusters = {"clusters": torch.arange(768) % 12, "cluster_labels": torch.arange(12) % 4}
        return cases.convert({"x": x, **clusters, "alpha": 3.0}, dtype)
    x, y = (torch.randn(rows, 41, generator=g, dtype=torch.float64) for rows in (67, columns))
    target = torch.randint(columns, (67,), generator=g)
    inputs = {"x": x, "y": y, "similarity": similarity}
    if op == "nearest":
        labels = {"row_labels": target % 2, "column_labels": torch.arange(columns) % 2}
        return cases.convert(inputs | labels | {"k": 3}, dtype)
    if op == "draw":
        labels = {"row_labels": target % 2, "column_labels": torch.arange(columns) % 2, "seed": torch.tensor(3)}
        return cases.convert({"x": x, "y": y} | labels, dtype)
    if op == "margin_softmax":
        return cases.convert(inputs | {"target": target, "scale": torch.tensor(4.0).double(), "margin": -0.1}, dtype)
    inputs |= {
        "target": target,
        "scale": torch.tensor(4.0).double(),
        "bias": torch.randn(columns, generator=g).double(),
    }
    return cases.convert(inputs, dtype)


@pytest.fixture
def threads_afterwards():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.usefixtures("threads_afterwards")
@pytest.mark.parametrize("similarity", ["cosine", "negative_squared_euclidean"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(
    ("op", "backend"), [key for key in product(registry.OPS, BACKENDS) if registry._HAS_KERNEL[key]]
)
def test_same_bits(op, backend, dtype, similarity, device_for):
    device = device_for(op, backend)
    columns = 1021 if backend == "cuda" else 2311  # it takes up to 1024
    inputs = cases.convert(large(op, dtype, similarity, columns), dtype, device)
    torch.set_num_threads(1)
    first = cases.evaluate(cases.load(op), inputs, backend)
    assert_same_bits(cases.evaluate(cases.load(op), inputs, backend), first)
    for threads in (2, 7):
        torch.set_num_threads(threads)
        assert_same_bits(cases.evaluate(cases.load(op), inputs, backend), first)


@pytest.mark.usefixtures("threads_afterwards")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("columns", [20, 64, 191, 200, 250, 400])
def test_same_bits_of_few_columns(columns, dtype, device_for):
    """The cpu backend's tasks then depend on the threads, and weights come in blocks of 192 columns."""
    device_for("margin_softmax", "cpu")
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(300, 128, generator=g), torch.randn(columns, 128, generator=g)
    inputs = {"x": x, "y": y, "target": torch.randint(columns, (300,), generator=g), "scale": torch.tensor(4.0)}
    inputs, op = cases.convert(inputs, dtype), cases.load("margin_softmax")
    torch.set_num_threads(1)
    first = cases.evaluate(op, inputs, "cpu")
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        assert_same_bits(cases.evaluate(op, inputs, "cpu"), first)


@pytest.mark.usefixtures("threads_afterwards")
def test_the_kernels_do_use_several_threads(device_for):
    """Otherwise the test above would compare one thread with one thread."""
    device_for("contrast", "cpu")
    tasks = Path("/proc/self/task")
    if not tasks.exists():
        pytest.skip("no /proc to count threads in")
    inputs = large("contrast", torch.float32, "cosine")
    inputs |= {"x": inputs["x"].repeat(4, 1), "target": inputs["target"].repeat(4)}  # work for 50 threads
    torch.set_num_threads(40)
    cases.load("contrast").run(inputs, "cpu")
    assert len(list(tasks.iterdir())) >= 40


@pytest.mark.usefixtures("threads_afterwards")
def test_a_thread_of_python_obeys_set_num_threads(device_for):
    """OpenMP keeps the number of threads for each thread of Python, and torch sets it in a new one only when asked."""
    device_for("contrast", "cpu")
    counts = []
    inputs = large("contrast", torch.float32, "cosine")  # made here: torch's own work would set the number, too

    def run() -> None:
        cases.load("contrast").run(inputs, "cpu")
        counts.append(native.module.max_threads())

    for threads in (1, 3):
        torch.set_num_threads(threads)
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert counts == [1, 3]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("scale", [1.0, 16.0, 64.0, 82.0])
@pytest.mark.parametrize("name", ["softmax", "poles", "pointing-away", "some-ignored", "zero-rows", "one-class"])
def test_with_and_without_a_running_maximum(name, scale, dtype, device_for):
    """Up to about scale + ln N = 86 both apply."""
    device_for("contrast", "cpu")
    kernel = registry.kernel("contrast", "cpu")
    case = next(c for c in cases.load("contrast").CASES if c.name == name)
    inputs = cases.convert(case.make(torch.Generator().manual_seed(0)) | {"scale": scale}, dtype)
    labels = [inputs.get(n) for n in ("target", "row_labels", "column_labels", "self_index")]
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    args = (inputs["x"], inputs["y"], torch.tensor(scale, dtype=accumulator), None, *labels)
    options = ("cosine", inputs.get("relation", "different"), inputs.get("ignore_index", -1), False, 0)
    positive, plain, *_ = kernel.forward(*args, *options)
    same_positive, shifted, *_ = kernel.forward(*args, *options, force_running_maximum=True)
    assert torch.equal(positive, same_positive)
    assert torch.equal(plain == -torch.inf, shifted == -torch.inf)
    # Relative errors of the sums, a few units each and more where logits are large, are absolute errors of logarithms.
    error = 8 * torch.finfo(accumulator).eps * (1 + scale)
    torch.testing.assert_close(plain, shifted, rtol=0, atol=error)


def test_the_running_maximum_starts_where_it_must(device_for):
    """Just below the limit nothing overflows; just above it the sum without a maximum would."""
    device_for("contrast", "cpu")
    op = cases.load("contrast")
    columns = 1000
    x, y = torch.ones(2, 8), torch.ones(columns, 8)
    for scale in (86 - math.log(columns) - 0.1, 86 - math.log(columns) + 0.1, 88.0, 512.0):
        inputs = {"x": x, "y": y, "target": torch.tensor([0, 5]), "scale": scale}
        lse = op.run(inputs, "cpu")["negative_lse"]
        torch.testing.assert_close(lse, torch.full((2,), scale + math.log(columns - 1)), rtol=1e-6, atol=0)
