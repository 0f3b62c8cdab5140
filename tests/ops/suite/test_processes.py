"""Kernels in forked and spawned processes and in several threads of Python, beside torch's own threads."""

import multiprocessing
import sys
import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fused_margins.functional import margin_softmax_loss, mine_positives
from fused_margins.ops.nearest import nearest
from tests.forks import runs_backward


@pytest.fixture(autouse=True)
def _needs_cpu(device_for):
    device_for("contrast", "cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def work(seed: int = 0, rows: int = 256, classes: int = 3000) -> tuple[Tensor, ...]:
    """A loss, its gradients and a search, large enough for several threads."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 64, generator=g).requires_grad_()
    weight = torch.randn(classes, 64, generator=g).requires_grad_()
    labels = torch.randint(classes, (rows,), generator=g)
    loss = margin_softmax_loss(x, weight, labels, margin=-0.1, backend="cpu")
    index = mine_positives(x.detach(), labels % 8, backend="cpu")[1]
    return loss.detach(), *torch.autograd.grad(loss, (x, weight)), index


def put_work(queue: Any) -> None:
    torch.set_num_threads(1)  # as in the workers of a DataLoader: torch's own threads do not survive a fork
    queue.put([t.tolist() for t in (work()[0], work()[3])])


class Worked(Dataset[Tensor]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        return work(index)[0]


@pytest.mark.parametrize("method", [pytest.param("fork", marks=runs_backward), "spawn"])
def test_a_child_computes_what_its_parent_does(method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    expected = work()  # the parent's threads exist before the fork
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=put_work, args=(queue,))
    child.start()
    loss, index = queue.get(timeout=60)
    child.join(timeout=60)
    assert child.exitcode == 0
    assert loss == expected[0].item()
    assert index == expected[3].tolist()


def put_choice(queue: Any, x: Tensor, labels: Tensor) -> None:
    queue.put(nearest(x, x, labels, labels, relation="different", backend="cpu")[1].tolist())


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
def test_a_kernel_in_a_forked_child_does_not_wait_for_its_parents_threads():
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    x, labels = torch.randn(512, 256), torch.arange(512) % 3
    put_choice(queue, x, labels)  # with two threads
    child = context.Process(target=put_choice, args=(queue, x, labels))
    child.start()
    try:
        assert queue.get(timeout=20) == queue.get(timeout=20)
    finally:
        child.kill()


@runs_backward
@pytest.mark.skipif(sys.platform != "linux", reason="workers fork by default on Linux alone")
def test_data_loader_workers():
    expected = [work(i)[0] for i in range(4)]
    loader = DataLoader(Worked(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
    assert [t.item() for t in loader] == [t.item() for t in expected]


def test_threads_of_python_at_once():
    expected = work()
    results: list[tuple[Tensor, ...]] = []
    threads = [threading.Thread(target=lambda: results.append(work())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result, expected))


def test_other_threads_run_while_a_kernel_does():
    """A kernel that held the interpreter's lock would let the counter rise by nothing."""
    x, weight, labels = torch.randn(1024, 512), torch.randn(20_000, 512), torch.zeros(1024, dtype=torch.long)
    running, counted = threading.Event(), []

    def count() -> None:
        running.set()
        while running.is_set():
            counted.append(time.perf_counter())

    counter = threading.Thread(target=count)
    counter.start()
    try:
        start = time.perf_counter()
        margin_softmax_loss(x, weight, labels, backend="cpu")
        end = time.perf_counter()
    finally:
        running.clear()
        counter.join()
    assert sum(start < t < end for t in counted) > 10


def test_torch_keeps_its_threads():
    torch.set_num_threads(2)
    work()
    assert torch.get_num_threads() == 2
    a = torch.randn(300, 300)
    assert torch.equal(a @ a, a @ a)
