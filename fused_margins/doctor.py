"""What an installation has, what it can run, and whether its backends compute what the reference does.

`fused-margins doctor`, or ``python -m fused_margins.doctor``, needs torch and numpy alone and says on one screen what a
report of a fault needs, with a verdict at the end.

>>> from fused_margins import doctor
>>> doctor.main(["--device", "cpu"])  # doctest: +ELLIPSIS
fused-margins ...
0
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from . import functional
from .backends import registry

__all__ = ["check", "main", "relative_difference", "versions"]

PACKAGES = ("fused-margins", "torch", "numpy", "triton", "pytorch-metric-learning", "scikit-learn")
INSTRUCTION_SETS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
CHECK_SECONDS = 10.0
TOLERANCE = 1e-4  # float32 sums of up to some thousand terms, against float32 sums in another order
SIZES = ((8, 5, 4), (65, 17, 33), (128, 64, 64), (256, 512, 200), (512, 128, 1000))  # rows, width, classes
LOSSES = {"margin softmax": "margin_softmax", "easy positives": "nearest", "magnet": "magnet"}  # and the op of each


def versions() -> dict[str, str]:
    """Of Python, the system, and the packages that matter; "none" for one that is not installed as a package."""
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found


def compiler() -> str:
    """First line of the C++ compiler's version, or why there is none."""
    name = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if name is None:
        return "none found (set CXX, or install g++ or clang++)"
    try:
        output = subprocess.run([name, "--version"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{name} does not run: {error}"
    return output.stdout.splitlines()[0]


def instruction_sets() -> str:
    """Those of the CPU's vector instruction sets that matter here."""
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        words = set()
    found = [name for name in INSTRUCTION_SETS if name in words]
    return f"{' '.join(found) or 'unknown'} (torch uses {torch.backends.cpu.get_cpu_capability()})"


def environment() -> Iterator[tuple[str, str]]:
    """What there is, and what it is."""
    found = versions()
    yield "fused-margins", found.pop("fused-margins")
    yield "python", f"{found.pop('python')}, {found.pop('system')}"
    yield "packages", ", ".join(f"{name} {value}" for name, value in found.items())
    yield "CPU", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads of torch, {instruction_sets()}"
    yield (
        "GPU",
        ", ".join(map(torch.cuda.get_device_name, range(torch.cuda.device_count()))) or "none that torch can use",
    )
    yield "compiler", compiler()


def backends(device: str) -> Iterator[tuple[str, str]]:
    """Each backend, and which ops it runs on the device, or why it runs none."""
    kind = torch.device(device).type
    for backend in registry.BACKENDS:
        reason = backend.why_not(kind)
        runs = [op for op in registry.OPS if registry.has_kernel(op, backend.name)]
        yield backend.name, f"runs nothing: {reason}" if reason else f"{backend.describe()}: {', '.join(runs)}"


def check(device: str = "cpu") -> tuple[dict[str, list[float]], bool]:
    """Each backend against the reference on random problems, small ones first, for at most about ten seconds.

    Returns:
        Of each loss and backend the largest relative differences of values and gradients, by size of the problem; and
        whether all are within the tolerance. A CPU may be without kernels; a GPU that runs nothing is a fault.
    """
    start, found = time.perf_counter(), dict[str, list[float]]()
    for rows, width, classes in SIZES:
        for name, call in _losses(rows, width, classes, device):
            expected = call("reference")
            problem = registry.problem(LOSSES[name], rows=rows, columns=classes, width=width, device=device)
            for backend in registry.BACKENDS:
                if backend.name == "reference" or registry.refusal(backend, problem) is not None:
                    continue
                if time.perf_counter() - start > CHECK_SECONDS:
                    break
                differences = [relative_difference(a, b) for a, b in zip(expected, call(backend.name))]
                found.setdefault(f"{name} / {backend.name}", []).append(max(differences))
    checked = bool(found) or torch.device(device).type == "cpu"
    return found, checked and all(max(differences) <= TOLERANCE for differences in found.values())


def relative_difference(a: Tensor, b: Tensor) -> float:
    """Largest |a - b| over the largest finite entry of either; 0 where both are 0, infinite where one alone is finite.

    >>> import torch
    >>> from fused_margins.doctor import relative_difference
    >>> relative_difference(torch.tensor([1.0, -4.0]), torch.tensor([1.0, -3.0]))
    0.25
    """
    equal = (a == b) | (a.isnan() & b.isnan())
    difference = torch.where(equal, 0.0, (a - b).abs())
    if not difference.isfinite().all():
        return float("inf")
    if not difference.any():
        return 0.0
    # Of the finite entries: beside an infinity that both have, no difference would count.
    return float(difference.max() / max(x[x.isfinite()].abs().max() for x in (a, b)))


def _losses(rows: int, width: int, classes: int, device: str) -> Iterator[tuple[str, Callable[[str], list[Tensor]]]]:
    """For each of the papers a name, and a function of the backend that returns values and gradients of one problem."""
    generator = torch.Generator().manual_seed(rows)
    embeddings = torch.randn(rows, width, generator=generator).to(device)
    weight = torch.randn(classes, width, generator=generator).to(device)
    labels = torch.randint(classes, (rows,), generator=generator).to(device)
    clusters = torch.arange(rows, device=device) % 4  # four clusters of two classes, none of them empty
    cluster_labels = torch.tensor([0, 0, 1, 1], device=device)

    def margin_softmax(backend: str) -> list[Tensor]:
        x, w = embeddings.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = functional.margin_softmax_loss(x, w, labels, scale=30.0, margin=-0.1, backend=backend)
        return [loss.detach(), *torch.autograd.grad(loss, (x, w))]

    def easy_positives(backend: str) -> list[Tensor]:
        # Indices are compared as well: random embeddings have no ties.
        similarity, index = functional.mine_positives(embeddings, clusters, backend=backend)
        return [similarity, index.float()]

    def magnet(backend: str) -> list[Tensor]:
        x = embeddings.clone().requires_grad_()
        loss = functional.magnet_loss(x, clusters, cluster_labels, alpha=1.0, backend=backend)
        return [loss.detach(), *torch.autograd.grad(loss, x)]

    yield from zip(LOSSES, (margin_softmax, easy_positives, magnet))


def verdict(device: str, found: dict[str, list[float]], agrees: bool) -> str:
    """One sentence."""
    wrong = [name for name, differences in found.items() if not max(differences) <= TOLERANCE]
    if wrong:
        return f"Something is wrong: {', '.join(wrong)} differ from the reference. Please report it with this screen."
    if not found:
        reasons = dict(backends(device))
        kernels = reasons["cpu"] if torch.device(device).type == "cpu" else reasons["triton"]
        return f"Correct but slow: the reference alone runs on {device}. Kernels: {kernels}"
    names = sorted({name.split(" / ")[1] for name in found})
    return f"All is well: the kernels of {' and '.join(names)} agree with the reference on {device}."


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: prints what there is and the verdict; 0 where nothing is wrong."""
    parser = argparse.ArgumentParser(
        prog="fused-margins doctor", description="Versions, backends, and a check of them."
    )
    parser.add_argument("--device", default="cpu", help="to check: cpu, cuda, ...")
    device = parser.parse_args(arguments).device
    try:
        torch.empty(1, device=device)
    except (AssertionError, RuntimeError) as error:
        print(f"error: device: {device!r} cannot be used: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    for name, value in environment():
        print(f"{name:14} {value}")
    print(f"\nBackends on {device}")
    for name, value in backends(device):
        print(f"  {name:12} {value}")
    print(f"\nSelf-check against the reference, tolerance {TOLERANCE:g}: largest relative difference")
    found, agrees = check(device)
    for name, differences in found.items():
        print(f"  {name:24} {max(differences):.1e}   ({len(differences)} sizes)")
    print(f"\n{verdict(device, found, agrees)}")
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(main())
