"""Classes of every size in one batch: small ones share vectors and are searched together, large ones are not."""

import pytest
import torch
from fused_margins.ops.similarity import SIMILARITIES
from torch import Generator, Tensor

from fused_margins.ops import cases
from fused_margins.ops.nearest import nearest

SIZES = (1, 1, 2, 3, 4, 4, 5, 7, 8, 1, 15, 16, 17, 33, 60, 64, 65, 3, 130, 257)
WIDTH = 19


@pytest.fixture(autouse=True)
def _on_a_cpu(device_for):
    device_for("nearest", "cpu")


def _batch(g: Generator, sizes: tuple[int, ...] = SIZES) -> tuple[Tensor, Tensor]:
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=g)]
    return torch.randn(len(labels), WIDTH, generator=g, dtype=torch.float64), labels


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_a_batch_with_itself(similarity, k, dtype):
    x, labels = _batch(torch.Generator().manual_seed(0))
    inputs = {"x": x, "y": x, "row_labels": labels, "column_labels": labels, "similarity": similarity, "k": k}
    inputs["self_index"] = torch.arange(len(x))
    assert cases.disagreements(cases.load("nearest"), inputs, "cpu", dtype) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_other_columns_and_classes_without_any(similarity, k, dtype):
    g = torch.Generator().manual_seed(1)
    x, row_labels = _batch(g)
    y, column_labels = _batch(g, (0, 3, 0, 200, 1, 0, 17, 256, 4, 300, 0, 2, 90, 1, 5))
    inputs = {"x": x, "y": y, "row_labels": row_labels, "column_labels": column_labels}
    inputs["self_index"] = torch.randint(-1, len(y), (len(x),), generator=g)
    inputs |= {"similarity": similarity, "k": k}
    assert cases.disagreements(cases.load("nearest"), inputs, "cpu", dtype) == []


@pytest.mark.parametrize("length", [0.0, 1e-20, 1e20, float("nan")])
def test_a_class_of_extreme_lengths_among_others(length):
    """Products of such rows may leave float32's range: their class is searched in another way, no other one is."""
    x, labels = _batch(torch.Generator().manual_seed(2))
    x = x.float()
    extreme = labels == 5
    mixed = torch.where(extreme[:, None], x * length, x)
    options = {"similarity": "cosine", "self_index": torch.arange(len(x)), "backend": "cpu"}
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
