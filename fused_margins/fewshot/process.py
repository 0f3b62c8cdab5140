"""What a process has: its threads, its memory, and the signals that ask it to stop."""

import contextlib
import ctypes
import gc
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from .errors import UserError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt: glibc's malloc.h


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def started_ranks() -> int:
    """Processes that torchrun started, before they are a group."""
    return int(os.environ.get("WORLD_SIZE", 1))


def check_alone(command: str) -> None:
    """Refuse what is no training where torchrun starts several processes, each of which would do it."""
    if started_ranks() > 1:
        raise UserError(
            f"torchrun: {command} runs in one process (a study has --workers), got {started_ranks()}; train has ranks"
        )


def check_threads(threads: int | None) -> None:
    """Refuse more threads than can be meant: a process that cannot start them ends without a word."""
    most = max(64, 4 * available_cores())  # 64 in any case, so that runs of larger machines are resumed
    if threads is not None and threads > most:
        raise UserError(f"threads: expected at most {most} on this machine, got {threads}")


def set_threads(threads: int | None) -> int:
    """From now on torch takes so many threads, by default as many as before: their number."""
    check_threads(threads)
    threads = threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    return threads


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


@contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Within this block SIGINT and SIGTERM do not end what runs: the function that is given says whether one came.

    So the step in hand is finished and saved before the run ends. A second Ctrl-C ends it at once. SIGTERM, which
    schedulers send, asks for the same however often it comes: who means it sends SIGKILL next.
    """
    # Who ignores a signal (nohup, say) goes on ignoring it.
    heeded = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    interrupt, came = signal.getsignal(signal.SIGINT), list[int]()

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        signal.signal(signal.SIGINT, interrupt)

    with handling(heeded, note):
        yield lambda: bool(came)


@contextmanager
def handling(numbers: Iterable[signal.Signals], handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Within this block the signals have this handler; only the main thread may set one, elsewhere nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
