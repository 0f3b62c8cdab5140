"""What this installation has, what it can run, and whether its backends compute what the reference does."""

import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from .. import functional
from ..backends import registry
from .backends import MAGNET, POSITIVES, SOFTMAX, Call, available
from .parity import relative_difference
from .tables import Table

PACKAGES = ("fused-margins", "torch", "numpy", "scikit-learn", "pydantic", "matplotlib")
INSTRUCTION_SETS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
SELF_CHECK_SECONDS = 10.0
SELF_CHECK_TOLERANCE = 1e-4  # float32 sums of up to some thousand terms, against float32 sums in another order
SIZES = ((8, 5, 4), (65, 17, 33), (128, 64, 64), (256, 512, 200), (512, 128, 1000))  # rows, width, classes


def versions() -> dict[str, str]:
    """Python, the system, and the packages that matter."""
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def compiler() -> str:
    """First line of the C++ compiler's version, or why there is none."""
    name = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if name is None:
        return "none found (set CXX, or install g++ or clang++); only the reference backend can be built without it"
    try:
        output = subprocess.run([name, "--version"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{name} does not run: {error}"
    return output.stdout.splitlines()[0]


def instruction_sets() -> str:
    """Those of the CPU's vector instruction sets that matter here."""
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
        found = [name for name in INSTRUCTION_SETS if name in words]
    except OSError:
        found = []
    return f"{' '.join(found) or 'unknown'} (torch uses {torch.backends.cpu.get_cpu_capability()})"


def environment_table() -> Table:
    rows = [[name, value] for name, value in versions().items()]
    rows += [["compiler", compiler()], ["CPU", f"{os.cpu_count()} cores, {instruction_sets()}"]]
    rows += [["torch threads", str(torch.get_num_threads())]]
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    rows += [["GPU", ", ".join(devices) or "none that torch can use"]]
    return Table("Environment", ["what", "found"], rows, numeric=False)


def backends_table(device: str = "cpu") -> Table:
    """For each op and backend how it would run a batch of 256 x 64 floats, or why it cannot."""
    rows = []
    for op in registry.OPS:
        states = registry.states(op, rows=256, columns=256, width=64, device=device)
        rows += [[f"{op} / {backend}", state] for backend, state in states.items()]
    return Table(f"Backends on {device}", ["op / backend", "state"], rows, numeric=False)


def self_check(device: str = "cpu") -> tuple[Table, bool]:
    """Each available backend against the reference on random problems, small ones first, for at most about ten seconds.

    Returns:
        The table of the largest relative differences of values and gradients, and whether all are within tolerance.
    """
    start = time.perf_counter()
    worst: dict[str, list[float]] = {}
    for rows, width, classes in SIZES:
        for loss_name, needs, call in _losses(rows, width, classes, device):
            expected = call("reference")
            for backend in available(device, [needs]):
                if time.perf_counter() - start > SELF_CHECK_SECONDS:
                    break
                got = call(backend)
                differences = [relative_difference(a, b) for a, b in zip(expected, got)]
                worst.setdefault(f"{loss_name} / {backend}", []).append(max(differences))
    table_rows = [
        [name, str(len(differences)), f"{max(differences):.1e}", "yes" if _agrees(differences) else "NO"]
        for name, differences in worst.items()
    ]
    title = f"Self-check against the reference, tolerance {SELF_CHECK_TOLERANCE:g}"
    table = Table(title, ["loss / backend", "sizes", "largest relative difference", "agrees"], table_rows)
    # A CPU may be without compiled kernels, which the table of backends says; a GPU that runs nothing is a fault.
    checked = bool(worst) or torch.device(device).type == "cpu"
    return table, checked and all(_agrees(differences) for differences in worst.values())


def _agrees(differences: list[float]) -> bool:
    return max(differences) <= SELF_CHECK_TOLERANCE


def _losses(
    rows: int, width: int, classes: int, device: str
) -> Iterator[tuple[str, Call, Callable[[str], list[Tensor]]]]:
    """Name, what it calls, and a function of the backend that returns values and gradients, of one problem for each of
    the papers."""
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

    def positives(backend: str) -> list[Tensor]:
        # Indices are compared as well: random embeddings have no ties.
        similarity, index = functional.mine_positives(embeddings, clusters, backend=backend)
        return [similarity, index.float()]

    def magnet(backend: str) -> list[Tensor]:
        x = embeddings.clone().requires_grad_()
        loss = functional.magnet_loss(x, clusters, cluster_labels, alpha=1.0, backend=backend)
        return [loss.detach(), *torch.autograd.grad(loss, x)]

    yield "margin softmax", SOFTMAX, margin_softmax
    yield "easy positives", POSITIVES, positives
    yield "magnet", MAGNET, magnet
