"""Every Triton kernel compiles for every GPU we name, within its shared memory and without spilling registers.

No GPU is needed. What is compiled is what a call with sizes and strides of 16 bytes compiles; the launch of each kernel
is caught in place of a run, so that the configurations are those of the code itself.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

triton = pytest.importorskip("triton")

from benchmarks import kernels  # noqa: E402
from benchmarks.kernels import SHARED, TYPES, Launch, compiled, resources  # noqa: E402
from fused_margins.backends import budget, registry  # noqa: E402
from fused_margins.backends.triton import gradients, launch  # noqa: E402
from fused_margins.backends.triton.constants import BN  # noqa: E402
from fused_margins.core.enums import Relation, Similarity  # noqa: E402
from fused_margins.core.similarity import accumulation_dtype  # noqa: E402
from fused_margins.ops.contrast.epilogues import Epilogue  # noqa: E402
from fused_margins.ops.contrast.op import Contrast  # noqa: E402
from fused_margins.ops.nearest.op import Nearest  # noqa: E402
from fused_margins.ops.sample.op import Sample  # noqa: E402
from fused_margins.ops.scores.op import Scores  # noqa: E402

pytestmark = pytest.mark.skipif(launch.interpreted, reason="interpreted kernels are not compiled")
MATRIX_UNIT = {80: "mma.sync", 90: "wgmma", 100: "tcgen05", "gfx942": "mfma"}
COSINE, DOT, EUCLIDEAN = Similarity
ROWS, COLUMNS, WIDTH = 1024, 2048, 512


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """What the code launches, in place of launching it."""
    caught: list[Launch] = []
    monkeypatch.setattr(launch, "launch", lambda kernel, grid, *args, **options: caught.append((kernel, args, options)))
    return caught


def assert_compiles(
    launches: list[Launch],
    arch: int | str,
    folder: Path,
    record: Callable[[str, object], None] = lambda name, value: None,
) -> None:
    assert launches
    faults = []
    for kernel, args, options in launches:
        program = compiled(kernel, args, options, arch)
        registers, stack = resources(program, folder)
        record(kernel.fn.__name__, registers)
        name = f"{kernel.fn.__name__} ({registers} registers, {program.metadata.shared} bytes shared)"
        # In float64, which has no use but gradcheck, two numbers may leave the registers.
        if stack > (16 if options.get("DTYPE") == triton.language.float64 else 0):
            faults.append(f"{name}: {stack} bytes of stack")
        if program.metadata.shared > SHARED[arch]:
            faults.append(f"{name}: more than {SHARED[arch]} bytes of shared memory")
        narrow = any(isinstance(a, torch.Tensor) and a.dtype in (torch.bfloat16, torch.float16) for a in args)
        multiplies = options.get("SIMILARITY") != EUCLIDEAN
        if (
            narrow
            and multiplies
            and options.get("BM", 0) >= 64
            and MATRIX_UNIT[arch] not in program.asm.get("ptx", program.asm.get("amdgcn"))
        ):
            faults.append(f"{name}: no {MATRIX_UNIT[arch]}")
    assert not faults, "\n".join(faults)


def labels(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int64)


def numbers(count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(count, dtype=accumulation_dtype(dtype))


def contrast(
    dtype: torch.dtype, similarity: Similarity, of_scale: bool = True, saved_blocks: int = 0, **options: Any
) -> None:
    kernel = registry.kernel("contrast", "triton")
    x, y = torch.zeros(ROWS, WIDTH, dtype=dtype), torch.zeros(COLUMNS, WIDTH, dtype=dtype)
    scale = torch.tensor(30.0, dtype=accumulation_dtype(dtype))
    a = Contrast(x, y, labels(ROWS), scale=scale, similarity=similarity, **options)
    plan = kernel.plan_of(a, saved_blocks)
    *outputs, saved = kernel.forward(a, plan)
    kernel.backward(outputs, a, saved, plan, [True, True, of_scale, a.bias is not None, False])


def saved_contrast(dtype: torch.dtype, similarity: Similarity) -> None:
    """Some blocks of similarities are saved, the others made again."""
    contrast(dtype, similarity, saved_blocks=4)


def contrast_in_chunks(dtype: torch.dtype, similarity: Similarity) -> None:
    """So many columns that the second chunk adds to the gradients of the first."""
    with mock.patch.object(gradients, "CHUNK_BYTES", 2 * ROWS * COLUMNS // 2):
        contrast(dtype, similarity, of_scale=False)


def margin_softmax(dtype: torch.dtype, similarity: Similarity) -> None:
    """Of a scale without gradient."""
    angle = 0.5 if similarity == COSINE else 0.0
    contrast(dtype, similarity, of_scale=False, epilogue=Epilogue.MARGIN_SOFTMAX, angle_rad=angle)


def smoothed_margin_softmax(dtype: torch.dtype, similarity: Similarity) -> None:
    """Of a scale with and without gradient."""
    for of_scale in (True, False):
        contrast(dtype, similarity, of_scale=of_scale, epilogue=Epilogue.MARGIN_SOFTMAX, angle_rad=0.5, smoothing=0.1)


def few_margin_softmax(dtype: torch.dtype, similarity: Similarity) -> None:
    """All classes in one tile, few of them and as many as there may be; smoothed, and not."""
    kernel, angle = registry.kernel("contrast", "triton"), 0.5 if similarity == COSINE else 0.0
    most = BN // 2 if dtype == torch.float64 else BN
    for columns, smoothing in ((most // 2, 0.0), (most, 0.1 if similarity == COSINE else 0.0)):
        x, y = torch.zeros(ROWS, WIDTH, dtype=dtype), torch.zeros(columns, WIDTH, dtype=dtype)
        options = {"epilogue": Epilogue.MARGIN_SOFTMAX, "angle_rad": angle, "smoothing": smoothing}
        a = Contrast(x, y, labels(ROWS), scale=torch.tensor(30.0), similarity=similarity, **options)
        for blocks in (1, 0):  # similarities are saved, or made again
            plan = kernel.plan_of(a, blocks)
            *outputs, saved = kernel.forward(a, plan)
            kernel.backward(outputs, a, saved, plan, [True, True, True, False, True])


def kept_margin_softmax(dtype: torch.dtype, similarity: Similarity, **options: Any) -> None:
    """Exponentials of most columns are kept, those of the others made again; for either gradient, and for both."""
    angle = 0.5 if options.get("epilogue", Epilogue.MARGIN_SOFTMAX) == Epilogue.MARGIN_SOFTMAX else 0.0
    options = {"epilogue": Epilogue.MARGIN_SOFTMAX, "angle_rad": angle} | options
    kernel = registry.kernel("contrast", "triton")
    x, y = torch.zeros(ROWS, WIDTH, dtype=dtype), torch.zeros(COLUMNS, WIDTH, dtype=dtype)
    a = Contrast(x, y, labels(ROWS), scale=30.0, similarity=similarity, **options)
    plan = kernel.plan_of(a, 12)
    *outputs, saved = kernel.forward(a, plan)
    for of_x, of_y in ((True, True), (True, False), (False, True)):
        kernel.backward(outputs, a, saved, plan, [of_x, of_y, False, False, False])


def kept_contrast(dtype: torch.dtype, similarity: Similarity) -> None:
    """Without an epilogue: positives are added apart."""
    kept_margin_softmax(dtype, similarity, epilogue=Epilogue.NONE)


def kept_info_nce(dtype: torch.dtype, similarity: Similarity) -> None:
    of_rows, of_columns = labels(ROWS), labels(COLUMNS)
    of_labels = {"row_labels": of_rows, "column_labels": of_columns, "self_index": of_rows}
    kept_margin_softmax(dtype, similarity, epilogue=Epilogue.INFO_NCE, **of_labels)


def labelled_contrast(dtype: torch.dtype, similarity: Similarity) -> None:
    of_rows, of_columns = labels(ROWS), labels(COLUMNS)
    options = {"row_labels": of_rows, "column_labels": of_columns, "self_index": of_rows}
    contrast(dtype, similarity, bias=numbers(COLUMNS, dtype), **options)


def info_nce(dtype: torch.dtype, similarity: Similarity) -> None:
    """A batch against others, with labels of both."""
    of_rows, of_columns = labels(ROWS), labels(COLUMNS)
    options = {"row_labels": of_rows, "column_labels": of_columns, "self_index": of_rows}
    contrast(dtype, similarity, of_scale=False, epilogue=Epilogue.INFO_NCE, **options)


def any_contrast(dtype: torch.dtype, similarity: Similarity) -> None:
    """Every column but those that no relation admits."""
    contrast(dtype, similarity, column_labels=labels(COLUMNS), relation=Relation.ANY)


def scores(dtype: torch.dtype, similarity: Similarity, sign: int = 1) -> None:
    kernel = registry.kernel("scores", "triton")
    x, y = torch.zeros(ROWS, WIDTH, dtype=dtype), torch.zeros(COLUMNS, WIDTH, dtype=dtype)
    one = torch.tensor(1.0, dtype=accumulation_dtype(dtype))
    a = Scores(x, y, labels(ROWS), scale=one, margin=one, similarity=similarity, sign=sign)
    out, saved = kernel.forward(a, None)
    kernel.backward([out], a, saved, None, [True, True, True, False, True])


def distances(dtype: torch.dtype, similarity: Similarity) -> None:
    scores(dtype, similarity, sign=-1)


def nearest(
    dtype: torch.dtype,
    similarity: Similarity,
    k: int = 1,
    relation: Relation = Relation.DIFFERENT,
    width: int = WIDTH,
    itself: bool = True,
    rows: int = ROWS,
    **options: Any,
) -> None:
    x, of_rows = torch.zeros(rows, width, dtype=dtype), labels(rows)
    own = of_rows if itself else None
    options |= {"self_index": own, "similarity": similarity, "relation": relation, "k": k}
    registry.kernel("nearest", "triton").forward(Nearest(x, x, of_rows, of_rows, **options), None)


def nearest_of_few(dtype: torch.dtype, similarity: Similarity) -> None:
    """In one launch; least similar, so that distances go this way, too."""
    nearest(dtype, similarity, rows=512, largest=similarity != EUCLIDEAN)


def semihard(dtype: torch.dtype, similarity: Similarity) -> None:
    nearest(dtype, similarity, below=numbers(ROWS, dtype))


def least_similar(dtype: torch.dtype, similarity: Similarity) -> None:
    """Hard positives."""
    nearest(dtype, similarity, relation=Relation.SAME, largest=False)


def assignment(dtype: torch.dtype, similarity: Similarity) -> None:
    """Of k-means: narrow vectors, every column open."""
    nearest(dtype, similarity, relation=Relation.ANY, width=128, itself=False)


def sample(dtype: torch.dtype, similarity: Similarity) -> None:
    x, of_rows = torch.zeros(ROWS, WIDTH, dtype=dtype), labels(ROWS)
    a = Sample(x, x, of_rows, of_rows, torch.tensor(0), of_rows)
    registry.kernel("sample", "triton").forward(a, None)


NVIDIA, COMMON = (80, 90, 100), (torch.float32, torch.bfloat16)  # float16 has bfloat16's tiles
# What takes the most registers and shared memory: for every architecture.
LARGEST = [
    *((op, dtype, s) for op in (contrast, scores, nearest) for dtype in COMMON for s in (COSINE, EUCLIDEAN)),
    *(
        (op, dtype, COSINE)
        for op in (
            contrast_in_chunks,
            margin_softmax,
            smoothed_margin_softmax,
            few_margin_softmax,
            labelled_contrast,
            nearest_of_few,
            semihard,
            sample,
        )
        for dtype in COMMON
    ),
    *((assignment, dtype, EUCLIDEAN) for dtype in COMMON),
    (saved_contrast, torch.float32, COSINE),
    *((op, torch.bfloat16, COSINE) for op in (kept_margin_softmax, kept_contrast, kept_info_nce)),
    (contrast, torch.float64, COSINE),
]
# Nearly the same code, which takes no more but for a few registers: similarities without lengths, the dtype of
# gradcheck, parts of the labelled contrast and of the semi-hard search. Each for one architecture, in turn.
SMALLER = [
    *((op, dtype, DOT) for op in (contrast, scores, nearest) for dtype in (*COMMON, torch.float64)),
    *((op, torch.float64, s) for op in (scores, nearest) for s in (COSINE, EUCLIDEAN)),
    (contrast, torch.float64, EUCLIDEAN),
    *((margin_softmax, dtype, DOT) for dtype in COMMON),
    *((op, dtype, EUCLIDEAN) for op in (few_margin_softmax, nearest_of_few) for dtype in COMMON),
    *((op, torch.float64, COSINE) for op in (few_margin_softmax, smoothed_margin_softmax)),
    *((op, dtype, COSINE) for op in (info_nce, any_contrast, least_similar) for dtype in COMMON),
    *((op, dtype, EUCLIDEAN) for op in (semihard, least_similar, distances) for dtype in COMMON),
]


@pytest.mark.parametrize(
    ("op", "dtype", "similarity", "arch"),
    [
        pytest.param(op, dtype, similarity, arch, id=f"{op.__name__}-{similarity.name.lower()}-{TYPES[dtype]}-{arch}")
        for op, dtype, similarity, archs in [
            *((*largest, NVIDIA) for largest in LARGEST),
            *((*smaller, (NVIDIA[n % 3],)) for n, smaller in enumerate(SMALLER)),
        ]
        for arch in archs
    ],
)
def test_compiles(
    op: Callable[..., None],
    similarity: Similarity,
    dtype: torch.dtype,
    arch: int,
    launches: list[Launch],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    monkeypatch.setattr(launch, "capability", lambda device: arch // 10)
    op(dtype, similarity)
    assert_compiles(launches, arch, tmp_path, record_property)


@pytest.mark.parametrize(
    ("op", "dtype", "similarity"),
    [
        pytest.param(*largest, id=f"{largest[0].__name__}-{largest[2].name.lower()}-{TYPES[largest[1]]}")
        for largest in LARGEST
    ],
)
def test_compiles_for_amd(op, dtype, similarity, launches, tmp_path, monkeypatch):
    """An MI300's architecture, whose waves have 64 threads, and whose builds of torch call it "cuda"."""
    monkeypatch.setattr(launch, "capability", lambda device: 0)
    monkeypatch.setattr(launch, "on_amd", True)
    op(dtype, similarity)
    assert_compiles(launches, "gfx942", tmp_path)


@pytest.mark.parametrize(("k", "largest"), [(5, True), (128, True), (5, False)])
def test_compiles_for_several_neighbours(k, largest, launches, tmp_path):
    nearest(torch.bfloat16, COSINE, k, largest=largest)
    assert_compiles(launches, 90, tmp_path)


@pytest.mark.parametrize(("columns", "keeps"), [(300, False), (300, True), (64, False)])
def test_the_table_of_kernels_has_all_that_a_call_launches(columns, keeps, monkeypatch):
    monkeypatch.setattr(launch, "capability", lambda device: 9)
    with budget.within_exponential_budget(None if keeps else 0):
        launched = {kernel.fn.__name__ for kernel, _, _ in kernels.launches(64, 32, columns)}
    assert launched == {name for name in kernels.work(64, 32, columns, keeps) if not name.startswith("cuBLAS")}


@pytest.mark.parametrize(("arch", "warps"), [(90, 4), ("gfx942", 1)])
def test_a_spill_is_seen(arch, warps, launches, tmp_path):
    """A tile far larger than the registers."""
    nearest(torch.bfloat16, COSINE)
    too_large = {"BM": 256, "num_warps": warps}
    search = next((kernel, args, options | too_large) for kernel, args, options in launches if "BM" in options)
    with pytest.raises(AssertionError, match="bytes of stack"):
        assert_compiles([search], arch, tmp_path)
