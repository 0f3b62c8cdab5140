"""Many jobs in several processes."""

import os
import signal
import threading
import time

import pytest
import torch

from fused_margins.fewshot.jobs import available_cores, run_all


def square(number):
    return number * number, os.getpid(), torch.get_num_threads()


def refuse(number):
    raise ValueError(f"job {number} failed")


def test_results_come_in_order_from_processes_of_one_thread():
    results = run_all(square, [3, 1, 2], "squaring", workers=2)
    assert [r[0] for r in results] == [9, 1, 4]
    assert os.getpid() not in {r[1] for r in results}
    assert {r[2] for r in results} == {1}


def test_a_single_worker_is_this_process():
    results = run_all(square, [3, 1], "squaring", workers=1)
    assert [r[:2] for r in results] == [(9, os.getpid()), (1, os.getpid())]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_job_that_fails_fails_them_all(workers):
    with pytest.raises(ValueError, match=r"job . failed"):
        run_all(refuse, [1, 2, 3], "failing", workers=workers)


def test_there_is_a_core():
    assert available_cores() >= 1


def wait(number):
    time.sleep(60)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_workers_at_once(number):
    start = time.monotonic()
    before = signal.getsignal(signal.SIGTERM)
    interrupt = threading.Timer(2.0, lambda: os.kill(os.getpid(), number))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        run_all(wait, [1, 2], "waiting", workers=2)
    assert time.monotonic() - start < 30
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is before
