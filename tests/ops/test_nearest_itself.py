"""A batch searched against itself: the CPU kernel serves both rows of a product by it, and nobody can tell."""

import pytest
import torch
from fused_margins.ops.similarity import RELATIONS, SIMILARITIES

from fused_margins.ops import native
from fused_margins.ops.nearest import kernel_cpu, nearest

ROWS = 1700  # several chunks, the last of them ragged
WIDTH = 6


@pytest.fixture(autouse=True)
def _on_a_cpu(device_for):
    device_for("nearest", "cpu")


def _batch(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Few different values, rows that occur twice: ties everywhere. Two classes fill whole chunks, others are small."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-2, 3, (ROWS, WIDTH), generator=generator).to(dtype)
    x[ROWS - 400 :] = x[:400]
    labels = torch.randint(40, (ROWS,), generator=generator)
    labels[torch.rand(ROWS, generator=generator) < 0.7] = 7
    return x, labels


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("bounded", [False, True])
def test_the_same_as_against_a_copy(similarity, relation, k, dtype, bounded):
    x, labels = _batch(dtype)
    options = {"similarity": similarity, "relation": relation, "k": k, "backend": "cpu"}
    options["self_index"] = torch.arange(ROWS)
    if bounded:
        options["below"] = nearest(x, x, row_labels=labels, column_labels=labels, **options)[0][:, -1].clone()
    itself = nearest(x, x, row_labels=labels, column_labels=labels, **options)
    copy = nearest(x, x.clone(), row_labels=labels, column_labels=labels.clone(), **options)
    for a, b in zip(itself, copy):
        assert torch.equal(a, b)


def test_the_same_bits_for_any_number_of_threads():
    x, labels = _batch(torch.float32)
    options = {"relation": "different", "k": 3, "backend": "cpu"}
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            results.append(nearest(x, x, row_labels=labels, column_labels=labels, **options))
    finally:
        torch.set_num_threads(before)
    for value, index in results[1:]:
        assert torch.equal(value, results[0][0])
        assert torch.equal(index, results[0][1])


def test_so_many_neighbours_that_both_rows_would_take_too_much_memory():
    x, labels = _batch(torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(7)
        options = {"relation": "any", "k": 600, "backend": "cpu"}
        itself = nearest(x, x, row_labels=labels, column_labels=labels, **options)
        copy = nearest(x, x.clone(), row_labels=labels, column_labels=labels.clone(), **options)
    finally:
        torch.set_num_threads(before)
    for a, b in zip(itself, copy):
        assert torch.equal(a, b)


def test_conversions_leave_one_batch_one(monkeypatch):
    """The kernel knows it by its memory: autocast and labels of another dtype must not make two of it."""
    seen = {"matrices": [], "labels": []}

    def call(kernel, x, y, row_labels, column_labels, *rest):
        seen["matrices"] += [x, y]
        seen["labels"] += [row_labels, column_labels]
        return native.call(kernel, x, y, row_labels, column_labels, *rest)

    monkeypatch.setattr(kernel_cpu, "call", call)
    x, labels = _batch(torch.float32)
    labels = labels.int()
    with torch.autocast("cpu", torch.bfloat16):
        nearest(x, x, labels, labels, relation="different", backend="cpu")
    assert all(len(sides) == 2 and len(set(sides)) == 1 for sides in seen.values()), seen
