"""The CUDA kernels without a GPU: ``cuda_on_cpu.h`` runs the same sources thread by thread (``make cuda-on-cpu``)."""

import importlib
import importlib.util
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fused_margins.backends import cuda, epoch, registry
from fused_margins.backends.cpu import DTYPES as TORCH_DTYPES
from fused_margins.core.indices import ABSENT, UNADMITTED
from fused_margins.ops import cases
from fused_margins.ops.cases import Inputs
from fused_margins.ops.contrast import contrast
from fused_margins.ops.magnet import magnet
from fused_margins.ops.nearest import nearest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(ROOT.glob("csrc/*/cuda.cu"))
EUCLIDEAN = "negative_squared_euclidean"
margin_softmax = partial(contrast, epilogue="margin_softmax")

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """`_CUDA` made by a C++ compiler, on tensors of the CPU."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    pybind11 = pytest.importorskip("pybind11")
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    dry = subprocess.run(["nvcc", "--dryrun", "-c", str(SOURCES[0])], capture_output=True, text=True, cwd=folder).stderr
    found = re.findall(r"(?:-I|-isystem )\"?([^\s\"]*include)\b", dry)
    top = re.search(r"^#\$ TOP=(.*)$", dry, re.MULTILINE)
    includes = [p for p in [*found, *([f"{top[1]}/include"] if top else [])] if (Path(p) / "cuda_runtime.h").exists()]
    if not includes:
        pytest.skip("the headers of CUDA are not where nvcc says")
    flags = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-ffp-contract=off", "-w"]
    flags += [f"-isystem{p}" for p in (includes[0], pybind11.get_include(), sysconfig.get_path("include"))]
    shim = ["-O2", "-include", str(ROOT / "tests/native/cuda_on_cpu.h"), "-x", "c++"]
    jobs = [(source.parent.name, [*shim, str(source)]) for source in SOURCES]
    jobs.append(("bindings", ["-O1", str(ROOT / "csrc/bindings_cuda.cpp")]))

    def compile_one(job: tuple[str, list[str]]) -> str:
        name, arguments = job
        command = ["g++", *flags, *arguments[:-1], "-c", arguments[-1], "-o", str(folder / f"{name}.o")]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return str(folder / f"{name}.o")

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, jobs))
    library = folder / "_CUDA.so"
    subprocess.run(["g++", "-shared", *objects, "-o", str(library)], check=True)
    spec = importlib.util.spec_from_file_location("_CUDA", library)
    assert spec is not None and spec.loader is not None  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.set_dtypes(*TORCH_DTYPES)
    return module


@pytest.fixture
def on_cpu(emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Backend "cuda" runs on tensors of the CPU, and leaves all its counters at 0."""
    monkeypatch.setattr(cuda, "module", emulated)
    monkeypatch.setattr(cuda, "stream", lambda device: 0)
    monkeypatch.setattr(cuda, "capturing", lambda: False)
    monkeypatch.setattr(cuda, "_of_stream", {})
    monkeypatch.setattr(cuda, "_of_graphs", {})
    monkeypatch.setattr(cuda, "launch", lambda kernel, device, *args: kernel(*args, 0))
    rows = [replace(b, why_not=lambda device: None) if b.name == "cuda" else b for b in registry.BACKENDS]
    monkeypatch.setattr(registry, "BACKENDS", rows)
    epoch.begin()
    yield emulated
    epoch.begin()
    assert not any(counters.any() for held in cuda._of_stream.values() for counters in held)


def make(op: str, name: str) -> Inputs:
    case = next(c for c in cases.load(op).CASES if c.name == name)
    return case.make(torch.Generator().manual_seed(0))


def runs(op: str, inputs: Inputs) -> bool:
    """Whether the CUDA kernels of an op take these inputs."""
    known = registry.OPS[op]
    return registry.kernel(op, "cuda").can_run(known.problem(known.checked(known.arguments(**inputs)))) is None


DTYPES = {op: [torch.float64, torch.float32, torch.bfloat16, torch.float16] for op in ("contrast", "magnet")}
DTYPES["nearest"] = [torch.float32, torch.float16]
PARITY = [
    pytest.param(op, case, dtype, id=f"{op}-{case.name}-{str(dtype).removeprefix('torch.')}")
    for op, dtypes in DTYPES.items()
    for case in cases.load(op).CASES
    if runs(op, case.make(torch.Generator().manual_seed(0)))
    for dtype in dtypes
]


@pytest.mark.parametrize(("op", "case", "dtype"), PARITY)
def test_it_agrees_with_the_definition(op, case, dtype, on_cpu):
    inputs = case.make(torch.Generator().manual_seed(0))
    gradients = bool(cases.load(op).DIFFERENTIABLE)
    assert cases.disagreements(cases.load(op), inputs, "cuda", dtype, exact=case.exact, gradients=gradients) == []


@pytest.mark.parametrize("similarity", ["cosine", "dot", EUCLIDEAN])
@pytest.mark.parametrize("dtype", DTYPES["contrast"], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("rows", "columns", "width"), [(37, 65, 1100), (16, 16, 512), (130, 33, 64), (5, 3, 0)])
def test_contrast_with_vector_loads_and_several_chunks(rows, columns, width, dtype, similarity, on_cpu):
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, width, generator=g, dtype=torch.float64) for n in (rows, columns))
    scale = {"cosine": 16.0, "dot": max(1, width) ** -0.5, EUCLIDEAN: 1 / max(1, width)}[similarity]
    inputs = {"x": x, "y": y, "target": torch.randint(columns, (rows,), generator=g), "similarity": similarity}
    inputs |= {"epilogue": "margin_softmax"}
    inputs |= {"scale": torch.tensor(scale).double(), "margin": torch.rand(rows, generator=g, dtype=torch.float64)}
    assert cases.disagreements(cases.load("contrast"), inputs, "cuda", dtype) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("lengths", [(1e-30, 1.0), (1e30, 1e30), (1e-20, 1e20), (1e37, 1e-37)])
def test_cosines_of_vectors_of_any_length(lengths, dtype, on_cpu):
    g = torch.Generator().manual_seed(0)
    x, y = (length * torch.randn(n, 24, generator=g, dtype=torch.float64) for n, length in zip((18, 20), lengths))
    inputs = {"x": x, "y": y, "target": torch.arange(18), "scale": 8.0, "margin": 0.1}
    inputs |= {"epilogue": "margin_softmax"}
    op = cases.load("contrast")
    rounded = cases.convert(inputs, dtype)
    got = cases.evaluate(op, rounded, "cuda")
    truth = cases.evaluate(op, cases.convert(rounded, torch.float64), "reference")
    torch.testing.assert_close(got["loss"].double(), truth["loss"], rtol=1e-5, atol=0)
    for name, length in zip(("grad_x", "grad_y"), lengths):
        if dtype == torch.float32 and length < 1e35:  # else the gradient is subnormal
            torch.testing.assert_close(got[name].double() * length, truth[name] * length, rtol=1e-3, atol=1e-5)
    labels = {"row_labels": torch.zeros(18).long(), "column_labels": torch.zeros(20).long(), "k": 20}
    given = {k: rounded[k] for k in ("x", "y")} | labels
    similarity = cases.load("nearest").run(given, "cuda")["similarity"]
    expected = cases.load("nearest").run(cases.convert(given, torch.float64), "reference")["similarity"]
    torch.testing.assert_close(similarity.double(), expected, rtol=0, atol=1e-5)


def test_the_infinite_gradient_of_a_loss_of_zero_is_no_gradient(on_cpu):
    x = torch.cat([torch.randn(6, 5), torch.randn(6, 5) + 100]).requires_grad_()
    clusters, labels = torch.arange(4).repeat_interleave(3), torch.tensor([0, 0, 1, 1])
    loss = magnet(x, clusters, labels, alpha=3.0, reduction="none", backend="cuda")
    assert (loss == 0).any()
    (grad,) = torch.autograd.grad(loss.sqrt().sum(), x)
    expected = magnet(x, clusters, labels, alpha=3.0, reduction="none", backend="reference")
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sqrt().sum(), x)[0])


@pytest.mark.parametrize("bad", [-2, 7, 2**40, -(2**63) + 1])
def test_a_target_out_of_range_makes_its_row_nan(bad, on_cpu):
    x, y, target = torch.randn(20, 8), torch.randn(7, 8), torch.arange(20) % 7
    target[3], target[5] = bad, -1
    each = margin_softmax(x, y, target, scale=4.0, reduction="none", backend="cuda")
    assert each.isnan().tolist() == [row == 3 for row in range(20)]
    assert each[5] == 0
    assert margin_softmax(x, y, target, scale=4.0, backend="cuda").isnan()
    clusters = torch.arange(20) % 7
    clusters[3] = bad
    each = magnet(x, clusters, torch.arange(7) % 2, reduction="none", backend="cuda")
    assert each.isnan().tolist() == [row == 3 for row in range(20)]
    own = torch.arange(20) % 7
    own[3] = bad
    given = {
        "x": x,
        "y": y,
        "row_labels": target * 0,
        "column_labels": torch.zeros(7).long(),
        "self_index": own,
        "k": 7,
    }
    similarity = cases.load("nearest").run(given, "cuda")["similarity"]
    assert similarity.isnan().all(1).tolist() == [row == 3 for row in range(20)]


def test_a_scale_that_is_not_positive_makes_its_row_nan(on_cpu):
    scale = torch.ones(20)
    scale[3], scale[4] = 0, -1
    each = margin_softmax(
        torch.randn(20, 8), torch.randn(7, 8), torch.arange(20) % 7, scale=scale, reduction="none", backend="cuda"
    )
    assert each.isnan().tolist() == [row in (3, 4) for row in range(20)]


@pytest.mark.parametrize("k", [1, 31, 32, 33, 128, 129, 300])
def test_lists_of_any_length(k, on_cpu):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(9, 8, generator=g).double(), torch.randn(1100, 8, generator=g).double()
    labels = {"row_labels": torch.arange(9) % 3, "column_labels": torch.arange(1100) % 4, "similarity": EUCLIDEAN}
    assert cases.disagreements(cases.load("nearest"), {"x": x, "y": y, "k": k, **labels}, "cuda", torch.float64) == []


def test_equal_columns_tie_whatever_their_place(on_cpu):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(31, 23, generator=g), torch.randn(1, 23, generator=g).repeat(271, 1)
    for similarity in ("dot", "cosine", EUCLIDEAN):
        given = {
            "x": x,
            "y": y,
            "row_labels": torch.zeros(31).long(),
            "column_labels": torch.zeros(271).long(),
            "k": 10,
        }
        index = cases.load("nearest").run(given | {"similarity": similarity}, "cuda")["index"]
        assert torch.equal(index, torch.arange(10).expand(31, 10))


@pytest.mark.parametrize("similarity", ["cosine", EUCLIDEAN])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
@pytest.mark.parametrize("op", ["contrast", "magnet"])
def test_the_same_bits_whatever_the_order_of_threads_and_blocks(op, dtype, similarity, on_cpu):
    inputs = make(op, "margin_softmax-wide" if op == "contrast" else "wide")
    if op == "contrast":
        inputs |= {"similarity": similarity, "scale": torch.tensor(0.5).double()}
    inputs = cases.convert(inputs, dtype)
    first = cases.evaluate(cases.load(op), inputs, "cuda")
    second = cases.evaluate(cases.load(op), inputs, "cuda")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_gradients_of_some_inputs_only(on_cpu):
    g = torch.Generator().manual_seed(0)
    tensors = {"x": torch.randn(35, 70, generator=g), "y": torch.randn(20, 70, generator=g)}
    tensors |= {"scale": torch.tensor(8.0), "margin": torch.tensor(0.2)}
    target = torch.arange(35) % 20
    for mask in range(1, 16):
        results = []
        for backend in ("cuda", "reference"):
            given = {n: t.clone().requires_grad_(bool(mask >> b & 1)) for b, (n, t) in enumerate(tensors.items())}
            margin_softmax(**given, target=target, backend=backend).backward()
            results.append([given[n].grad for n in given])
        for got, expected in zip(*results):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_grids_and_sizes(emulated):
    assert emulated.contrast_forward_grid(256, 64) == 64
    assert emulated.contrast_forward_grid(1, 0) == 1
    assert emulated.contrast_forward_grid(0, 64) == 0
    assert emulated.contrast_backward_grid(256, 64, 512, True, True) == 8 * 8 + 2 * 8
    assert emulated.contrast_backward_grid(256, 65, 512, False, True) == 3 * 8
    assert emulated.contrast_backward_grid(256, 64, 512, False, False) == 0
    assert emulated.contrast_backward_grid(256, 64, 0, True, True) == 0
    assert emulated.contrast_scratch_size(9, 5) == 9 * 8 + 5 * 16 + 2 * 9 + 2 * 5
    assert emulated.contrast_tickets(256) == 17
    assert emulated.nearest_grid(16) == 1 and emulated.nearest_grid(17) == 2  # noqa: PT018
    assert emulated.contrast_saved_size(9, 5) == 9 * 5 + 3 * 9 + 5 + 1
    assert emulated.magnet_saved_size(9, 5, 20) == 5 * 32 + 9 * 8 + 3


def test_a_target_that_is_elsewhere_counts_for_nothing(on_cpu):
    x, y, target = torch.randn(20, 8, requires_grad=True), torch.randn(7, 8), torch.arange(20) % 7
    target[3], target[5] = ABSENT, -1
    each = margin_softmax(x, y, target, scale=4.0, reduction="none", backend="cuda")
    assert (each == 0).nonzero().flatten().tolist() == [3, 5]
    mean = margin_softmax(x, y, target, scale=4.0, backend="cuda")
    torch.testing.assert_close(mean, each.sum() / 18)
    mean.backward()
    assert (x.grad[[3, 5]] == 0).all()


@pytest.mark.parametrize("k", [1, 3, 20])
@pytest.mark.parametrize("similarity", ["cosine", "dot", EUCLIDEAN])
def test_the_least_similar_and_what_no_relation_admits(similarity, k, on_cpu):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 8, generator=g).double(), torch.randn(90, 8, generator=g).double()
    rows, columns = torch.arange(40) % 3, torch.arange(90) % 4
    rows[::7] = columns[::5] = UNADMITTED
    given = {"x": x, "y": y, "row_labels": rows, "column_labels": columns, "similarity": similarity, "k": k}
    below = torch.full((40,), {"cosine": 0.1, "dot": 1.0, EUCLIDEAN: -9.0}[similarity], dtype=torch.float64)
    for more in ({}, {"largest": False}, {"largest": False, "below": below}):
        (got, index), (expected, chosen) = (nearest(**given, **more, backend=b) for b in ("cuda", "reference"))
        assert torch.equal(index, chosen)
        torch.testing.assert_close(got, expected)
        assert (index[::7] == -1).all()


def test_counters_grow_and_a_capture_gets_its_own(on_cpu, monkeypatch):
    device = torch.device("cpu")
    first = cuda.tickets(device, 10)
    assert first.shape[0] == cuda.COUNTERS and cuda.tickets(device, 20) is first  # noqa: PT018
    assert cuda.tickets(device, cuda.COUNTERS + 1).shape[0] > cuda.COUNTERS
    assert len(cuda._of_stream[device.index, 0]) == 2
    monkeypatch.setattr(cuda, "capturing", lambda: True)
    monkeypatch.setattr(cuda, "_captured", {})
    one, two = cuda.tickets(device, 10), cuda.tickets(device, 10)
    assert two.data_ptr() == one.data_ptr() + 4 * 10
    assert cuda.tickets(device, cuda.CAPTURED_COUNTERS).shape[0] == cuda.CAPTURED_COUNTERS
