"""Easy and hard positives, easy ones excluded from themselves, against a search by hand."""

import pytest
import torch
from torch.nn import functional as F

from fused_margins.functional import mine_negatives, mine_positives

SIMILARITIES = {
    "cosine": lambda x, y: F.cosine_similarity(x[:, None], y, dim=-1),
    "dot": lambda x, y: x @ y.T,
    "negative_squared_euclidean": lambda x, y: -(x[:, None] - y).square().sum(-1),
}


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("with_references", [False, True])
def test_positives_and_negatives_are_those_of_the_whole_matrix(device_for, backend, similarity, with_references):
    device_for("nearest", backend)  # or skip, with the reason
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(60, 9, generator=generator, dtype=torch.float64) + 20  # far from the origin: nothing cancels
    labels = torch.randint(7, (60,), generator=generator)
    labels[0] = 100  # alone in its class
    options = {"similarity": similarity, "backend": backend}
    y, column_labels, own = x, labels, torch.arange(60)
    if with_references:
        y = torch.randn(83, 9, generator=generator, dtype=torch.float64) + 20
        column_labels, own = (torch.randint(n, (m,), generator=generator) for n, m in ((7, 83), (83, 60)))
        options |= {"reference_embeddings": y, "reference_labels": column_labels, "self_index": own}
    u = SIMILARITIES[similarity](x, y)
    same = labels[:, None] == column_labels
    is_own = torch.arange(len(y)) == own[:, None]
    others, different = same & ~is_own, ~same & ~is_own
    expected = {
        "easy": torch.where(others, u, -torch.inf).max(1),
        "hard": torch.where(others, u, torch.inf).min(1),
        "negative": torch.where(different, u, -torch.inf).max(1),
    }
    for kind, (value, index) in expected.items():
        if kind == "negative":
            found, where = mine_negatives(x, labels, **options)
            exists = different.any(1)
        else:
            found, where = mine_positives(x, labels, strategy=kind, **options)
            exists = others.any(1)
        assert torch.equal(where, torch.where(exists, index, -1)), kind
        torch.testing.assert_close(found, torch.where(exists, value, -torch.inf), rtol=1e-9, atol=1e-9)
