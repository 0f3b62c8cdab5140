"""What one call adds to a process's memory at its peak.

Each implementation gets a fresh process. There it runs once, so that libraries hold the workspaces that they keep
between calls and compiled code exists; free memory goes back to the system (malloc_trim); the high-water mark of the
resident set is set back to the present (/proc/self/clear_refs); one more call; the mark's growth is the figure:
outputs, gradients and everything in between, but not the inputs. The median of a few such calls is exact to a few
tenths of a MiB. What our kernels save for the next call goes back to the system before each, so it counts. Linux only.

On a GPU torch's allocator keeps that account itself, exactly: the most bytes allocated at once, beyond those before.
"""

import ctypes
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

import fused_margins

_REPEATS, _PATIENCE_S, _TIME_LIMIT_S = 5, 2.0, 300.0


def available() -> bool:
    return Path("/proc/self/clear_refs").exists() and hasattr(ctypes.CDLL(None), "malloc_trim")


def peak_growth(step: Callable[[], Any], calls: int = _REPEATS) -> int:
    """Bytes that a call of `step` adds to this process at its peak: the median of some calls, or of fewer slow ones."""
    step()
    growth: list[int] = []
    gc.collect()
    gc.freeze()  # the libraries' objects stay; looking at them again and again would take most of the time
    start = time.perf_counter()
    while not growth or (len(growth) < calls and time.perf_counter() - start < _PATIENCE_S):
        fused_margins.set_memory_budget(fused_margins.memory_budget())  # returns what waits for the next call
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _bytes_of("VmRSS")
        result = step()
        growth.append(max(0, _bytes_of("VmHWM") - before))
        del result
    return int(statistics.median(growth))


def _bytes_of(entry: str) -> int:
    """Of this process, which the system counts in KiB."""
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{entry}:")[1].split()[0])


def peak_growth_on_gpu(step: Callable[[], Any]) -> int:
    """Bytes of the GPU's memory that one call of `step` adds at its peak."""
    step()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure_in_child(row_id: str, implementation: str) -> int:
    """`peak_growth` of an implementation in a process of its own, with the thread count of this one.

    Our kernels take one thread there, as in every forked process: what further threads need for themselves is missing.
    """
    # A fork server has imported torch and this package but never run anything: its children start in milliseconds,
    # with a small resident set and no threads of a parent that OpenMP could stumble over.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.workloads", "torch._inductor.compile_fx"])
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(_in_child, row_id, implementation, torch.get_num_threads()).result(_TIME_LIMIT_S)


def _in_child(row_id: str, implementation: str, num_threads: int) -> int:
    from .workloads import find_row

    torch.set_num_threads(num_threads)
    row = find_row(row_id)
    return peak_growth(row.workload.implementation(implementation).step(row.inputs()))
