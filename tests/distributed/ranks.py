"""Functions run by several processes of one gloo group.

The processes are forked from one server that has imported what they need, so that a group costs a fraction of a second
instead of an import of torch for each of its ranks.
"""

import multiprocessing
import os
import pickle
import socket
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
    folder: Path | None,
    *args: Any,
    limit_s: float = 120.0,
    timeout_s: float = 60,
) -> list[Any]:
    """What `function(rank, *args)` returns on each of the ranks of a gloo group; fails with what any of them raised.

    folder: one of this test, for the ranks to find one another; None for ranks that make the group themselves, from the
    variables that torchrun sets. limit_s: after which all are killed. timeout_s: of the
    group's collectives.
    """
    workers, pipes = start(function, num_ranks, folder, *args, timeout_s=timeout_s)
    try:
        return _results(pipes, limit_s)
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def start(
    function: Callable[..., Any], num_ranks: int, folder: Path | None, *args: Any, timeout_s: float = 60
) -> tuple[list[Any], list[Connection]]:
    """The processes of `run`, and the pipes by which their results come."""
    place = free_port() if folder is None else str(folder / f"store{len(list(folder.glob('store*')))}")
    pipes = [_context.Pipe(duplex=False) for _ in range(num_ranks)]
    workers = [
        _context.Process(target=_work, args=(function, rank, num_ranks, place, timeout_s, end, args), daemon=True)
        for rank, (_, end) in enumerate(pipes)
    ]
    for worker in workers:
        worker.start()
    for _, end in pipes:
        end.close()
    return workers, [receive for receive, _ in pipes]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


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
    function: Callable[..., Any],
    rank: int,
    num_ranks: int,
    place: str | int,
    timeout_s: float,
    pipe: Connection,
    args: Any,
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.utils.deterministic.fill_uninitialized_memory = True
    if isinstance(place, int):
        os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{num_ranks}"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{place}"}
    else:
        timeout = timedelta(seconds=timeout_s)
        dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=num_ranks, timeout=timeout)
    try:
        result = True, function(rank, *args)
    except BaseException:
        result = False, traceback.format_exc()
    pipe.send_bytes(pickle.dumps(result))  # in bytes, not as memory to share with a process that ends
    pipe.close()
    os._exit(0)  # no farewell to ranks that may be gone
