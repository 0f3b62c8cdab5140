"""`nearest`: its formula, ties, and where an expanded distance or a square loses everything."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fused_margins.core.enums import Relation, Similarity
from fused_margins.core.indices import UNADMITTED
from fused_margins.functional import mine_negatives
from fused_margins.ops import cases
from fused_margins.ops.cases import Inputs
from fused_margins.ops.nearest import nearest
from tests.conftest import backends
from tests.ops.by_hand import admits, in_numbers, similarities
from tests.ops.drawn import labels_of, matrices, self_index_of

OP = cases.load("nearest")
EUCLIDEAN = "negative_squared_euclidean"
HERE = backends("nearest", relation="any")
on_every_backend = pytest.mark.parametrize("backend", HERE)
on_every_kernel = pytest.mark.parametrize("backend", [b for b in HERE if b != "reference"])
on_cpu = pytest.mark.parametrize("backend", [b for b in HERE if b == "cpu"])


def by_hand(inputs: Inputs) -> dict[str, Tensor]:
    inputs = in_numbers(inputs)
    u = similarities(inputs["x"], inputs["y"], inputs.get("similarity", "cosine"))
    sign, k, below = 1 if inputs.get("largest", True) else -1, inputs.get("k", 1), inputs.get("below")
    found = []
    for i in range(len(u)):
        # NaN is above nothing.
        open_to_row = [
            (-sign * u[i][j], j)
            for j in range(len(inputs["y"]))
            if admits(inputs, i, j, inputs["row_labels"][i], inputs.get("relation", "same"))
            and sign * u[i][j] > -math.inf
            and (below is None or u[i][j] < below[i])
        ]
        found.append((sorted(open_to_row) + [(math.inf, -1)] * k)[:k])
    similarity = [[-sign * u if j >= 0 else -math.inf for u, j in row] for row in found]
    return {
        "similarity": torch.tensor(similarity, dtype=torch.float64).reshape(len(u), k),
        "index": torch.tensor([[j for _, j in row] for row in found], dtype=torch.int64).reshape(len(u), k),
    }


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in OP.CASES])
def test_the_definition_is_its_formula(case):
    inputs = case.make(torch.Generator().manual_seed(0))
    expected = by_hand(inputs)
    for name, value in OP.run(inputs, "reference").items():
        if value.is_floating_point() or case.exact:
            torch.testing.assert_close(value, expected[name], rtol=1e-11, atol=1e-11)


@on_every_backend
@pytest.mark.parametrize("value", [9, -2, 2**40, -(2**63)])
def test_an_own_column_out_of_range_raises_before_anything_is_read(value, backend, device_for):
    if device_for("nearest", backend, relation="any") != "cpu":
        return
    x, y, rows, columns = torch.randn(6, 4), torch.randn(9, 4), torch.arange(6), torch.arange(9)
    own = torch.tensor([0, 1, -1, 3, value, 9])  # the first bad row is named, -1 is none
    with pytest.raises(IndexError) as raised:
        nearest(x, y, rows, columns, self_index=own, relation="any", backend=backend)
    assert str(raised.value) == f"self_index: expected values in [0, 9) or -1 (ignored), got {value} in row 4"


@on_every_kernel
@pytest.mark.parametrize("largest", [True, False])
def test_labels_that_only_compare_may_have_any_value(largest, backend, device_for):
    """All but the one that marks columns which no relation admits."""
    extremes = torch.tensor([2**63 - 1, UNADMITTED, 0, 0, 0, 0])
    inputs = {"x": torch.randn(6, 4), "y": torch.randn(9, 4), "relation": "different", "largest": largest}
    inputs |= {"row_labels": extremes, "column_labels": torch.cat([extremes, extremes[:3]])}
    device = device_for("nearest", backend, relation="any")
    assert cases.disagreements(OP, inputs, backend, torch.float32, device=device) == []


@on_every_backend
@pytest.mark.parametrize("relation", Relation.names())
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.interpreted
def test_columns_that_no_relation_admits_are_not_found(largest, relation, backend):
    """Not even by rows that carry their label."""
    x = torch.randn(8, 5)
    labels = torch.where(torch.arange(8) % 2 == 0, UNADMITTED, torch.arange(8) % 3)
    _, index = nearest(x, x, labels, labels, relation=relation, k=8, largest=largest, backend=backend)
    assert ((index == -1) | (index % 2 == 1)).all()
    assert (index >= 0).any() or relation == "same"


@on_every_backend
@pytest.mark.interpreted
def test_the_nearest_of_points_that_only_their_differences_tell_apart(backend, device_for):
    """Points on a grid of 1/64 about 10000 from the origin: exact in float32, though no expanded distance is."""
    device_for("nearest", backend)
    g = torch.Generator().manual_seed(0)
    x, y = ((10_000 + torch.randint(-40, 41, (n, 5), generator=g) / 64).float() for n in (61, 97))
    x[::2] -= 20_000  # two clouds: the common centre is far from both
    y[::2] -= 20_000
    labels = {"row_labels": torch.arange(61) % 3, "column_labels": torch.arange(97) % 3}
    options = {"similarity": EUCLIDEAN, "relation": "different", "k": 10}
    similarity, index = nearest(x, y, **labels, **options, backend=backend)
    true_similarity, true_index = nearest(x.double(), y.double(), **labels, **options, backend="reference")
    assert torch.equal(index, true_index)
    assert torch.equal(similarity.double(), true_similarity)


@pytest.mark.parametrize("similarity", ["dot", "cosine", EUCLIDEAN])
@on_every_backend
@pytest.mark.interpreted
def test_equal_columns_tie_whatever_their_place(backend, similarity, device_for):
    """Numbers that no dtype holds exactly: copies of one column must still give the same bits, wherever they stand."""
    device_for("nearest", backend)
    for rows, columns, width in ((1, 53, 19), (31, 271, 23), (37, 131, 64), (7, 2311, 5)):
        g = torch.Generator().manual_seed(rows)
        x, y = torch.randn(rows, width, generator=g), torch.randn(1, width, generator=g).repeat(columns, 1)
        labels = torch.zeros(rows, dtype=torch.int64), torch.zeros(columns, dtype=torch.int64)
        _, index = nearest(x, y, *labels, similarity=similarity, k=10, backend=backend)
        assert torch.equal(index, torch.arange(10).expand(rows, 10))


@on_every_backend
@pytest.mark.interpreted
def test_near_duplicates_are_neighbours_not_the_row_itself(backend, device_for):
    device_for("nearest", backend)
    x = torch.randn(20, 16)
    x[1] = x[0] + 1e-6
    x[3] = x[2]
    labels = torch.zeros(20, dtype=torch.int64)
    for similarity in ("cosine", EUCLIDEAN):
        options = {"similarity": similarity, "self_index": torch.arange(20), "backend": backend}
        _, index = nearest(x, x, labels, labels, **options)
        assert index[:4, 0].tolist() == [1, 0, 3, 2]


@on_every_backend
@pytest.mark.interpreted
def test_a_memory_bank_that_holds_the_batch(backend, device_for):
    """The batch is enqueued before it is mined: each row must find a positive other than its own copy."""
    device_for("nearest", backend)
    batch, labels = torch.randn(12, 8), torch.arange(12) % 4
    bank, bank_labels = torch.cat([torch.randn(30, 8), batch]), torch.cat([torch.arange(30) % 4, labels])
    own = torch.arange(30, 42)
    similarity, index = nearest(batch, bank, labels, bank_labels, self_index=own, backend=backend)
    assert (index[:, 0] != own).all()
    assert (index >= 0).all()
    assert (similarity < 1 - 1e-4).all()
    assert torch.equal(bank_labels[index[:, 0]], labels)


@on_every_backend
@pytest.mark.interpreted
def test_an_outlier_whose_square_overflows_hides_no_other_column(backend, device_for):
    device_for("nearest", backend)
    x, y = torch.randn(11, 5), torch.randn(40, 5)
    labels = torch.zeros(11, dtype=torch.int64), torch.zeros(40, dtype=torch.int64)
    options = {"similarity": EUCLIDEAN, "k": 3, "backend": backend}
    expected = nearest(x, y[1:], labels[0], labels[1][1:], **options)
    y[0] = 1e25
    similarity, index = nearest(x, y, *labels, **options)
    assert torch.equal(similarity, expected[0])
    assert torch.equal(index, expected[1] + 1)


@on_cpu
@pytest.mark.parametrize("relation", ["any", "same"])
@pytest.mark.interpreted
def test_an_infinite_similarity_is_the_nearest(relation, backend):
    x, label = torch.tensor([[1e30]]), torch.zeros(1, dtype=torch.long)
    best, index = nearest(x, x, label, label, relation=relation, similarity="dot", backend=backend)
    assert best.item() == math.inf
    assert index.item() == 0


@on_cpu
def test_factors_of_bfloat16_rows_whose_product_overflows(backend):
    x, y = torch.zeros(1, 4), torch.zeros(2, 4)
    x[0, 0] = y[0, 1] = y[1, 1] = 2.0**65
    y[1, 0] = 2.0**50
    zeros = torch.zeros(2, dtype=torch.long)
    options = {"relation": "any", "similarity": "dot", "backend": backend}
    best, index = nearest(x.bfloat16(), y.bfloat16(), zeros[:1], zeros, **options)
    assert best.item() == 2.0**115
    assert index.item() == 1


@on_every_backend
@pytest.mark.parametrize("similarity", ["cosine", "dot", "negative_squared_euclidean"])
def test_equal_columns_tie_whatever_their_number(backend, similarity):
    for count in range(2, 70, 7):
        y = torch.randn(1, 33).repeat(count, 1)
        labels = torch.zeros(count, dtype=torch.int64)
        _, index = nearest(torch.randn(1, 33), y, labels[:1], labels, similarity=similarity, k=count, backend=backend)
        assert index.tolist() == [list(range(count))]


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("similarity", Similarity.names())
@pytest.mark.interpreted
def test_a_copy_of_the_positive_is_no_semihard_negative(similarity, dtype, backend, device_for):
    """Whatever computes the two similarities, and in whatever order."""
    device, count = device_for("nearest", backend), 12
    g = torch.Generator().manual_seed(0)
    anchors = torch.randn(count, 67, generator=g)
    positives = anchors + 0.3 * torch.randn(count, 67, generator=g)
    others = torch.randn(count, 67, generator=g)
    x = torch.cat([anchors, positives, positives, others]).to(device, dtype)
    labels = torch.arange(count).repeat(4) + 100 * torch.tensor([0, 0, 1, 2]).repeat_interleave(count)
    _, index = mine_negatives(x, labels.to(device), strategy="semihard", similarity=similarity, backend=backend)
    assert (index[:count] >= 0).all()
    assert not (index[:count].cpu() == 2 * count + torch.arange(count)).any()


@on_every_kernel
@pytest.mark.interpreted
def test_half_precision_whose_squares_overflow(backend, device_for):
    """|x|^2 of 96 numbers near 300 is 8.6e6, and |x - y|^2 1.2e5: above float16's 65504."""
    inputs = OP.CASES[1].make(torch.Generator().manual_seed(0))
    inputs |= {n: 300 + 25 * torch.randn(inputs[n].shape[0], 96).double() for n in ("x", "y")}
    device = device_for("nearest", backend, relation="any")
    for similarity in ("cosine", EUCLIDEAN):
        changed = inputs | {"similarity": similarity}
        assert cases.disagreements(OP, changed, backend, torch.float16, device=device) == []


# The nearest column by Euclidean distance on a GPU: found by products, where those can tell, else by the distances.

on_triton = pytest.mark.parametrize("backend", [b for b in HERE if b == "triton"])


def by_products(x, y, dtype, device_for):
    device = device_for("nearest", "triton", relation="any")
    labels = [torch.zeros(len(t), dtype=torch.int64, device=device) for t in (x, y)]
    options = {"similarity": "negative_squared_euclidean", "relation": "any"}
    x, y = (t.to(device, dtype) for t in (x, y))
    return [nearest(x, y, *labels, **options, backend=backend) for backend in ("triton", "reference")]


def assert_same(results):
    (similarity, index), (expected, expected_index) = results
    assert torch.equal(index, expected_index)
    torch.testing.assert_close(similarity, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([[1e20]], [[1e20], [0.0]]),  # squares overflow
        ([[1e19]], [[2e19], [-1e18]]),
        ([[1e-25]], [[3e-25], [1e-25]]),  # or vanish
        ([[1.0]], [[torch.nan], [5.0]]),
        ([[1.0]], [[torch.inf], [5.0]]),
        ([[torch.nan]], [[1.0], [5.0]]),
    ],
)
@on_triton
@pytest.mark.interpreted
def test_numbers_that_squares_leave(x, y, dtype, device_for, backend):
    assert_same(by_products(torch.tensor(x), torch.tensor(y), dtype, device_for))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@on_triton
@pytest.mark.interpreted
def test_equal_distances_go_to_the_lowest_column(dtype, device_for, backend):
    x, y = torch.full((1, 8), 100.0), torch.zeros(3, 8)
    y[1, 0], y[2, 0] = 1e-6, 2e-6  # nearer, but not in these dtypes
    assert_same(by_products(x, y, dtype, device_for))
    g = torch.Generator().manual_seed(0)
    y = torch.randn(130, 24, generator=g)
    assert_same(by_products(y[100:] + 1, torch.cat([y, y]), dtype, device_for))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [24, 136])
@on_triton
@pytest.mark.interpreted
def test_far_from_the_origin(width, dtype, device_for, backend):
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, width, generator=g) + 100 for n in (9, 130))
    (similarity, index), (expected, _) = by_products(x, y, dtype, device_for)
    torch.testing.assert_close(similarity, expected)
    assert (index >= 0).all()


@pytest.mark.parametrize("backend", backends("nearest", reference=False))
def test_more_similarities_than_32_bits_count(backend, device_for):
    """The first rows, the last ones and some between are those of a small problem."""
    device, side = device_for("nearest", backend), 46_400  # its square is more than 2^31
    picked = torch.tensor([0, 7, side // 2, side - 2, side - 1], device=device)
    x = torch.randn(side, 2, generator=torch.Generator().manual_seed(0)).to(device)
    labels = torch.arange(side, device=device) // 4
    options = {"relation": "same" if backend == "cuda" else "different", "similarity": "negative_squared_euclidean"}
    _, index = nearest(x, x, labels, labels, self_index=torch.arange(side, device=device), backend=backend, **options)
    _, expected = nearest(x[picked], x, labels[picked], labels, self_index=picked, backend="reference", **options)
    assert torch.equal(index[picked], expected)


# Shapes, labels and options drawn by Hypothesis, the same at every run (see the profile in tests/conftest.py).


@st.composite
def drawn_inputs(draw: Any) -> Inputs:
    inputs = draw(matrices())
    rows, columns = inputs["x"].shape[0], inputs["y"].shape[0]
    classes, offset = draw(st.integers(1, 6)), draw(st.sampled_from([0, 0, 2**31 - 3, -(2**62)]))
    inputs |= {
        "row_labels": labels_of(draw, rows, classes, offset),
        "column_labels": labels_of(draw, columns, classes, offset),
    }
    inputs |= {"relation": draw(st.sampled_from(Relation.names())), "k": draw(st.integers(1, 10))}
    inputs["largest"] = draw(st.booleans())
    if draw(st.booleans()):
        inputs["self_index"] = self_index_of(draw, rows, columns)
    return inputs


@on_every_kernel
@settings(max_examples=150)
@given(inputs=drawn_inputs(), dtype=st.sampled_from([torch.float64, torch.float32]))
def test_what_is_drawn_agrees(inputs, dtype, backend):
    assert cases.disagreements(OP, inputs, backend, dtype) == []


@on_every_kernel
@settings(max_examples=40)
@given(inputs=drawn_inputs())
def test_k_neighbours_begin_with_the_nearer_ones(inputs, backend):
    similarity, index = nearest(**inputs, backend=backend)
    ordered = similarity if inputs["largest"] else similarity.where(index >= 0, torch.inf)
    smaller, larger = (ordered[:, 1:], ordered[:, :-1]) if inputs["largest"] else (ordered[:, :-1], ordered[:, 1:])
    assert (smaller <= larger).all()
    for k in range(1, inputs["k"]):
        fewer, first = nearest(**inputs | {"k": k}, backend=backend)
        assert torch.equal(fewer, similarity[:, :k])
        assert torch.equal(first, index[:, :k])
