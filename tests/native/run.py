"""Every kernel under AddressSanitizer, UndefinedBehaviorSanitizer and valgrind: ``make sanitize``.

Builds tests/native/driver.cpp with the kernels of every instruction set that this machine has, runs it on one thread
and on three, and sees each tool catch a fault made on purpose. Exits with 1 at the first failure.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
ISAS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISAS |= {"v3": ["-march=x86-64-v3"], "v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"]}
# The kernels with bfloat16 products: of these ops, where the compiler knows them.
BF16_OPS = ("contrast", "nearest", "sample", "scores")
BF16_ISAS = {"v4_bf16": ["-march=x86-64-v4", "-mavx512bf16"]}
BF16_ISAS["amx"] = [*BF16_ISAS["v4_bf16"], "-mamx-tile", "-mamx-bf16"]
FLAGS = ["-std=c++17", "-g", "-fno-omit-frame-pointer", "-Wno-psabi", "-DFM_NO_POOL"]
SANITIZERS = ["-O1", "-fopenmp", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def compiler() -> str:
    return os.environ.get("CXX") or next(name for name in ("g++", "clang++", "c++") if shutil.which(name))


def has_bf16() -> bool:
    """Whether the compiler knows the vector unit's bfloat16 products and the matrix unit."""
    probe = [compiler(), *BF16_ISAS["amx"], "-x", "c++", "-fsyntax-only", "-"]
    source = "#include <immintrin.h>\nvoid f() { _tile_dpbf16ps(0, 1, 2); }"
    is_x86 = "v4" in ISAS
    return is_x86 and subprocess.run(probe, input=source, text=True, capture_output=True, check=False).returncode == 0


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


def build(folder: Path, flags: list[str]) -> Path:
    """The driver, with the kernels of all instruction sets."""
    isas = ISAS | (BF16_ISAS if has_bf16() else {})
    flags = [*flags, *(["-DFM_HAS_BF16"] if has_bf16() else [])]
    sources = sorted(ROOT.glob("csrc/*/cpu.cpp"))
    jobs = [
        (folder / f"{source.parent.name}_{isa}.o", [*isas[isa], f"-DFM_ISA={isa}", str(source)])
        for isa in isas
        for source in sources
        if isa not in BF16_ISAS or source.parent.name in BF16_OPS
    ]
    jobs += [
        (folder / f"{source.stem}.o", [str(source)])
        for source in (ROOT / "csrc/cpu/isa.cpp", ROOT / "tests/native/driver.cpp")
    ]

    def compile_one(job: tuple[Path, list[str]]) -> None:
        out, arguments = job
        done = run(compiler(), *FLAGS, *flags, *arguments, "-c", "-o", str(out))
        if done.returncode:
            sys.exit(done.stderr)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, jobs))
    program = folder / "driver"
    linked = run(compiler(), *flags, *(str(out) for out, _ in jobs), "-o", str(program))
    if linked.returncode:
        sys.exit(linked.stderr)
    return program


def must_pass(done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-6000:])
    print(done.stdout.strip(), flush=True)


def must_fail(done: subprocess.CompletedProcess[str], kind: str) -> None:
    if not done.returncode:
        sys.exit(f"{kind}: made on purpose, and nothing saw it")
    print(f"{kind}: seen", flush=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        program = str(build(Path(name), SANITIZERS))
        for kind in ("overrun", "overflow"):
            must_fail(run(program, "fault", kind), kind)
        for isa in [*ISAS, *(BF16_ISAS if has_bf16() else [])]:
            for threads in (1, 3):
                done = run(program, FUSED_MARGINS_ISA=isa.replace("_", "-"), OMP_NUM_THREADS=str(threads))
                if "this processor does not have" in done.stderr:
                    print(f"{isa}: this processor does not have it")
                    break
                must_pass(done)
    valgrind = shutil.which("valgrind")
    if not valgrind:
        print("valgrind: not here, left out")
        return
    with tempfile.TemporaryDirectory() as name:
        program = str(build(Path(name), ["-O1"]))
        checked = (valgrind, "--error-exitcode=9", "--quiet", program)
        must_fail(run(*checked, "fault", "uninitialised", FUSED_MARGINS_ISA="baseline"), "uninitialised")
        for isa in [isa for isa in ISAS if isa != "v4"]:  # valgrind does not know AVX-512
            must_pass(run(*checked, "few", FUSED_MARGINS_ISA=isa))


if __name__ == "__main__":
    main()
