"""Functions run by several processes of one gloo group.

The processes are forked from one server that has imported what they need, so that a group costs a fraction of a second
instead of an import of torch for each of its ranks.
"""

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # which the first DTensor imports, for seconds
from torch import distributed as dist

import fused_margins.functional  # noqa: F401  # what the server imports for all
from fused_margins.distributed import collectives  # noqa: F401

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([__name__, "pytest"])


def run(
    function: Callable[..., Any],
    num_ranks: int,
    folder: Path,
    *args: Any,
    limit_s: float = 120.0,
    timeout_s: float = 60,
) -> list[Any]:
    """What `function(rank, *args)` returns on each of the ranks of a gloo group; fails with what any of them raised.

    folder: an empty one, for the ranks to find one another. limit_s: after which all are killed. timeout_s: of the
    group's collectives.
    """
    store = folder / f"store{len(list(folder.glob('store*')))}"
    pipes = [_context.Pipe(duplex=False) for _ in range(num_ranks)]
    workers = [
        _context.Process(target=_work, args=(function, rank, num_ranks, str(store), timeout_s, end, args), daemon=True)
        for rank, (_, end) in enumerate(pipes)
    ]
    for worker in workers:
        worker.start()
    for _, end in pipes:
        end.close()
    try:
        return _results([receive for receive, _ in pipes], limit_s)
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def _results(pipes: list[Connection], limit_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    waiting = dict(zip(pipes, range(len(pipes))))
    failures = []
    while waiting:
        ready = wait(list(waiting), timeout=limit_s)
        if not ready:
            failures.append(f"ranks {sorted(waiting.values())} did not end within {limit_s} s")
            break
        for pipe in ready:
            rank = waiting.pop(pipe)  # type: ignore[index, arg-type]
            try:
                ended_well, results[rank] = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                ended_well, results[rank] = False, "died"
            if not ended_well:
                failures.append(f"rank {rank}: {results[rank]}")
                limit_s = min(limit_s, 5.0)  # the others wait for it, and say nothing new
    assert not failures, "\n".join(failures)
    return [results[rank] for rank in range(len(pipes))]


def _work(
    function: Callable[..., Any], rank: int, num_ranks: int, store: str, timeout_s: float, pipe: Connection, args: Any
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.utils.deterministic.fill_uninitialized_memory = True
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks, timeout=timeout)
    try:
        result = True, function(rank, *args)
    except BaseException:
        result = False, traceback.format_exc()
    pipe.send_bytes(pickle.dumps(result))  # in bytes, not as memory to share with a process that ends
    pipe.close()
    os._exit(0)  # no farewell to ranks that may be gone
