"""Builds the native module with ninja: each op once per instruction set, no torch header, no torch at build time.

FUSED_MARGINS_BUILD: "auto" (default: build what the compilers at hand allow, and install without it otherwise; for
GPUs where the torch that is installed already is a CUDA build), "cpu" (a failure is an error, and nothing for GPUs is
built), "cuda" (both modules, a failure is an error), "none" (pure Python). FUSED_MARGINS_CUDA_ARCHS: the GPU
architectures to build for, as "90" or "80,90"; default: those of the GPUs that are here, or all of ARCHS.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
FAILURE_FILE = "native_build_failure.txt"
FLAGS = [
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
]
# Namespace and flags of every instruction set. The baseline comes first on the link line: where the linker keeps one of
# several equal inline functions of the standard library, it keeps the one that runs everywhere.
ISAS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISAS["v3"] = ["-march=x86-64-v3"]
    ISAS["v4"] = ["-march=x86-64-v4", "-mprefer-vector-width=512"]
# More for the ops that gain by them: v4 and the bfloat16 products of the vector unit or the matrix unit, where the
# compiler knows both.
BF16_ISAS = {}
if "v4" in ISAS:
    BF16_ISAS["v4_bf16"] = [*ISAS["v4"], "-mavx512bf16"]
    BF16_ISAS["amx"] = [*BF16_ISAS["v4_bf16"], "-mamx-tile", "-mamx-bf16"]
BF16_OPS = ("contrast", "nearest", "sample", "scores")
ARCHS = ("80", "90", "100")  # of NVIDIA GPUs; later ones compile the last one's PTX
# -O3 compiles twice as long: for ops that lose by -O2, where there is a level above the baseline not for that.
FAST, FASTEST = ["-O2", "-fvect-cost-model=dynamic"], ["-O3"]
OPS_THAT_GAIN = ("contrast", "nearest", "sample")
CXX_SECONDS, NVCC_SECONDS = 6, 12  # a file takes, about, of one core; of nvcc for each architecture
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Werror", "all-warnings"]
CUDA = "fused_margins._CUDA"
CPU_SOURCES, CUDA_SOURCES = sorted(ROOT.glob("csrc/*/cpu.cpp")), sorted(ROOT.glob("csrc/*/cuda.cu"))


class BuildFailure(Exception):
    """Says what is missing."""


def find_compiler() -> list[str]:
    asked = os.environ.get("CXX", "").strip()
    for candidate in [asked] if asked else ["g++", "clang++", "c++"]:
        if shutil.which(candidate.split()[0]):
            return candidate.split()
    raise BuildFailure(f"no C++ compiler found (looked for {asked or 'g++, clang++, c++'})")


def accepted(compiler: list[str], flags: list[str], source: str) -> list[str]:
    """The flags, if the compiler compiles `source` with them; else none."""
    probe = [*compiler, *flags, "-x", "c++", "-fsyntax-only", "-"]
    return flags if subprocess.run(probe, input=source, text=True, capture_output=True).returncode == 0 else []


def openmp_flags(compiler: list[str]) -> list[str]:
    """-fopenmp where the compiler has it; without it the kernels run on one thread."""
    return accepted(compiler, ["-fopenmp"], "#include <omp.h>\nint main() { return omp_get_max_threads(); }")


def find_nvcc() -> str | None:
    """In CUDA_HOME, or else on PATH."""
    home = os.environ.get("CUDA_HOME", "").strip()
    return shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")


def torch_is_built_for_cuda() -> bool:
    """Of the environment that is installed into: a build that is isolated cannot import its torch."""
    version = Path(sysconfig.get_path("purelib")) / "torch" / "version.py"
    return version.exists() and re.search(r"^cuda\b.*= *['\"]", version.read_text(), re.MULTILINE) is not None


def architectures_here() -> list[str]:
    """Of the GPUs of this machine, as "90"."""
    if shutil.which("nvidia-smi") is None:
        return []
    ask = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    told = subprocess.run(ask, capture_output=True, text=True).stdout
    return sorted({major + minor for major, minor in re.findall(r"^(\d+)\.(\d)$", told, re.MULTILINE)})


def architecture_flags(nvcc: str) -> list[str]:
    """Machine code for the architectures that are asked for or here, else for every one of ARCHS that nvcc knows, and
    PTX of the last one for those to come."""
    asked = os.environ.get("FUSED_MARGINS_CUDA_ARCHS", "").replace(",", " ").split() or architectures_here()
    if asked:
        return [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in asked]
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    known = [arch for arch in ARCHS if f"compute_{arch}" in listed]
    if not known:
        raise BuildFailure(f"{nvcc} knows none of the GPU architectures {', '.join(ARCHS)}")
    codes = [*(f"{arch},code=sm_{arch}" for arch in known), f"{known[-1]},code=compute_{known[-1]}"]
    return [f"-gencode=arch=compute_{code}" for code in codes]


class NinjaBuild(build_ext):
    def run(self) -> None:
        mode = os.environ.get("FUSED_MARGINS_BUILD", "auto")
        if mode not in ("auto", "cpu", "cuda", "none"):
            raise SystemExit(f"FUSED_MARGINS_BUILD: expected auto, cpu, cuda or none, got {mode!r}")
        if mode == "cuda" and find_nvcc() is None:
            raise SystemExit("fused-margins: FUSED_MARGINS_BUILD=cuda, and no nvcc in CUDA_HOME or on PATH")
        with_cuda = mode == "cuda" or (mode == "auto" and torch_is_built_for_cuda() and find_nvcc() is not None)
        self.cuda_target = Path(self.get_ext_fullpath(CUDA))  # where an earlier build left its own
        if not with_cuda:
            self.extensions = [ext for ext in self.extensions if ext.name != CUDA]
            self.cuda_target.unlink(missing_ok=True)
        self.keep_objects = self.inplace or getattr(self, "editable_mode", False)  # run() clears inplace for a while
        failure_file = Path(self.get_ext_fullpath(self.extensions[0].name)).parent / FAILURE_FILE
        failure_file.parent.mkdir(parents=True, exist_ok=True)
        try:
            if mode == "none":
                raise BuildFailure("built with FUSED_MARGINS_BUILD=none")
            super().run()
            failure_file.unlink(missing_ok=True)
        except BuildFailure as failure:
            if mode in ("cpu", "cuda"):
                raise SystemExit(f"fused-margins: {failure}") from failure
            failure_file.write_text(f"{failure}\n")
            for ext in self.extensions:
                Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
            self.extensions = []
            if mode == "auto":
                warnings.warn(f"fused-margins installs without its C++ kernels: {failure}", stacklevel=1)

    def build_extensions(self) -> None:
        for ext in list(self.extensions):
            try:
                self.build_extension(ext)
            except BuildFailure as failure:
                if ext.name != CUDA or os.environ.get("FUSED_MARGINS_BUILD", "auto") != "auto":
                    raise
                self.extensions.remove(ext)
                self.cuda_target.unlink(missing_ok=True)
                warnings.warn(f"fused-margins installs without its CUDA kernels: {failure}", stacklevel=1)

    def build_extension(self, ext: Extension) -> None:
        compiler = find_compiler()
        nvcc = find_nvcc() if ext.name == CUDA else None

        import ninja
        import pybind11
        from ninja import ninja_syntax

        # An editable installation gets a throw-away build_temp; objects that stay make the next one quick.
        folder = ROOT / "build" / sys.implementation.cache_tag if self.keep_objects else Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        targets = {e.name: Path(self.get_ext_fullpath(e.name)).resolve() for e in self.extensions}
        for target in targets.values():
            target.parent.mkdir(parents=True, exist_ok=True)
        includes = [f"-isystem{shlex.quote(p)}" for p in (pybind11.get_include(), sysconfig.get_path("include"))]
        own_flags = shlex.split(os.environ.get("CXXFLAGS", ""))
        openmp = openmp_flags(compiler)
        fast = accepted(compiler, FAST, "int main() {}") or FASTEST  # clang has no such model
        matrix_unit = "#include <immintrin.h>\nvoid f() { _tile_dpbf16ps(0, 1, 2); }"
        known = BF16_ISAS if BF16_ISAS and accepted(compiler, BF16_ISAS["amx"], matrix_unit) else {}
        has_bf16 = ["-DFM_HAS_BF16"] if known else []
        link = ["-shared"] if sys.platform != "darwin" else ["-bundle", "-undefined", "dynamic_lookup"]

        with (folder / "build.ninja").open("w") as file:
            n = ninja_syntax.Writer(file, width=10_000)
            n.rule(
                "compile",
                f"{' '.join(compiler)} $flags -MMD -MF $out.d -c $in -o $out",
                depfile="$out.d",
                deps="gcc",
                description="compile $out",
            )
            n.rule(
                "link",
                f"{' '.join(compiler)} {' '.join(link)} $in {' '.join(openmp)} {os.environ.get('LDFLAGS', '')} -o $out",
                description="link $out",
            )
            objects = []
            for isa, isa_flags in (ISAS | known).items():
                for source in CPU_SOURCES:
                    if isa in BF16_ISAS and source.parent.name not in BF16_OPS:
                        continue
                    name = f"{source.parent.name}_{isa}.o"
                    gains = source.parent.name in OPS_THAT_GAIN and (isa != "baseline" or len(ISAS) == 1)
                    flags = [
                        *FLAGS,
                        *(FASTEST if gains else fast),
                        *isa_flags,
                        *has_bf16,
                        *openmp,
                        f"-DFM_ISA={isa}",
                        *own_flags,
                    ]
                    objects += n.build(name, "compile", str(source), variables={"flags": flags})
            for source in (ROOT / "csrc/cpu/isa.cpp", ROOT / "csrc/bindings.cpp"):
                objects += n.build(
                    f"{source.stem}.o",
                    "compile",
                    str(source),
                    variables={"flags": [*FLAGS, *fast, "-DNDEBUG", *has_bf16, *openmp, *includes, *own_flags]},
                )
            n.build(str(targets["fused_margins._C"]), "link", objects)
            if nvcc is not None:
                host = ["-ccbin", compiler[0]] if os.environ.get("CXX", "").strip() else []
                command = shlex.join([nvcc, *host])
                n.rule(
                    "compile_cuda",
                    f"{command} $flags -MMD -MF $out.d -c $in -o $out",
                    depfile="$out.d",
                    deps="gcc",
                    description="compile $out",
                )
                n.rule("link_cuda", f"{command} -shared -cudart static $in -o $out", description="link $out")
                flags = [*NVCC_FLAGS, *architecture_flags(nvcc)]
                objects = n.build(
                    "bindings_cuda.o",
                    "compile",
                    str(ROOT / "csrc/bindings_cuda.cpp"),
                    variables={"flags": [*FLAGS, *fast, "-DNDEBUG", *includes, *own_flags]},
                )
                for source in CUDA_SOURCES:
                    name = f"{source.parent.name}_cuda.o"
                    objects += n.build(name, "compile_cuda", str(source), variables={"flags": flags})
                n.build(str(targets[CUDA]), "link_cuda", objects)
        what = f"fused-margins: C++ for {', '.join(ISAS | known)}"
        seconds = CXX_SECONDS * sum(len(BF16_OPS) if isa in BF16_ISAS else len(CPU_SOURCES) for isa in ISAS | known)
        if nvcc is not None:
            of_each = len(architecture_flags(nvcc))
            what, seconds = f"fused-margins: CUDA C++ ({nvcc})", NVCC_SECONDS * of_each * len(CUDA_SOURCES)
        cores = os.cpu_count() or 1
        print(f"{what}: {seconds / cores:.0f} s or so on {cores} cores, where nothing is built yet", flush=True)
        try:
            subprocess.run([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder), str(targets[ext.name])], check=True)
        except subprocess.CalledProcessError as error:
            what = f"CUDA build failed ({nvcc})" if nvcc else f"C++ build failed ({' '.join(compiler)})"
            raise BuildFailure(f"the {what}; `pip install -v` shows why") from error


def tree(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(f"csrc/**/{pattern}"))


# Sources and headers are named for the source distribution; how they are compiled is NinjaBuild's business.
bindings_cuda = "csrc/bindings_cuda.cpp"
extensions = [
    Extension("fused_margins._C", sources=[s for s in tree("*.cpp") if s != bindings_cuda], depends=tree("*.h")),
    Extension(CUDA, sources=[bindings_cuda, *tree("*.cu")], depends=tree("*.h")),
]
setup(ext_modules=extensions, cmdclass={"build_ext": NinjaBuild})
