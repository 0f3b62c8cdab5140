"""Ctrl-C as a request: the step in hand is finished and saved before the run ends. A second Ctrl-C ends it at once.

SIGTERM, which schedulers send, is the same request however often it comes: who means it sends SIGKILL next.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Whether the user has asked to stop."""

    def __init__(self) -> None:
        self.requested = False

    def __call__(self) -> bool:
        return self.requested


@contextmanager
def stop_on_interrupt() -> Iterator[StopRequest]:
    """Within this block SIGINT and SIGTERM set the request instead of raising."""
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield stop
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # Who ignores a signal (nohup, say) goes on ignoring it.
    before = {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}

    def request(number: int, frame: FrameType | None) -> None:
        stop.requested = True
        if signal.SIGINT in before:
            signal.signal(signal.SIGINT, before[signal.SIGINT])

    for number in before:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
