"""Every kind of positives with every kind of negatives, within a batch and with a memory, against plain loops."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fused_margins import CrossBatchMemory, EasyPositiveInfoNCELoss, EasyPositiveMarginLoss, EasyPositiveTripletLoss
from fused_margins.functional import mine_positives
from fused_margins.mining import NEGATIVES, POSITIVES, all_positives, random_negatives

MARGIN, BETA, TEMPERATURE = 0.6, 1.1, 0.2
BACKENDS = ("reference", "cpu")
Entry = tuple[Tensor, int, int]  # embedding, label, sample
Row = list[tuple[int | None, int | None]]  # the (positive, negative) that a loss may have; None where there is none


@pytest.fixture(params=BACKENDS)
def backend(request, device_for) -> str:
    device_for("nearest", request.param)  # or skip, with the reason
    return request.param


def batches() -> list[tuple[Tensor, Tensor, Tensor]]:
    """Embeddings, labels, samples of three steps: sample s has label s % 4, some come again; class 9 is one sample."""
    generator = torch.Generator().manual_seed(5)
    steps = []
    for _ in range(3):
        samples = torch.randperm(30, generator=generator)[:9]
        x = torch.randn(9, 4, generator=generator, dtype=torch.float64)
        labels = samples % 4
        samples[8], labels[8] = 100, 9
        steps.append((x.requires_grad_(), labels, samples))
    return steps


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def rows_of(anchor: int, entries: list[Entry], own: int, positives: str, negatives: str) -> list[Row]:
    """For each loss that the anchor has, the pairs of entries that it may be made of."""
    x, label, _ = entries[anchor]
    distance = [float((unit(x) - unit(y)).norm().detach()) for y, _, _ in entries]
    same = [j for j, (_, other, _) in enumerate(entries) if other == label and j != own]
    different = [j for j, (_, other, _) in enumerate(entries) if other != label]
    if positives == "easy":
        chosen = [[min(same, key=lambda j: distance[j], default=None)]]
    elif positives == "hard":
        chosen = [[max(same, key=lambda j: distance[j], default=None)]]
    elif positives == "random":
        chosen = [same or [None]]
    else:
        chosen = [[j] for j in same]

    def negatives_of(positive: int | None) -> list[int | None]:
        if negatives == "hard":
            return [min(different, key=lambda j: distance[j], default=None)]
        if negatives == "semihard":
            beyond = [j for j in different if positive is not None and distance[j] > distance[positive]]
            return [min(beyond, key=lambda j: distance[j], default=None)]
        if negatives == "distance-weighted":
            return [j for j in different if distance[j] < 1.4] or different or [None]
        return different or [None]

    return [[(p, n) for p in candidates for n in negatives_of(p)] for candidates in chosen]


def value(
    kind: type, anchor: int, entries: list[Entry], positive: int | None, negative: int | None, all_negatives: bool
):
    """The loss of one triplet by its formula."""
    x, label, _ = entries[anchor]
    x, y = unit(x), [unit(y) for y, _, _ in entries]
    nothing = (x * 0).sum()
    if positive is None:
        return nothing
    if kind is EasyPositiveInfoNCELoss:
        against = [j for j, (_, other, _) in enumerate(entries) if other != label] if all_negatives else [negative]
        if not against or against == [None]:
            return nothing
        logits = torch.stack([x @ y[j] for j in [positive, *against]]) / TEMPERATURE
        return F.cross_entropy(logits[None], torch.tensor([0]))
    if kind is EasyPositiveTripletLoss:
        if negative is None:
            return nothing
        return F.relu((x - y[positive]).square().sum() - (x - y[negative]).square().sum() + MARGIN)
    too_far = F.relu((x - y[positive]).norm() - BETA + MARGIN)
    return too_far if negative is None else too_far + F.relu(BETA - (x - y[negative]).norm() + MARGIN)


def searched(batch: tuple[Tensor, Tensor, Tensor], older: list[Entry]) -> tuple[list[Entry], list[int]]:
    """What the anchors choose from, the newest embedding of each sample, and which entry each anchor is."""
    entries: list[Entry] = []
    for entry in [*zip(batch[0], *(t.tolist() for t in batch[1:])), *reversed(older)]:
        if all(entry[2] != sample for _, _, sample in entries):
            entries.append(entry)
    return entries, list(range(len(batch[0])))


GRID = [
    (kind, p, n)
    for kind in (EasyPositiveTripletLoss, EasyPositiveMarginLoss, EasyPositiveInfoNCELoss)
    for p in POSITIVES
    for n in (*NEGATIVES, *(["all"] if kind is EasyPositiveInfoNCELoss else []))
]
SETTINGS = {
    EasyPositiveTripletLoss: {"margin": MARGIN},
    EasyPositiveMarginLoss: {"margin": MARGIN, "beta": BETA},
    EasyPositiveInfoNCELoss: {"temperature": TEMPERATURE},
}


@pytest.mark.parametrize("remember", [False, True])
@pytest.mark.parametrize(("kind", "positives", "negatives"), GRID)
def test_losses_and_gradients_are_those_of_loops(kind, positives, negatives, remember):
    steps = batches()
    loss = kind(
        positives=positives,
        negatives=negatives,
        reduction="none",
        generator=torch.Generator().manual_seed(0),
        **SETTINGS[kind],
    ).double()
    older: list[Entry] = []
    if remember:
        memory = CrossBatchMemory(loss, embedding_size=4, size=14).double()
        for x, labels, samples in steps[:2]:
            memory(x, labels, samples)
            older += zip(x.detach(), labels.tolist(), samples.tolist())
        older = older[-14:]
    x, labels, samples = steps[2]
    entries, own = searched(steps[2], older)
    assert remember == (len(entries) > 9)
    rows = [(i, row) for i in range(9) for row in rows_of(i, entries, own[i], positives, negatives)]
    possible = [[value(kind, i, entries, p, n, negatives == "all") for p, n in row] for i, row in rows]
    for _ in range(3 if "random" in (positives, negatives) or negatives == "distance-weighted" else 1):
        ours = loss(x, labels) if not remember else memory.eval()(x, labels, samples)
        assert ours.shape == (len(rows),)
        theirs = []
        for one, values in zip(ours, possible):
            nearest = min(values, key=lambda v: float((v - one).detach().abs()))
            torch.testing.assert_close(one.detach(), nearest.detach())
            theirs.append(nearest)
        assert any(t > 0 for t in theirs)
        ours_grad, theirs_grad = (
            torch.autograd.grad(l.sum(), x, retain_graph=True)[0] for l in (ours, torch.stack(theirs))
        )
        torch.testing.assert_close(ours_grad, theirs_grad)


@pytest.mark.parametrize(("kind", "positives", "negatives"), GRID)
def test_the_mean_is_over_what_is_active(kind, positives, negatives):
    x, labels, _ = batches()[0]

    def make(reduction):
        generator = torch.Generator().manual_seed(3)
        return kind(positives=positives, negatives=negatives, reduction=reduction, generator=generator)(x, labels)

    each, mean = make("none"), make("mean")
    torch.testing.assert_close(make("sum"), each.sum())
    if kind is EasyPositiveInfoNCELoss:
        torch.testing.assert_close(mean, each.sum() / (each > 0).sum())
    # Of a triplet or a margin loss, active terms may be 0; two terms an anchor, or all active, are the extremes.
    assert each.sum() / (2 * len(each)) <= mean <= each.max()


@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_a_generator_decides(positives, negatives):
    x, labels = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 4

    def losses(seed):
        torch.rand(1)  # the global generator has no say
        generator = torch.Generator().manual_seed(seed)
        options = {"positives": positives, "negatives": negatives, "reduction": "none", "generator": generator}
        return EasyPositiveTripletLoss(**options)(x, labels)

    assert torch.equal(losses(1), losses(1))
    drawn = positives == "random" or negatives in ("random", "distance-weighted")
    assert torch.equal(losses(1), losses(2)) != drawn


@pytest.mark.parametrize("similarity", ["cosine", "dot", "negative_squared_euclidean"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_hard_positives_are_the_farthest(backend, similarity, dtype):
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.randn(n, 5, generator=generator).to(dtype) for n in (20, 33))
    labels, other = torch.arange(20) % 4 + 7, torch.randint(6, 10, (33,), generator=generator, dtype=torch.int32)
    own = torch.randint(-1, 33, (20,), generator=generator)
    u = {
        "cosine": lambda a, b: F.cosine_similarity(a, b, dim=0),
        "dot": lambda a, b: a @ b,
        "negative_squared_euclidean": lambda a, b: -(a - b).square().sum(),
    }[similarity]
    value, index = mine_positives(
        x,
        labels,
        strategy="hard",
        similarity=similarity,
        reference_embeddings=y,
        reference_labels=other,
        self_index=own,
        backend=backend,
    )
    for i in range(20):
        mates = {j: float(u(x[i].double(), y[j].double())) for j in range(33) if other[j] == labels[i] and j != own[i]}
        if not mates:
            assert (int(index[i]), float(value[i])) == (-1, -torch.inf)
            continue
        assert int(index[i]) == min(mates, key=mates.get)
        assert float(value[i]) == pytest.approx(mates[int(index[i])], rel=1e-5, abs=1e-6)


def test_hard_positives_of_tight_classes_far_from_the_origin(backend):
    # Expanded around anything but the class itself, these distances (0.01 to 0.05) drown in the squares of 300.
    steps = torch.tensor([0.0, 0.01, 0.02, 0.05, 0.06])
    x = torch.stack([300 + steps, torch.full((5,), -200.0)], dim=1)
    x = torch.cat([x, -3 * x])
    labels = torch.tensor([0] * 5 + [1] * 5)
    euclidean = {"similarity": "negative_squared_euclidean", "strategy": "hard", "backend": backend}
    _, index = mine_positives(x, labels, **euclidean)
    assert index.tolist() == [4, 4, 4, 0, 0, 9, 9, 9, 5, 5]


def test_hard_positives_do_without_samples_that_are_not_finite(backend):
    x = torch.tensor([[torch.nan], [0.0], [3.0], [1.0], [torch.nan]])  # the first of them is the class's origin
    _, index = mine_positives(
        x, torch.zeros(5).long(), strategy="hard", similarity="negative_squared_euclidean", backend=backend
    )
    assert index.tolist() == [-1, 2, 1, 2, -1]


def test_hard_positives_take_the_first_of_equals_and_need_another_sample(backend):
    x = torch.tensor([[0.0], [2.0], [2.0], [-2.0], [7.0]])
    labels = torch.tensor([0, 0, 0, 0, 1])
    value, index = mine_positives(x, labels, strategy="hard", similarity="negative_squared_euclidean", backend=backend)
    assert index.tolist() == [1, 3, 3, 1, -1]
    assert value.tolist() == [-4, -16, -16, -16, -torch.inf]
    value, index = mine_positives(x[:0], labels[:0], strategy="hard", backend=backend)
    assert value.shape == index.shape == (0,)
    with pytest.raises(ValueError, match="strategy: expected one of 'easy', 'hard', got 'far'"):
        mine_positives(x, labels, strategy="far")


def test_all_positives_are_all_pairs():
    generator = torch.Generator().manual_seed(1)
    for rows, columns in ((0, 5), (5, 0), (7, 12), (12, 12)):
        labels, other = (torch.randint(-2, 2, (n,), generator=generator) for n in (rows, columns))
        own = torch.randint(-1, max(columns, 0), (rows,), generator=generator)
        anchor, positive = all_positives(labels, other, own)
        pairs = [(i, j) for i in range(rows) for j in range(columns) if labels[i] == other[j] and j != own[i]]
        assert list(zip(anchor.tolist(), positive.tolist())) == pairs


def test_random_negatives_are_uniform_over_the_other_classes():
    labels, other = torch.tensor([1, 3, 5, 2, 1]), torch.tensor([3, 1, 2, 3, 1, 0], dtype=torch.int32)
    own = torch.tensor([1, 2, -1, 5, 0])  # the anchor itself: of its class, of another, nowhere, first and last
    generator, draws = torch.Generator().manual_seed(0), 1500
    drawn = random_negatives(labels.repeat(draws), other, own.repeat(draws), generator).view(draws, 5).T
    for i in range(5):
        rest = [j for j in range(6) if other[j] != labels[i] and j != own[i]]
        counts = torch.bincount(drawn[i], minlength=6)
        assert counts[rest].sum() == draws
        assert (counts[rest] - draws / len(rest)).abs().max() < 4 * (draws / len(rest)) ** 0.5
    assert random_negatives(labels[:1], torch.tensor([1, 1]), None).tolist() == [-1]
    assert random_negatives(labels[:1], other[:0], None).tolist() == [-1]
