"""Where and with what a run was made: the machine, the versions, the commit."""

import contextlib
import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch

from fused_margins.backends import cpu

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "numpy", "pytorch-metric-learning", "fused-margins")
ON_GPU = ("triton", "liger-kernel", "cut-cross-entropy", "quack-kernels", "nvidia-cutlass-dsl", "flash-kmeans")


@dataclass(frozen=True)
class Machine:
    """What has to be the same for two rows to stand in one file, and the name of that file."""

    name: str
    kind: str  # such as cpu-amd-epyc-x86-64-v4-2t, nvidia-h100-80gb-hbm3


@dataclass(frozen=True)
class RunsWith:
    """What a run is made with, taken once when it begins: the code is loaded then."""

    date: str
    commit: str
    load_before: float  # of the machine: above about 0.3, somebody else was working
    versions: dict[str, str]
    peak_gflops: float | None = None  # of float32 on these threads, by a loop of nothing else

    @classmethod
    def now(cls, device: str = "cpu", peak_gflops: float | None = None) -> "RunsWith":
        versions = {"python": platform.python_version(), "system": f"{platform.system()} {platform.release()}"}
        versions |= {package: _version(package) for package in PACKAGES}
        if device == "cuda":
            versions["cuda"] = torch.version.cuda or "none"
            versions |= {package: _version(package) for package in ON_GPU}
            versions["processor"] = f"{_processor()}, {os.cpu_count()} CPUs"
        date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
        return cls(date, _commit(), round(os.getloadavg()[0], 2), versions, peak_gflops)


def this_machine(device: str = "cpu") -> Machine:
    if device == "cuda":
        return Machine(torch.cuda.get_device_name(), _slug(torch.cuda.get_device_name()))
    # Virtual machines give processors of several kinds one name: the instruction set tells some of them apart.
    threads, isa = torch.get_num_threads(), "none" if cpu.module is None else cpu.module.instruction_set()
    name = f"{_processor()}, {threads} of {os.cpu_count()} CPUs, kernels for {isa}"
    return Machine(name, f"cpu-{_slug(f'{_processor()} {isa}')}-{threads}t")


def _version(package: str) -> str:
    """With its commit, where it was installed from a repository."""
    try:
        found = distribution(package)
    except PackageNotFoundError:
        return "not installed"
    commit = json.loads(found.read_text("direct_url.json") or "{}").get("vcs_info", {}).get("commit_id")
    return f"{found.version} ({commit[:10]})" if commit else found.version


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _commit() -> str:
    """Of the code that runs, "+" for uncommitted changes to it (results and documentation apart). In a copy without its
    history what FUSED_MARGINS_COMMIT says, or "unknown"."""
    git = ["git", "-C", str(ROOT)]
    changes = [*git, "status", "--porcelain", "--", ".", ":!benchmarks/results", ":!README.md", ":!docs"]
    if (ROOT / ".git").exists():
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            head = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], check=True, capture_output=True, text=True)
            changed = subprocess.run(changes, check=True, capture_output=True).stdout
            return head.stdout.strip() + ("+" if changed else "")
    return os.environ.get("FUSED_MARGINS_COMMIT", "unknown")


def _processor() -> str:
    with contextlib.suppress(OSError):
        if match := re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()):
            return match[1].strip()
    return platform.processor() or platform.machine() or sys.platform
