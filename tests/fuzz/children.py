"""Cases in a forked child: one that ends it, takes too long or too much memory is a finding like any other."""

import json
import os
import resource
import select
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence

SECONDS, CLOCK_SECONDS = 10, 60  # that a case may take of a processor, and of the time on a busy machine
GROWTH_BYTES = 1 << 30
ADDRESS_BYTES = 3 << 30  # beyond what the program has: absurd sizes fail at once

Case = Callable[[int, int], str | None]  # of a seed and a number; what is wrong, or None


def run(case: Case, seed: int, numbers: Sequence[int]) -> Iterator[tuple[int, str]]:
    """What was found, with the number of the case; after a child that died, the next goes on behind that case."""
    while numbers:
        with tempfile.TemporaryFile() as printed:
            source, sink = os.pipe()
            child = os.fork()
            if child == 0:
                os.close(source)
                _work(case, seed, numbers, sink, printed.fileno())
            os.close(sink)
            at, ended = numbers[0], False
            try:
                for line in _lines(source):
                    at, text = json.loads(line)
                    ended = at == -1
                    if text:
                        yield at, text
            except TimeoutError:
                os.kill(child, signal.SIGKILL)
            finally:
                os.close(source)
            _, status = os.waitpid(child, 0)
            if ended:
                return
            printed.seek(0)
            tail = printed.read()[-1500:].decode(errors="replace")
            end = os.waitstatus_to_exitcode(status)
            slow = end in (-signal.SIGPROF, -signal.SIGKILL)
            yield at, f"took longer than {SECONDS} s" if slow else f"the child died with status {end}\n{tail}"
        numbers = numbers[numbers.index(at) + 1 :]


def _lines(source: int) -> Iterator[bytes]:
    """What a child says, line by line; a TimeoutError where it is silent for too long."""
    rest = b""
    while True:
        if not select.select([source], [], [], CLOCK_SECONDS)[0]:
            raise TimeoutError
        data = os.read(source, 1 << 16)
        if not data:
            return
        *lines, rest = (rest + data).split(b"\n")
        yield from lines


def _work(case: Case, seed: int, numbers: Sequence[int], sink: int, printed: int) -> None:
    """The child: before each case its number, after it what is wrong."""

    def say(number: int, text: str = "") -> None:
        os.write(sink, json.dumps([number, text]).encode() + b"\n")

    try:
        sys.stdout.flush()
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESS_BYTES, used + ADDRESS_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for number in numbers:
            say(number)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)  # ends the child
            before = _peak_bytes()
            try:
                text = case(seed, number) or ""
            except Exception:
                text = f"the case itself failed\n{traceback.format_exc()}"
            if _peak_bytes() - before > GROWTH_BYTES:
                text += f"; memory grew by {(_peak_bytes() - before) >> 20} MiB"
            if text:
                say(number, text)
        say(-1)
    finally:
        os._exit(0)


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
