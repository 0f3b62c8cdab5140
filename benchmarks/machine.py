"""Where and with what a run was made: the machine, the versions, the commit."""

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
        name = f"{self.processor} {self.instruction_set}".lower()
        return f"cpu-{re.sub(r'[^a-z0-9]+', '-', name).strip('-')}-{self.threads}t"

    def __str__(self) -> str:
        return f"{self.processor}, {self.threads} of {self.cpus} CPUs, kernels for {self.instruction_set}"


class RunsWith(BaseModel):
    """What a run is made with, taken once when it begins: the code is loaded then."""

    commit: str
    versions: dict[str, str]
    load_before: float  # of the machine: above about 0.3, somebody else was working

    @classmethod
    def now(cls) -> "RunsWith":
        return cls(commit=_commit(), versions=_versions(), load_before=os.getloadavg()[0])


def this_machine() -> Machine:
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


def _commit() -> str:
    """Of the code that runs, "+" for uncommitted changes to it (results and README apart), "unknown" outside a
    checkout."""
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
