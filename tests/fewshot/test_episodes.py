"""Episodes hold what they should, and the batched heads are those that episodes would train alone."""

import pytest
import torch
import torch.nn.functional as F

from fused_margins.fewshot import episodes as e
from fused_margins.fewshot.terminal import UserError

LABELS = torch.tensor([0] * 25 + [3] * 20 + [4] * 30 + [7] * 22)[
    torch.randperm(97, generator=torch.Generator().manual_seed(9))
]


def _episodes(**options):
    defaults = {"n_way": 3, "k_shot": 2, "num_queries": 16, "num_episodes": 40}
    return e.sample_episodes(LABELS, **(defaults | options), generator=torch.Generator().manual_seed(0))


def test_episodes_have_distinct_samples_of_distinct_classes():
    drawn = _episodes()
    assert drawn.support.shape == (40, 6)
    assert drawn.query.shape == (40, 48)
    for support, query in zip(drawn.support, drawn.query):
        assert len(torch.cat([support, query]).unique()) == 54
        classes = LABELS[support].view(3, 2)
        assert (classes[:, 0] == classes[:, 1]).all()
        assert len(classes[:, 0].unique()) == 3
        assert torch.equal(LABELS[query], classes[drawn.query_labels(), 0])
    assert drawn.support_labels().tolist() == [0, 0, 1, 1, 2, 2]


def test_every_class_and_sample_gets_its_turn():
    drawn = _episodes(num_episodes=400)
    assert len(torch.cat([drawn.support, drawn.query], dim=1).unique()) == len(LABELS)
    counts = LABELS[drawn.support[:, ::2]].unique(return_counts=True)[1]
    assert counts.sum() == 1200
    assert (counts - 300).abs().max() < 60  # each of four classes in three quarters of 400 episodes


def test_too_few_classes_or_samples_are_named():
    with pytest.raises(UserError, match="n_way: 5 classes wanted, the data have 4"):
        _episodes(n_way=5)
    with pytest.raises(UserError, match="k_shot \\+ num_queries: 21 samples a class wanted, class 3 has 20"):
        _episodes(k_shot=5)


def _train_one_head(support, labels, weight, order):
    """The same recipe for one episode, with autograd through a module and torch's own optimiser loop."""
    head = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.SGD([head], lr=0.01, momentum=0.9, dampening=0.9, weight_decay=1e-3)
    for permutation in order:
        for start in range(0, len(permutation), 4):
            chosen = permutation[start : start + 4]
            logits = 5.0 * F.linear(F.normalize(support[chosen]), F.normalize(head))
            optimizer.zero_grad()
            F.cross_entropy(logits, labels[chosen]).backward()
            optimizer.step()
    return head.detach()


@pytest.mark.parametrize(
    ("n_way", "k_shot", "width", "passes"),
    [
        (5, 2, 6, 30),
        (5, 2, 15, 20),  # as many coordinates as the basis of the span would have
        (5, 1, 40, 30),
        (3, 5, 64, 10),  # the last batch of a pass is smaller
        (20, 1, 64, 5),
    ],
)
def test_batched_heads_equal_heads_trained_one_at_a_time(n_way, k_shot, width, passes):
    generator = torch.Generator().manual_seed(0)
    num_support = n_way * k_shot
    support = torch.randn(4, num_support, width, generator=generator, dtype=torch.float64)
    support[1, 0] = support[1, 1]  # the span has a dimension less
    support[2, 0] = 0
    labels = torch.arange(n_way).repeat_interleave(k_shot)
    weight = torch.randn(4, n_way, width, generator=generator, dtype=torch.float64) / 3
    order = torch.rand(passes, 4, num_support, generator=generator).argsort(dim=2)
    heads = e.train_heads(support, labels, weight, order)
    for i in range(4):
        alone = _train_one_head(support[i], labels, weight[i], order[:, i])
        torch.testing.assert_close(heads[i], alone, rtol=1e-9, atol=1e-11)
        assert (heads[i] - weight[i]).abs().max() > 0.01  # they did train


def test_heads_start_and_batches_are_shuffled_as_in_the_official_code(monkeypatch):
    seen = {}

    def train_heads(support, labels, weight, order):
        seen.update(weight=weight, order=order)
        return weight

    monkeypatch.setattr(e, "train_heads", train_heads)
    e.head_accuracy(torch.randn(len(LABELS), 50), _episodes(), torch.Generator().manual_seed(0))
    assert seen["weight"].shape == (40, 3, 50)
    assert 0.99 < float(seen["weight"].abs().max()) * 50**0.5 <= 1
    assert seen["weight"].std() * 50**0.5 == pytest.approx(3**-0.5, rel=0.02)
    assert seen["order"].shape == (100, 40, 6)
    assert torch.equal(seen["order"].sort(dim=2).values, torch.arange(6).expand(100, 40, 6))
    assert len(seen["order"].flatten(0, 1).unique(dim=0)) > 600  # of 720 permutations


@pytest.mark.parametrize(
    "accuracy", [e.head_accuracy, lambda embeddings, drawn, _: e.centroid_accuracy(embeddings, drawn)]
)
def test_episodes_judged_in_parts_have_the_same_accuracies(monkeypatch, accuracy):
    embeddings = torch.randn(len(LABELS), 20, generator=torch.Generator().manual_seed(0))
    drawn = _episodes(num_episodes=10)
    whole = accuracy(embeddings, drawn, torch.Generator().manual_seed(1))
    monkeypatch.setattr(e, "MEMORY_BYTES", 4 * 54 * 20 * 3)  # three episodes at a time
    assert torch.equal(accuracy(embeddings, drawn, torch.Generator().manual_seed(1)), whole)
    assert len(whole.unique()) > 3


def test_networks_of_any_width_meet_the_same_episodes():
    after = []
    for width in (4, 30):
        generator = torch.Generator().manual_seed(0)
        e.head_accuracy(torch.randn(len(LABELS), width), _episodes(num_episodes=3), generator)
        after.append(e.sample_episodes(LABELS, n_way=3, num_episodes=5, generator=generator).query)
    assert torch.equal(*after)


def test_separable_embeddings_are_solved_and_noise_is_not():
    generator = torch.Generator().manual_seed(0)
    drawn = _episodes(num_episodes=60)
    noise = torch.randn(len(LABELS), 8, generator=generator)
    separable = torch.eye(8)[LABELS] * 10 + noise
    for accuracy in (
        e.centroid_accuracy(separable, drawn),
        e.head_accuracy(separable, drawn, generator),
    ):
        assert accuracy.shape == (60,)
        assert accuracy.mean() > 0.98
    for accuracy in (e.centroid_accuracy(noise, drawn), e.head_accuracy(noise, drawn, generator)):
        assert abs(float(accuracy.mean()) - 1 / 3) < 0.04
