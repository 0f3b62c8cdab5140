"""Memory of a process: what is freed stays for the next step, and what a stretch of work takes at its peak."""

import contextlib
import ctypes
import gc
import resource
import sys
from pathlib import Path

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt: glibc's malloc.h


def keep_freed_memory() -> None:
    """For the rest of the process, glibc keeps what is freed instead of giving it back to the system.

    Every step of a training frees large tensors and asks for such again. By default glibc maps and unmaps each, and the
    system fills its pages with zeros: a fifth of the time of a Conv4 on one thread. Without glibc nothing changes.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


class PeakMemory:
    """Begins to watch when it is made: a GPU's own count, else the growth of this process's resident memory.

    Linux forgets the former peak of a process on request; elsewhere the largest since the process began counts. What
    former work has freed goes back to the system first (glibc keeps it else), or this work would grow into it unseen.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self.before_mib = self._process_mib("VmRSS")

    def mib(self) -> float:
        """The peak so far, in MiB.

        >>> memory = PeakMemory(torch.device("cpu"))
        >>> filled = torch.ones(16 << 20)  # 64 MiB
        >>> memory.mib() > 60
        True
        """
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        return max(0.0, self._process_mib("VmHWM") - self.before_mib)

    def _process_mib(self, entry: str) -> float:
        try:
            status = Path("/proc/self/status").read_text(encoding="utf-8")
            return int(status.split(f"{entry}:")[1].split()[0]) / 1024  # it counts in KiB
        except (OSError, IndexError):
            unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
