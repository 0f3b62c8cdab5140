"""Where and with what a run was made: the machine, the versions, the commit."""

import contextlib
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from pydantic import BaseModel

from fused_margins.ops import native

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "numpy", "pytorch-metric-learning", "fused-margins")


class Machine(BaseModel):
    """What has to be the same for two rows to stand in one file."""

    processor: str
    cpus: int
    threads: int
    instruction_set: str

    @property
    def kind(self) -> str:
        """The name of its results file, such as cpu-amd-epyc-x86-64-v4-2t."""
        # Virtual machines give processors of several kinds one name: the instruction set tells some of them apart.
        name = f"{self.processor} {self.instruction_set}"
        return f"cpu-{_slug(name)}-{self.threads}t"

    @property
    def file(self) -> Path:
        """Within the folder of results."""
        return Path(f"{self.kind}.json")

    def __str__(self) -> str:
        return f"{self.processor}, {self.threads} of {self.cpus} CPUs, kernels for {self.instruction_set}"


class Gpu(BaseModel):
    """The same of a GPU: machines that have it differ in the rest, which `RunsWith` names."""

    gpu: str

    @property
    def kind(self) -> str:
        """Such as nvidia-h100-80gb-hbm3."""
        return _slug(self.gpu)

    @property
    def file(self) -> Path:
        return Path(self.kind, "results.json")

    def __str__(self) -> str:
        return self.gpu


class RunsWith(BaseModel):
    """What a run is made with, taken once when it begins: the code is loaded then."""

    commit: str
    versions: dict[str, str]
    load_before: float  # of the machine: above about 0.3, somebody else was working

    @classmethod
    def now(cls, device: str = "cpu") -> "RunsWith":
        versions = _versions() | (_gpu_versions() if device == "cuda" else {})
        return cls(commit=_commit(), versions=versions, load_before=os.getloadavg()[0])


def this_machine(device: str = "cpu") -> Machine | Gpu:
    if device == "cuda":
        return Gpu(gpu=torch.cuda.get_device_name())
    return Machine(
        processor=_processor(),
        cpus=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        instruction_set="none" if native.module is None else native.module.instruction_set(),
    )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.release()}"}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _gpu_versions() -> dict[str, str]:
    found = {
        "driver": "unknown",
        "cuda": torch.version.cuda or "none",
        "processor": f"{_processor()}, {os.cpu_count()} CPUs",
    }
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError, IndexError):
        found["driver"] = subprocess.run(query, check=True, capture_output=True, text=True).stdout.split()[0]
    try:
        found["triton"] = version("triton")
    except PackageNotFoundError:
        found["triton"] = "not installed"
    return found


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _commit() -> str:
    """Of the code that runs, "+" for uncommitted changes to it (results and README apart). In a copy without its
    history what FUSED_MARGINS_COMMIT says, or "unknown"."""
    if not (ROOT / ".git").exists():
        return os.environ.get("FUSED_MARGINS_COMMIT", "unknown")
    try:
        head = _git("rev-parse", "--short=10", "HEAD")
        changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!README.md")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}+" if changed else head


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())
        if match:
            return match[1].strip()
    return platform.processor() or platform.machine() or sys.platform
