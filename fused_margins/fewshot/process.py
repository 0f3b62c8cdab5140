"""What a process has: its threads, its memory, the signals that ask it to stop, and the ranks that it is one of.

torchrun starts the ranks of a training: each embeds its share of every batch, and all see the same loss. All draw the
same batches and the same augmentation from the same generator, exchange their embeddings, and compute the loss of the
whole batch, whatever the loss. So numbers are those of one process to rounding, but for batch norms, which see a rank's
share alone (their running statistics are averaged), and dropped features, which each rank draws.
"""

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
from torch import Tensor, nn
from torch import distributed as dist

from ..core.ranks import num_ranks, own_rank
from .terminal import UserError, console

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


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Within this block the ranks that torchrun started are a process group, of which the first alone speaks."""
    if started_ranks() == 1:
        yield
        return
    on_gpus = device.startswith("cuda")
    if on_gpus:
        if device != "cuda":
            raise UserError(f"device: expected cuda, of which each rank takes its own, got {device}")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpus else "gloo")
    console.quiet = own_rank() > 0
    try:
        yield
    finally:
        console.quiet = False
        dist.destroy_process_group()


def check_share(rows: int) -> None:
    """Refuse batches of which a rank would get no rows."""
    if rows < num_ranks():
        raise UserError(f"batch_size: expected at least a sample for each of {num_ranks()} ranks, got {rows}")


def replica(network: nn.Module) -> nn.Module:
    """The network as it is trained: on several ranks with their gradients averaged."""
    if num_ranks() == 1:
        return network
    return nn.parallel.DistributedDataParallel(network)


def embed_share(network: nn.Module, images: Tensor, generator: torch.Generator | None) -> Tensor:
    """Embeddings (B, D) of a batch (B, ...) by a `replica`, in which each rank computes its own rows."""
    if num_ranks() == 1:
        return network(images, generator)
    from ..distributed.collectives import replicate_rows, scale_gradient  # a second to import, which one rank saves

    if generator is not None:
        generator.manual_seed(generator.initial_seed() + own_rank())
    shares = images.tensor_split(num_ranks())
    embeddings = scale_gradient(network(shares[own_rank()], generator), num_ranks())  # the sum, of the average
    return replicate_rows(embeddings, [len(share) for share in shares])


def average_statistics(network: nn.Module) -> None:
    """Give the running statistics of all ranks their mean, so that they embed the same."""
    for statistics in network.buffers() if num_ranks() > 1 else ():
        if statistics.is_floating_point():
            dist.all_reduce(statistics)
            statistics.div_(num_ranks())


def together(stop: Callable[[], bool], device: torch.device) -> Callable[[], bool]:
    """Whether any rank was asked to stop: all of them have to stop after the same step."""
    if num_ranks() == 1:
        return stop

    def any_stops() -> bool:
        asked = torch.tensor(int(stop()), device=device)
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        return bool(asked)

    return any_stops
