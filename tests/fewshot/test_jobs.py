"""Many jobs in several processes."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress

import pytest
import torch

from fused_margins.fewshot.process import available_cores, stop_on_interrupt
from fused_margins.fewshot.suite import run_all
from fused_margins.fewshot.terminal import UserError


@pytest.fixture
def forked(monkeypatch):
    """Workers that are forked from a process that has imported everything; as users start them, each imports torch.

    So do those of `test_results_come_from_processes_of_one_thread`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._dynamo"])
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)


def interrupt(when, *numbers):
    """Once `when()` is true, this process gets these signals, a second apart."""

    def send():
        while not when():
            time.sleep(0.01)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(1)

    threading.Thread(target=send).start()


def square(number):
    return number * number, os.getpid(), torch.get_num_threads()


def refuse(number):
    raise ValueError(f"job {number} failed")


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_done_meanwhile_ends_before_the_first_job_begins_and_its_error_ends_all(forked, workers):
    order = []
    run_all(square, [1, 2], "", workers, on_result=lambda *_: order.append("job"), meanwhile=lambda: order.append("it"))
    assert order == ["it", "job", "job"]
    with pytest.raises(ValueError, match="job 7 failed"):
        run_all(square, [1, 2], "", workers, on_result=lambda *_: pytest.fail("done"), meanwhile=lambda: refuse(7))
    assert not multiprocessing.active_children()


def test_results_come_from_processes_of_one_thread():
    results = {}
    run_all(square, [3, 1, 2], "squaring", workers=2, on_result=results.__setitem__)
    assert {item: result[0] for item, result in results.items()} == {1: 1, 2: 4, 3: 9}
    assert os.getpid() not in {result[1] for result in results.values()}
    assert {result[2] for result in results.values()} == {1}


def test_a_single_worker_is_this_process():
    results = {}
    run_all(square, [3, 1], "squaring", workers=1, on_result=results.__setitem__)
    assert [result[:2] for result in results.values()] == [(9, os.getpid()), (1, os.getpid())]


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_job_that_fails_fails_them_all(workers):
    with pytest.raises(ValueError, match=r"job . failed"):
        run_all(refuse, [1, 2, 3], "failing", workers=workers)


def test_there_is_a_core():
    assert available_cores() >= 1


def wait(number):
    time.sleep(60)


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_workers_at_once(number):
    start = time.monotonic()
    before = signal.getsignal(signal.SIGTERM)
    interrupt(lambda: time.monotonic() > start + 1, number)
    with pytest.raises(KeyboardInterrupt):
        run_all(wait, [1, 2], "waiting", workers=2)
    assert time.monotonic() - start < 30
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is before


def train(place):
    """As a training does: it goes on until it is asked to stop, and then takes a moment to save."""
    with stop_on_interrupt() as stop:
        place.with_suffix(".begun").touch()
        while not stop():
            time.sleep(0.01)
    time.sleep(0.5)
    place.with_suffix(".saved").touch()
    raise KeyboardInterrupt


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_after_an_interrupt_no_job_begins_and_those_that_run_are_saved(number, tmp_path):
    interrupt(lambda: len(list(tmp_path.glob("*.begun"))) == 2, number)
    with pytest.raises(KeyboardInterrupt):
        run_all(train, [tmp_path / str(i) for i in range(12)], "training", workers=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.begun", "0.saved", "1.begun", "1.saved"]


def test_workers_of_a_parent_that_is_killed_save_and_end(tmp_path):
    program = (
        "import sys; from pathlib import Path; from tests.fewshot.test_jobs import run_all, train; "
        "run_all(train, [Path(sys.argv[1]) / name for name in 'ab'], 'training', workers=2)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)])
    wait_for(lambda: len(list(tmp_path.glob("*.begun"))) == 2)
    parent.kill()
    parent.wait()
    wait_for(lambda: len(list(tmp_path.glob("*.saved"))) == 2)


def wait_for(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.05)


def train_while_another_is_idle(place):
    """The first ends at once, and its worker waits for work; the second sees all its signals late, and as one."""
    if place.name == "0":
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    with stop_on_interrupt() as stop:
        place.with_suffix(".begun").touch()
        time.sleep(1)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        while not stop():
            time.sleep(0.01)
    place.with_suffix(".saved").touch()
    raise KeyboardInterrupt


@pytest.mark.usefixtures("forked")
def test_an_idle_worker_that_ends_holds_up_nobody(tmp_path):
    start, begun = time.monotonic(), tmp_path / "1.begun"
    # A moment after it: the other is back at its queue.
    interrupt(lambda: begun.exists() and time.time() > begun.stat().st_mtime + 0.2, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run_all(train_while_another_is_idle, [tmp_path / "0", tmp_path / "1"], "training", workers=2)
    assert time.monotonic() - start < 30
    assert (tmp_path / "1.saved").exists()


def train_through_signals(place):
    with stop_on_interrupt() as stop:
        place.with_suffix(".begun").touch()
        while not stop():
            time.sleep(0.01)
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
    place.with_suffix(".saved").touch()
    raise KeyboardInterrupt


@pytest.mark.usefixtures("forked")
def test_a_repeated_sigterm_does_not_keep_a_training_from_saving(tmp_path):
    interrupt(lambda: len(list(tmp_path.glob("*.begun"))) == 2, signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        run_all(train_through_signals, [tmp_path / "0", tmp_path / "1"], "training", workers=2)
    assert len(list(tmp_path.glob("*.saved"))) == 2


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("calls", [1, 2])
def test_an_interrupt_while_a_worker_starts_is_not_lost_and_leaves_none(monkeypatch, number, calls):
    submit, submitted = ProcessPoolExecutor.submit, []

    def interrupted(*args):
        submitted.append(args)
        if len(submitted) == calls:
            signal.raise_signal(number)
        return submit(*args)

    monkeypatch.setattr(ProcessPoolExecutor, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_all(square, [1, 2], "squaring", workers=2)
    assert len(submitted) == calls
    assert not multiprocessing.active_children()


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_that_an_import_swallows_is_not_lost(number):
    def swallow():
        with suppress(BaseException):
            signal.raise_signal(number)

    with pytest.raises(KeyboardInterrupt):
        run_all(square, [1, 2], "", 2, on_result=lambda *_: pytest.fail("done"), meanwhile=swallow)
    assert not multiprocessing.active_children()


def end(number):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.usefixtures("forked")
def test_a_worker_that_is_killed_is_told_in_one_line():
    with pytest.raises(UserError, match=r"ending: a worker was killed from outside"):
        run_all(end, [1, 2], "ending", workers=2)


def refuse_to_end(place):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    place.touch()
    time.sleep(60)


@pytest.mark.usefixtures("forked")
def test_a_second_interrupt_does_not_wait(tmp_path):
    start = time.monotonic()
    interrupt(lambda: len(list(tmp_path.iterdir())) == 2, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run_all(refuse_to_end, [tmp_path / str(i) for i in range(4)], "refusing", workers=2)
    assert time.monotonic() - start < 30
