"""Children that are forked from a process which has imported everything, in place of importing it again."""

import faulthandler
import multiprocessing
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

runs_backward = pytest.mark.skipif(
    torch.backends.cuda.is_built(),
    reason="a CUDA build of torch runs no backward in a forked child, once its parent ran one",
)


class Forked:
    """A process that runs `function(*args)` on one thread."""

    def __init__(self, function: Callable[..., object], *args: Any) -> None:
        if "fork" not in multiprocessing.get_all_start_methods():
            pytest.skip("no fork here")
        self.printed = tempfile.TemporaryFile("w+")  # noqa: SIM115  # until there is a result
        self.process = multiprocessing.get_context("fork").Process(target=self._run, args=(function, *args))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of the parent's threads, which the child does without
            self.process.start()

    def _run(self, function: Callable[..., object], *args: Any) -> None:
        for standard in (1, 2):
            os.dup2(self.printed.fileno(), standard)
        sys.stdout, sys.stderr = (os.fdopen(standard, "w", buffering=1, closefd=False) for standard in (1, 2))
        faulthandler.enable(sys.stderr)
        torch.set_num_threads(1)
        function(*args)

    def result(self, timeout: float = 60.0) -> tuple[int | None, str]:
        """Its exit code, or minus the signal that ended it, and all that it printed."""
        self.process.join(timeout)
        if self.process.exitcode is None and self.process.pid is not None:
            os.kill(self.process.pid, signal.SIGABRT)  # one that hangs says where
            self.process.join(5)
        self.process.kill()  # and would fail other tests as well
        self.process.join()
        with self.printed:
            self.printed.seek(0)
            return self.process.exitcode, self.printed.read()
