"""Every Triton kernel compiles for every GPU we name, within its shared memory and without spilling registers.

No GPU is needed. What is compiled is what a call with sizes and strides of 16 bytes compiles; the launch of each kernel
is caught in place of a run, so that the configurations are those of the code itself.
"""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from fused_margins.ops import gpu, registry  # noqa: E402

pytestmark = pytest.mark.skipif(gpu.interpreted, reason="interpreted kernels are not compiled")
# Shared memory that a block may have, in bytes.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
MATRIX_UNIT = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}
DTYPES = [torch.float32, torch.bfloat16, torch.float64]  # float16 has bfloat16's tiles
SIMILARITIES = ["cosine", "dot", "negative_squared_euclidean"]
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64",
    torch.int32: "i32",
}  # fmt: skip

Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """What the code launches, in place of launching it."""
    caught: list[Launch] = []
    monkeypatch.setattr(gpu, "launch", lambda kernel, grid, *args, **options: caught.append((kernel, args, options)))
    return caught


def compiled(kernel: Any, args: tuple[Any, ...], options: dict[str, Any], arch: int) -> Any:
    signature, constants, attributes = {}, {}, {}
    settings = {name: options[name] for name in ("num_warps", "num_stages") if name in options}
    for n, name in enumerate(kernel.arg_names):
        value = args[n] if n < len(args) else options[name]
        if n >= len(args) or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[(n,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(n,)] = f"*{TYPES[value.dtype]}", [["tt.divisibility", 16]]
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{value.block_shape}>".replace(" ", "")
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[(n,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=settings)


def resources(program: Any, folder: Path) -> tuple[int, int]:
    """Registers of a thread and bytes of its stack: a spill shows as stack."""
    file = folder / "kernel.cubin"
    file.write_bytes(program.asm["cubin"])
    usage = subprocess.run(
        [CUOBJDUMP, "--dump-resource-usage", file], capture_output=True, text=True, check=True
    ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return int(found[1]), int(found[2])


def assert_compiles(
    launches: list[Launch], arch: int, folder: Path, record: Callable[[str, object], None] = lambda name, value: None
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
        multiplies = options.get("SIMILARITY") != SIMILARITIES.index("negative_squared_euclidean")
        if narrow and multiplies and options.get("BM", 0) >= 64 and MATRIX_UNIT[arch] not in program.asm["ptx"]:
            faults.append(f"{name}: no {MATRIX_UNIT[arch]}")
    assert not faults, "\n".join(faults)


def contrast(dtype: torch.dtype, similarity: str, of_scale: bool = True, labelled: bool = False) -> None:
    kernel = registry.kernel("contrast", "triton")
    x, y = torch.zeros(1024, 512, dtype=dtype), torch.zeros(2048, 512, dtype=dtype)
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    scale, target = torch.tensor(30.0, dtype=accumulation), torch.zeros(1024, dtype=torch.int64)
    others = torch.zeros(2048, dtype=accumulation), target, torch.zeros(2048, dtype=torch.int64), target
    bias, row_labels, column_labels, own = others if labelled else (None,) * 4
    arguments = (x, y, scale, bias, target, row_labels, column_labels, own)
    positive, lse, mean, kept = kernel.forward(*arguments, similarity, "different", -1, True, 0)
    kernel.backward(
        positive, lse, *arguments, lse, mean, kept, similarity, "different", -1, 0, [True, True, of_scale, labelled]
    )


def plain_contrast(dtype: torch.dtype, similarity: str) -> None:
    """Of a scale without gradient: the margin softmax."""
    contrast(dtype, similarity, of_scale=False)


def labelled_contrast(dtype: torch.dtype, similarity: str) -> None:
    contrast(dtype, similarity, labelled=True)


def scores(dtype: torch.dtype, similarity: str) -> None:
    kernel = registry.kernel("scores", "triton")
    x, y = torch.zeros(1024, 512, dtype=dtype), torch.zeros(2048, 512, dtype=dtype)
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    one, target = torch.tensor(1.0, dtype=accumulation), torch.zeros(1024, dtype=torch.int64)
    out = kernel.forward(x, y, one, None, one, target, similarity, -1)
    kernel.backward(out, x, y, one, None, one, target, similarity, -1, [True, True, True, False, True])


def nearest(dtype: torch.dtype, similarity: str, k: int = 1) -> None:
    x, labels = torch.zeros(1024, 512, dtype=dtype), torch.zeros(1024, dtype=torch.int64)
    registry.kernel("nearest", "triton").forward(x, x, labels, labels, labels, None, similarity, "different", k)


def semihard(dtype: torch.dtype, similarity: str) -> None:
    x, labels = torch.zeros(1024, 512, dtype=dtype), torch.zeros(1024, dtype=torch.int64)
    below = torch.zeros(1024, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    registry.kernel("nearest", "triton").forward(x, x, labels, labels, labels, below, similarity, "different", 1)


def assignment(dtype: torch.dtype, similarity: str) -> None:
    """Of k-means: narrow vectors, every column open."""
    x, labels = torch.zeros(1024, 128, dtype=dtype), torch.zeros(1024, dtype=torch.int64)
    registry.kernel("nearest", "triton").forward(x, x, labels, labels, None, None, similarity, "any", 1)


def draw(dtype: torch.dtype, similarity: str) -> None:
    x, labels = torch.zeros(1024, 512, dtype=dtype), torch.zeros(1024, dtype=torch.int64)
    registry.kernel("draw", "triton").forward(x, x, labels, labels, torch.tensor(0), labels, "different")


EVERYTHING = [
    (op, dtype, similarity) for op in (contrast, scores, nearest) for dtype in DTYPES for similarity in SIMILARITIES
]
# What is compiled otherwise in special cases, in the dtypes that count.
SPECIAL = [
    (op, dtype, similarity)
    for op, similarity in (
        (plain_contrast, "cosine"),
        (plain_contrast, "dot"),
        (labelled_contrast, "cosine"),
        (semihard, "cosine"),
        (semihard, "negative_squared_euclidean"),
        (assignment, "negative_squared_euclidean"),
        (draw, "cosine"),
    )
    for dtype in (torch.float32, torch.bfloat16)
]


@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize(
    ("op", "dtype", "similarity"),
    [pytest.param(*p, id=f"{p[0].__name__}-{p[2]}-{TYPES[p[1]]}") for p in EVERYTHING + SPECIAL],
)
def test_compiles(
    op: Callable[..., None],
    similarity: str,
    dtype: torch.dtype,
    arch: int,
    launches: list[Launch],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    monkeypatch.setattr(gpu, "capability", lambda device: arch // 10)
    op(dtype, similarity)
    assert_compiles(launches, arch, tmp_path, record_property)


@pytest.mark.parametrize("k", [5, 128])
def test_compiles_for_several_neighbours(k, launches, tmp_path):
    nearest(torch.bfloat16, "cosine", k)
    assert_compiles(launches, 90, tmp_path)


def test_a_spill_is_seen(launches, tmp_path):
    """A tile far larger than the registers."""
    nearest(torch.float32, "negative_squared_euclidean")
    search = next(
        (kernel, args, options | {"BM": 128, "num_warps": 4}) for kernel, args, options in launches if "BM" in options
    )
    with pytest.raises(AssertionError, match="bytes of stack"):
        assert_compiles([search], 90, tmp_path)
