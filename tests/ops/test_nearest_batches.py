"""`nearest` of a batch: classes of every size, of which small ones share vectors, and a batch against itself."""

import pytest
import torch
from torch import Generator, Tensor

from fused_margins.backends import cpu
from fused_margins.core.enums import Relation, Similarity
from fused_margins.ops import cases
from fused_margins.ops.nearest import kernel_cpu, nearest
from tests.conftest import backends

OP = cases.load("nearest")
HERE = backends("nearest", relation="any")
on_cpu = pytest.mark.parametrize("backend", [b for b in HERE if b == "cpu"])


SIZES = (1, 1, 2, 3, 4, 4, 5, 7, 8, 1, 15, 16, 17, 33, 60, 64, 65, 3, 130, 257)
WIDTH = 19


def classes_of_all_sizes(g: Generator, sizes: tuple[int, ...] = SIZES) -> tuple[Tensor, Tensor]:
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=g)]
    return torch.randn(len(labels), WIDTH, generator=g, dtype=torch.float64), labels


# Every similarity with every dtype, numbers in turn: each two of the three come together.
IN_PAIRS = [
    (similarity, (1, 3)[(i + j) % 2], dtype)
    for i, similarity in enumerate(Similarity.names())
    for j, dtype in enumerate([torch.float64, torch.float32, torch.bfloat16, torch.float16])
]


@pytest.mark.parametrize(("similarity", "k", "dtype"), IN_PAIRS)
@on_cpu
def test_a_batch_with_itself(similarity, k, dtype, backend):
    x, labels = classes_of_all_sizes(torch.Generator().manual_seed(0))
    inputs = {"x": x, "y": x, "row_labels": labels, "column_labels": labels, "similarity": similarity, "k": k}
    inputs["self_index"] = torch.arange(len(x))
    assert cases.disagreements(OP, inputs, backend, dtype) == []


@pytest.mark.parametrize(("similarity", "k", "dtype"), IN_PAIRS)
@on_cpu
def test_other_columns_and_classes_without_any(similarity, k, dtype, backend):
    g = torch.Generator().manual_seed(1)
    x, row_labels = classes_of_all_sizes(g)
    y, column_labels = classes_of_all_sizes(g, (0, 3, 0, 200, 1, 0, 17, 256, 4, 300, 0, 2, 90, 1, 5))
    inputs = {"x": x, "y": y, "row_labels": row_labels, "column_labels": column_labels}
    inputs["self_index"] = torch.randint(-1, len(y), (len(x),), generator=g)
    inputs |= {"similarity": similarity, "k": k}
    assert cases.disagreements(OP, inputs, backend, dtype) == []


@pytest.mark.parametrize("length", [0.0, 1e-20, 1e20, float("nan")])
@on_cpu
def test_a_class_of_extreme_lengths_among_others(length, backend):
    """Products of such rows may leave float32's range: their class is searched in another way, no other one is."""
    x, labels = classes_of_all_sizes(torch.Generator().manual_seed(2))
    x = x.float()
    extreme = labels == 5
    mixed = torch.where(extreme[:, None], x * length, x)
    options = {"similarity": "cosine", "self_index": torch.arange(len(x)), "backend": backend}
    value, index = nearest(mixed, mixed, labels, labels, **options)
    plain_value, plain_index = nearest(x, x, labels, labels, **options)
    assert torch.equal(index[~extreme], plain_index[~extreme])
    assert torch.equal(value[~extreme], plain_value[~extreme])  # to the last bit
    if length == length and length > 0:
        assert torch.equal(index[extreme], plain_index[extreme])
        torch.testing.assert_close(value[extreme], plain_value[extreme])
    elif length == 0:
        assert (value[extreme] == 0).all()  # all tie: the lowest but the row itself
        members = extreme.nonzero().flatten()
        assert index[extreme].flatten().tolist() == [
            int(members[1] if member == members[0] else members[0]) for member in members
        ]
    else:
        assert (index[extreme] == -1).all()


ROWS = 1700  # several chunks, the last of them ragged


def with_ties(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Few different values, rows that occur twice: ties everywhere. Two classes fill whole chunks, others are small."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-2, 3, (ROWS, 6), generator=generator).to(dtype)
    x[ROWS - 400 :] = x[:400]
    labels = torch.randint(40, (ROWS,), generator=generator)
    labels[torch.rand(ROWS, generator=generator) < 0.7] = 7
    return x, labels


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("relation", Relation.names())
@pytest.mark.parametrize("similarity", Similarity.names())
@pytest.mark.parametrize("bounded", [False, True])
@on_cpu
def test_the_same_as_against_a_copy(similarity, relation, k, dtype, bounded, backend):
    x, labels = with_ties(dtype)
    options = {"similarity": similarity, "relation": relation, "k": k, "backend": backend}
    options["self_index"] = torch.arange(ROWS)
    if bounded:
        options["below"] = nearest(x, x, row_labels=labels, column_labels=labels, **options)[0][:, -1].clone()
    itself = nearest(x, x, row_labels=labels, column_labels=labels, **options)
    copy = nearest(x, x.clone(), row_labels=labels, column_labels=labels.clone(), **options)
    for a, b in zip(itself, copy):
        assert torch.equal(a, b)


@on_cpu
def test_the_same_bits_for_any_number_of_threads(backend):
    x, labels = with_ties(torch.float32)
    options = {"relation": "different", "k": 3, "backend": backend}
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


@on_cpu
def test_so_many_neighbours_that_both_rows_would_take_too_much_memory(backend):
    x, labels = with_ties(torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(7)
        options = {"relation": "any", "k": 600, "backend": backend}
        itself = nearest(x, x, row_labels=labels, column_labels=labels, **options)
        copy = nearest(x, x.clone(), row_labels=labels, column_labels=labels.clone(), **options)
    finally:
        torch.set_num_threads(before)
    for a, b in zip(itself, copy):
        assert torch.equal(a, b)


@on_cpu
def test_conversions_leave_one_batch_one(monkeypatch, backend):
    """The kernel knows it by its memory: autocast and labels of another dtype must not make two of it."""
    seen = {"matrices": [], "labels": []}

    def call(kernel, x, y, row_labels, column_labels, *rest):
        seen["matrices"] += [x, y]
        seen["labels"] += [row_labels, column_labels]
        return cpu.call(kernel, x, y, row_labels, column_labels, *rest)

    monkeypatch.setattr(kernel_cpu, "call", call)
    x, labels = with_ties(torch.float32)
    labels = labels.int()
    with torch.autocast("cpu", torch.bfloat16):
        nearest(x, x, labels, labels, relation="different", backend=backend)
    assert all(len(sides) == 2 and len(set(sides)) == 1 for sides in seen.values()), seen
