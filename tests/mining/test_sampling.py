"""Positives and negatives drawn at random: their distributions, and the cases without a choice."""

from typing import Protocol

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fused_margins.backends import registry
from fused_margins.core.indices import UNADMITTED
from fused_margins.functional import mine_positives
from fused_margins.mining import all_positives, distance_weighted_negatives, random_negatives, random_positives

BACKENDS = [b.name for b in registry.BACKENDS if registry.has_kernel("sample", b.name)]


class Drawn(Protocol):
    def __call__(
        self, x: Tensor, labels: Tensor, y: Tensor, y_labels: Tensor, generator: torch.Generator | None = None
    ) -> Tensor: ...


@pytest.fixture
def drawn(backend, device_for) -> Drawn:
    """Distance-weighted negatives of a backend, on its device and back."""
    device = device_for("sample", backend)  # or skip, with the reason

    def draw(*arguments):
        moved = (t.to(device) if isinstance(t, Tensor) else t for t in arguments)
        return distance_weighted_negatives(*moved, backend=backend).cpu()

    return draw


def test_random_positives_are_uniform_over_the_rest_of_the_class():
    labels = torch.tensor([2, 0, 2, 2, 1, 2, 0])
    generator = torch.Generator().manual_seed(0)
    draws = 4000
    index = random_positives(labels.repeat(draws), labels, torch.arange(7).repeat(draws), generator).view(draws, 7)
    counts = torch.stack([(index == j).sum(0) for j in (*range(7), -1)], dim=1).float()
    for i in range(7):
        rest = [j for j in range(7) if j != i and labels[j] == labels[i]] or [7]
        assert counts[i, rest].sum() == draws
        expected = draws / len(rest)
        assert (counts[i, rest] - expected).abs().max() < 4 * expected**0.5 + 1e-6


def test_random_positives_from_references():
    labels, reference_labels = torch.tensor([1, 3, 0, 2]), torch.tensor([3, 1, 1], dtype=torch.int32)
    draws = torch.stack([random_positives(labels, reference_labels, None) for _ in range(40)])
    assert set(draws[:, 0].tolist()) == {1, 2}
    assert draws[:, 1:].unique(dim=0).tolist() == [[0, -1, -1]]
    of_other_class = torch.tensor([0, -1, 1, 1])  # not in the anchor's run: excludes nothing there
    draws = torch.stack([random_positives(labels, reference_labels, of_other_class) for _ in range(40)])
    assert set(draws[:, 0].tolist()) == {1, 2}
    assert torch.equal(draws[0, 1:], torch.tensor([0, -1, -1]))
    with pytest.raises(IndexError, match="self_index"):
        random_positives(labels, reference_labels, torch.tensor([0, 3, 0, 0]))


def on_sphere(distances_from_pole: Tensor, width: int) -> Tensor:
    """Unit vectors at these distances from (1, 0, ...)."""
    cosine = 1 - distances_from_pole.square() / 2
    x = torch.zeros(len(cosine), width)
    x[:, 0], x[:, 1] = cosine, (1 - cosine.square()).sqrt()
    return x


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [3, 8, 512])
def test_distance_weighted_draw_has_its_distribution(drawn, width):
    d = torch.tensor([0.2, 0.49, 0.6, 0.9, 1.1, 1.395, 1.405, 1.9, 0.7])
    references, reference_labels = on_sphere(d, width), torch.tensor([1] * 8 + [0])
    anchors = on_sphere(torch.zeros(20000), width)
    generator = torch.Generator().manual_seed(0)
    index = drawn(anchors, torch.zeros(20000).long(), references, reference_labels, generator)
    clamped = d.double().clamp(min=0.5)
    log_q = (width - 2) * clamped.log() + (width - 3) / 2 * (1 - clamped.square() / 4).log()
    log_q[(d > 1.4) | (reference_labels == 0)] = torch.inf  # beyond the cut-off, and the anchor's own class
    expected = torch.softmax(-log_q, dim=0)
    frequency = torch.bincount(index, minlength=9) / 20000
    torch.testing.assert_close(frequency.double(), expected, atol=0.015, rtol=0)
    assert frequency[6:].sum() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_distance_weighted_draw_does_not_underflow(drawn):
    # Trap: against the largest weight of the batch (row 0, width 2048) every weight of row 1 is exp(-1400) or less.
    references = torch.cat([on_sphere(torch.tensor([0.5, 0.5]), 2048), -on_sphere(torch.tensor([1.2, 1.3]), 2048)])
    pole = on_sphere(torch.zeros(1), 2048)
    anchors, other = torch.cat([pole, -pole]), torch.ones(4).long()
    index = drawn(anchors, torch.tensor([0, 0]), references, other)
    assert index[0] in (0, 1)
    assert index[1] == 2  # 1.2 away: its weight is exp(58) times that at 1.3, the others are beyond the cut-off


@pytest.mark.parametrize("backend", BACKENDS)
def test_distance_weighted_draw_without_near_negatives(drawn):
    x = torch.cat([torch.eye(3), -torch.eye(3)])  # every negative at sqrt 2 or 2, beyond the cut-off
    labels = torch.tensor([0, 1, 1, 1, 1, 1])
    generator = torch.Generator().manual_seed(0)
    columns = [int(drawn(x[:1], labels[:1], x, labels, generator)[0]) for _ in range(200)]
    assert set(columns) == {1, 2, 3, 4, 5}
    none = drawn(x, torch.zeros(6).long(), x, torch.zeros(6).long())
    assert torch.equal(none, torch.full((6,), -1))
    assert torch.equal(drawn(x, labels, x[:0], labels[:0]), torch.full((6,), -1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_generator_draws_the_same_on_every_backend(drawn):
    x = F.normalize(torch.randn(50, 8, generator=torch.Generator().manual_seed(2)))
    labels = torch.arange(50) % 7
    batch = (x, labels, x, labels)

    def generator(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    index = drawn(*batch, generator(5))
    assert torch.equal(index, distance_weighted_negatives(*batch, generator(5), backend="reference"))
    assert not torch.equal(index, drawn(*batch, generator(6)))
    assert (labels[index] != labels).all()
    torch.manual_seed(5)
    first = drawn(*batch)
    torch.manual_seed(5)
    assert torch.equal(drawn(*batch), first)


def test_labels_that_cannot_be_are_refused_by_name():
    x, labels = torch.randn(3, 4), torch.tensor([3, 5, 3])
    for function in (random_positives, all_positives, random_negatives):
        with pytest.raises(TypeError, match="labels: expected an integer dtype"):
            function(labels.float(), labels, None)
        with pytest.raises(ValueError, match=r"reference_labels: expected shape \(3,\), got \(3, 1\)"):
            function(labels, labels[:, None], None)
        with pytest.raises(ValueError, match=r"self_index: expected shape \(3,\), got \(2,\)"):
            function(labels, labels, labels[:2])
        with pytest.raises(TypeError, match="labels: expected an integer tensor"):
            function(None, labels, None)
    for bad in (None, labels.float()):
        with pytest.raises(TypeError, match=r"^labels: expected"):
            distance_weighted_negatives(x, bad, x, labels)
        with pytest.raises(TypeError, match=r"^reference_labels: expected"):
            distance_weighted_negatives(x, labels, x, bad)


def test_the_reserved_label_is_in_no_class():
    labels = torch.tensor([0, 0, UNADMITTED, UNADMITTED, 1])
    itself, x = torch.arange(5), torch.eye(5)
    assert random_positives(labels, labels, itself).tolist() == [1, 0, -1, -1, -1]
    assert all_positives(labels, labels, itself)[0].tolist() == [0, 1]
    assert mine_positives(x, labels)[1].tolist() == [1, 0, -1, -1, -1]
    for _ in range(20):
        drawn = random_negatives(labels, labels, itself)
        assert not set(drawn.tolist()) & {2, 3}
        assert drawn[4] in (0, 1)
        assert not set(distance_weighted_negatives(x, labels, x, labels).tolist()) & {2, 3}


def test_what_is_no_vector_of_data_is_refused_by_name():
    x, labels = torch.eye(3), torch.tensor([3, 5, 3])
    nested = torch.nested.nested_tensor([labels, labels])
    for function in (random_positives, all_positives, random_negatives):
        with pytest.raises(TypeError, match=r"^labels: expected a dense tensor, got a nested one"):
            function(nested, labels, None)
        with pytest.raises(TypeError, match=r"^reference_labels: expected a dense tensor, got a nested one"):
            function(labels, nested, None)
        with pytest.raises(TypeError, match=r"^labels: expected a tensor with data, got one on the meta device"):
            function(labels.to("meta"), labels.to("meta"), None)
    with pytest.raises(TypeError, match=r"^embeddings: expected a tensor, got list"):
        distance_weighted_negatives([1.0], labels, x, labels)


def test_a_generator_is_one():
    x, labels = torch.eye(3), torch.tensor([3, 5, 3])
    for function in (random_positives, random_negatives):
        with pytest.raises(TypeError, match=r"^generator: expected a torch.Generator or None, got list"):
            function(labels, labels, None, [1])
    with pytest.raises(TypeError, match=r"^generator: expected a torch.Generator or None, got int"):
        distance_weighted_negatives(x, labels, x, labels, 0)
