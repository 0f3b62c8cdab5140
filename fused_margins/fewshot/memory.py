"""Peak memory of a stretch of work, as far as the system can tell."""

import contextlib
import resource
import sys
from pathlib import Path

import torch


class PeakMemory:
    """Begins to watch when it is made: a GPU's own count, else the resident memory of this process.

    Linux forgets the former peak of a process on request; elsewhere `mib` is the largest since the process began.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def mib(self) -> float:
        """The peak so far, in MiB.

        >>> PeakMemory(torch.device("cpu")).mib() > 1
        True
        """
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        try:
            status = Path("/proc/self/status").read_text(encoding="utf-8")
            return int(status.split("VmHWM:")[1].split()[0]) / 1024  # it counts in KiB
        except (OSError, IndexError):
            unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
