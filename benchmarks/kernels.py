"""Triton's kernels without a GPU: registers, shared memory, blocks that fit, and the least time an H200 can take.

    python -m benchmarks.kernels > docs/benchmarks/kernels.md

Every kernel of one call of the margin softmax, forward and backward, is compiled for each architecture. Blocks are
those of which a multiprocessor holds the registers, the shared memory and the threads. The least time is what the bytes
take at the memory's rate, or the products at the rate that matrix units sustain; no figure here was measured on a GPU.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from fused_margins.backends import budget, registry
from fused_margins.backends.triton import launch
from fused_margins.backends.triton.constants import BN
from fused_margins.ops.contrast import triton_exponentials
from fused_margins.ops.contrast.epilogues import Epilogue
from fused_margins.ops.contrast.op import Contrast

# Shared memory that a block may have, in bytes.
SHARED: dict[int | str, int] = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, "gfx942": 64 * 1024}
REGISTERS, THREADS, BLOCKS = 64 * 1024, 2048, 32  # of a multiprocessor
TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64",
    torch.int32: "i32",
}  # fmt: skip
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
PRODUCTS_PER_S, BYTES_PER_S = 790e12, 4.8e12  # of an H200: bfloat16 as cuBLAS sustains it, and by the data sheet
USUAL_BYTES_PER_S, MEASURED_US = 4.0e12, 880.0  # what kernels reach of it; the kernels of the first table, on an H200

Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]


def compiled(kernel: Any, args: tuple[Any, ...], options: dict[str, Any], arch: int | str) -> Any:
    """What a launch with these arguments compiles, sizes and addresses being multiples of 16 where they can be.

    arch: the number of an NVIDIA architecture, the name of one of AMD's.
    """
    signature, constants, attributes = {}, {}, {}
    settings = {name: options[name] for name in ("num_warps", "num_stages") if name in options}
    for n, name in enumerate(kernel.arg_names):
        value = launch.as_tensor(args[n]) if n < len(args) else options[name]
        if n >= len(args) or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[(n,)] = "constexpr", value
        elif isinstance(value, Tensor):
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
    target = GPUTarget("hip", arch, 64) if isinstance(arch, str) else GPUTarget("cuda", arch, 32)
    return triton.compile(source, target=target, options=settings)


def resources(program: Any, folder: Path) -> tuple[int, int]:
    """Registers of a thread and bytes of its stack: a spill shows as stack."""
    if "amdgcn" in program.asm:
        counts = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", program.asm["amdgcn"]))
        return int(counts["vgpr_count"]), int(counts["private_segment_fixed_size"])
    file = folder / "kernel.cubin"
    file.write_bytes(program.asm["cubin"])
    usage = subprocess.run(
        [CUOBJDUMP, "--dump-resource-usage", file], capture_output=True, text=True, check=True
    ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return int(found[1]), int(found[2])


def blocks_that_fit(registers: int, shared: int, warps: int, arch: int) -> int:
    """Of a multiprocessor at once; registers come in lots of 8 a thread, and each block has 1 KiB for the system."""
    of_registers = REGISTERS // (-(-registers // 8) * 8 * 32 * warps)
    return min(of_registers, (SHARED[arch] + 1024) // (shared + 1024), THREADS // (32 * warps), BLOCKS)


class Work(NamedTuple):
    """What a kernel has to do at least: numbers multiplied and added, bytes that memory gives or takes."""

    products: float
    num_bytes: float

    def least_us(self) -> float:
        return 1e6 * max(2 * self.products / PRODUCTS_PER_S, self.num_bytes / BYTES_PER_S)


def work(rows: int, width: int, columns: int, keeps: bool) -> dict[str, Work]:
    """Of each kernel of a call; what stays in the L2 cache counts for nothing."""
    every, x, y = rows * columns, 2 * rows * width, 2 * columns * width
    product, small = rows * columns * width, 32 * rows + 4 * columns
    if columns <= BN:
        return {
            "few_forward": Work(product, x + y + 4 * every), "_reduce_losses": Work(0, small),
            "few_backward": Work(2 * product, 2 * (x + y) + 4 * every),
        }  # fmt: skip
    if not keeps:
        return {
            "prepare": Work(0, x + y), "reduce": Work(product, x + y), "finish": Work(0, small),
            "_reduce_losses": Work(0, small), "weights": Work(product, x + y),
            "columns_gradient": Work(product, x + 2 * y), "_rows": Work(product, y), "_finish_rows": Work(0, 2 * x),
        }  # fmt: skip
    return {
        "prepare": Work(0, x + 2 * y), "reduce": Work(product, x + y + 2 * every), "finish": Work(0, small),
        "_reduce_losses": Work(0, small), "_scale_rows": Work(0, 2 * x), "cuBLAS: E b": Work(product, 2 * every + y),
        "cuBLAS: E^T (c a)": Work(product, 2 * every + x + 2 * y), "_finish": Work(0, 4 * y + 4 * x),
    }  # fmt: skip


def launches(rows: int, width: int, columns: int) -> list[Launch]:
    """Those of a margin softmax of bfloat16 cosines, forward and backward."""
    caught: dict[Any, Launch] = {}
    catch: Callable[..., Any] = lambda kernel, grid, *args, **options: caught.update({kernel: (kernel, args, options)})  # noqa: E731
    products: Callable[..., Tensor] = lambda a, b: torch.empty(a.shape[0], b.shape[1])  # noqa: E731
    x, y = (torch.empty(n, width, dtype=torch.bfloat16) for n in (rows, columns))
    a = Contrast(x, y, torch.zeros(rows, dtype=torch.int64), scale=30.0, epilogue=Epilogue.MARGIN_SOFTMAX)
    kernel, needs = registry.kernel("contrast", "triton"), (True, True, False, False, False)
    with mock.patch.object(launch, "launch", catch), mock.patch.object(triton_exponentials, "product", products):
        plan = kernel.plan(a, needs)
        *outputs, saved = kernel.forward(a, plan)
        kernel.backward(outputs, a, saved, plan, needs)
    return list(caught.values())


def table(rows: int, width: int, columns: int, keeps: bool) -> Iterator[str]:
    archs = [arch for arch in SHARED if isinstance(arch, int)]
    yield (
        "| kernel | warps | stages | "
        + " | ".join(f"sm_{arch}: registers, KiB, blocks" for arch in archs)
        + " | least us |"
    )
    yield "|---|--:|--:|" + "--:|" * len(archs) + "--:|"
    least, digits = work(rows, width, columns, keeps), 0 if columns > BN else 2
    of_arch: dict[str, dict[int, str]] = {}
    settings: dict[str, tuple[int, int]] = {}
    with tempfile.TemporaryDirectory() as folder, budget.within_exponential_budget(None if keeps else 0):
        for arch in archs:
            with mock.patch.object(launch, "capability", lambda device, arch=arch: arch // 10):
                for kernel, args, options in launches(rows, width, columns):
                    program = compiled(kernel, args, options, arch)
                    registers, stack = resources(program, Path(folder))
                    name, shared = kernel.fn.__name__, program.metadata.shared
                    fit = blocks_that_fit(registers, shared, options["num_warps"], arch)
                    spilled = f", {stack} bytes spilled" if stack else ""
                    of_arch.setdefault(name, {})[arch] = f"{registers}, {shared / 1024:.0f}, {fit}{spilled}"
                    if arch == 90:
                        settings[name] = options["num_warps"], program.metadata.num_stages
    for name, of_kernel in least.items():
        warps, stages = settings.get(name, ("", ""))
        cells = [of_arch.get(name, {}).get(arch, "") for arch in archs]
        yield (
            "| "
            + " | ".join([f"`{name}`" if name in settings else name, f"{warps}", f"{stages}", *cells])
            + f" | {of_kernel.least_us():.{digits}f} |"
        )
    yield f"| together | | | {'| ' * len(archs)}| {sum(w.least_us() for w in least.values()):.{digits}f} |"


def prediction(least: dict[str, Work]) -> str:
    """What the first measurement is to be held against; least: of the kernels where exponentials are kept."""
    prepare, finish, product = (least[name].least_us() for name in ("prepare", "_finish", "cuBLAS: E b"))
    by_memory = (prepare + finish) * BYTES_PER_S / USUAL_BYTES_PER_S
    low, high = (by_memory + reduce + 2 * of_product for reduce, of_product in ((180, product), (200, 1.13 * product)))
    cublas, together = f"{product:.0f} to {1.13 * product:.0f}", f"{low:.0f} to {high:.0f}"
    usual, of_today = f"{USUAL_BYTES_PER_S / 1e12:.1f}", f"{low / MEASURED_US:.2f} to {high / MEASURED_US:.2f}"
    return f"""## What is expected of it

An H200 took {1e-3 * MEASURED_US:.2f} ms for the first table's kernels (measured at an earlier commit, see
[Performance](../performance.md)). Of the second table's, `prepare` and `_finish` are bound by memory, where
{usual} of {BYTES_PER_S / 1e12:.1f} TB/s are usual: {by_memory:.0f} us; `reduce` took 178 us without E, which it writes
in the time of its products, so 180 to 200; the two products of cuBLAS {cublas} each. Together {together} us,
{of_today} of today's, at one multiplication of B x N x D less."""


def main() -> None:
    rows, width, columns = 1024, 512, 100_000
    few_rows, few_columns = 256, 64
    print("# Kernels on a GPU, as compiled\n")
    assert __doc__
    print(__doc__.split("\n\n")[2].strip() + "\n")
    print(
        f"Margin softmax of bfloat16 cosines, {rows} x {width} x {columns:,} and {few_rows} x {width} x {few_columns}, "
        f"a number as scale, Triton {triton.__version__}; warps and stages as for sm_90. Registers are those of a "
        "thread, KiB of shared memory those of a block, blocks those that a multiprocessor holds. Least us: "
        f"{PRODUCTS_PER_S / 1e12:.0f} TFLOP/s, {BYTES_PER_S / 1e12:.1f} TB/s, an H200. `python -m benchmarks.kernels` "
        "prints this page.\n"
    )
    for title, *sizes, keeps in (
        (f"{columns:,} classes, as it is by default: four products", rows, width, columns, False),
        (f"{columns:,} classes, exponentials kept: three products", rows, width, columns, True),
        (f"{few_columns} classes: all columns in one tile", few_rows, width, few_columns, False),
    ):
        print(f"## {title}\n")
        print("\n".join(table(*sizes, keeps)) + "\n")
    print(prediction(work(rows, width, columns, True)))


if __name__ == "__main__":
    main()
