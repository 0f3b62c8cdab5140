"""Peak memory is that of the work itself, whatever was there before it; and an interrupt is a request."""

import platform
import signal
import sys
import threading

import pytest
import torch

from fused_margins.fewshot.process import PeakMemory, keep_freed_memory, stop_on_interrupt
from tests.forks import Forked

CPU = torch.device("cpu")
MIB = 1 << 18  # numbers of float32


def _work() -> list[torch.Tensor]:
    """64 MiB in pieces that malloc takes from its heap, with something small behind them that keeps the heap long."""
    pieces = [torch.ones(MIB) for _ in range(64)]
    kept = torch.ones(64)
    del pieces
    return [kept]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux forgets a former peak")
def test_what_former_work_has_freed_counts_again():
    torch.ones(24 * MIB)  # malloc then takes pieces of a MiB from its heap
    kept = [_work() for _ in range(2)]
    memory = PeakMemory(CPU)
    kept.append(_work())
    assert 55 < memory.mib() < 200


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux forgets a former peak")
def test_a_former_peak_does_not_count():
    torch.ones(100 * MIB)
    assert PeakMemory(CPU).mib() < 30


def freed_and_kept():
    for keeps in (False, True):
        if keeps:
            keep_freed_memory()
        memory = PeakMemory(CPU)
        filled = torch.ones(256 * MIB)  # more than any hole in the heap that other tests may have left
        del filled
        print(memory._process_mib("VmRSS") - memory.before_mib)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="without glibc nothing changes")
def test_what_is_freed_stays_where_that_was_asked_for():
    code, printed = Forked(freed_and_kept).result()
    assert code == 0, printed
    freed, kept = map(float, printed.split())
    assert freed < 60 < kept


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_becomes_a_request_and_the_handler_comes_back(number):
    before = signal.getsignal(number)
    with stop_on_interrupt() as stop:
        assert not stop()
        signal.raise_signal(number)
        assert stop()
    assert signal.getsignal(number) is before


def test_a_second_interrupt_interrupts():
    def interrupted_twice():
        with stop_on_interrupt():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        interrupted_twice()


def test_outside_the_main_thread_nothing_is_asked():
    answers = []

    def work():
        with stop_on_interrupt() as stop:
            answers.append(stop())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert answers == [False]
