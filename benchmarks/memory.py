"""What one call adds to a process's memory at its peak.

Each contestant gets a fresh process. There it runs once, so that libraries hold the workspaces that they keep between
calls and compiled code exists; free memory goes back to the system (malloc_trim); the high-water mark of the resident
set is set back to the present (/proc/self/clear_refs); one more call; the mark's growth is the figure: outputs,
gradients and everything in between, but not the inputs. The median of a few such calls, exact to a few tenths of a
MiB. What our kernels keep from call to call goes back to the system before each, and so it counts. Linux only;
elsewhere there is no figure.

On a GPU torch's allocator keeps that account itself, exactly, so that no process is needed: the most bytes that were
allocated at once, beyond those before the call.
"""

import ctypes
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

import fused_margins
from fused_margins.fewshot.memory import PeakMemory

_REPEATS, _PATIENCE_S = 5, 2.0
_TIME_LIMIT_S, _GRACE_S = 300.0, 10.0


class MemoryMeasurementError(RuntimeError):
    """The process that was to measure did not answer."""


def available() -> bool:
    return Path("/proc/self/clear_refs").exists() and hasattr(ctypes.CDLL(None), "malloc_trim")


def peak_growth(step: Callable[[], Any]) -> int:
    """Bytes that one call of `step` adds to this process at its peak."""
    step()
    growth: list[int] = []
    gc.collect()
    gc.freeze()  # the libraries' objects stay; looking at them again and again would take most of the time
    start = time.perf_counter()
    while not growth or (len(growth) < _REPEATS and time.perf_counter() - start < _PATIENCE_S):
        fused_margins.set_memory_budget(fused_margins.memory_budget())  # returns what waits for the next call
        memory = PeakMemory(torch.device("cpu"))
        result = step()
        growth.append(int(memory.mib() * 2**20))
        del result
    return int(statistics.median(growth))


def peak_growth_on_gpu(step: Callable[[], Any]) -> int:
    """Bytes of the GPU's memory that one call of `step` adds at its peak."""
    step()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = step()
    torch.cuda.synchronize()
    growth = torch.cuda.max_memory_allocated() - before
    del result
    return growth


def measure_in_child(row_id: str, contestant: str) -> int:
    """`peak_growth` of a contestant in a process of its own, with the thread count of this one.

    Our kernels take one thread there, as in every forked process: what further threads need for themselves is missing.
    """
    # A fork server has imported torch and this package but never run anything: its children start in milliseconds,
    # with a small resident set and no threads of a parent that OpenMP could stumble over.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.workloads", "torch._inductor.compile_fx"])
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sending, row_id, contestant, torch.get_num_threads()))
    process.start()
    sending.close()
    with receiving:
        try:
            answer = receiving.recv() if receiving.poll(_TIME_LIMIT_S) else f"no answer in {_TIME_LIMIT_S:.0f} s"
        except EOFError:
            answer = "the process ended without an answer"
    process.join(_GRACE_S)
    if process.exitcode is None:
        process.kill()
        process.join()
    if isinstance(answer, str):
        raise MemoryMeasurementError(f"{contestant}, {row_id}: {answer} (exit code {process.exitcode})")
    return answer


def _child(answer: Connection, row_id: str, contestant: str, num_threads: int) -> None:
    try:
        from .workloads import find_row

        torch.set_num_threads(num_threads)
        row = find_row(row_id)
        answer.send(peak_growth(row.workload.contestant(contestant).step(row.inputs())))
    except Exception as error:  # the parent reports it
        answer.send(f"{type(error).__name__}: {error}")
