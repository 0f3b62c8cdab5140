"""A call like one before is neither checked nor routed again: what is like it, and what may be kept of it."""

import gc
import inspect
import weakref

import pytest
import torch

from fused_margins.backends import registry
from fused_margins.functional import margin_softmax_loss
from fused_margins.ops.contrast import contrast


def test_a_call_that_is_remembered_stands_for_calls_of_equal_types_alone():
    embeddings, weight, labels = torch.randn(4, 3), torch.randn(2, 3), torch.tensor([0, 1, 1, 0])
    for scale in (1, 1.0, 1):
        assert margin_softmax_loss(embeddings, weight, labels, scale=scale, ignore_index=1).isfinite()
    with pytest.raises(TypeError, match=r"^scale: expected a number or a tensor, got bool"):
        margin_softmax_loss(embeddings, weight, labels, scale=True, ignore_index=1)
    with pytest.raises(TypeError, match=r"^ignore_index: expected an integer, got 1\.0"):
        margin_softmax_loss(embeddings, weight, labels, scale=1, ignore_index=1.0)
    with pytest.raises(IndexError, match=r"^labels: "):
        margin_softmax_loss(embeddings, weight, labels + 1, scale=1, ignore_index=1)
    with pytest.raises(TypeError, match=r"^labels: expected an integer dtype"):
        margin_softmax_loss(embeddings, weight, labels.float(), scale=1, ignore_index=1)


def test_a_call_is_remembered_by_every_option(monkeypatch):
    """What is not asked about would be taken from an earlier call."""

    class Asked(Exception):
        pass

    def again(tensors, options, names):
        raise Asked(tensors, options)

    monkeypatch.setattr(contrast, "again", again)
    values = {name: object() for name in inspect.signature(margin_softmax_loss).parameters}
    with pytest.raises(Asked) as asked:
        margin_softmax_loss(**values)
    tensors, options = asked.value.args
    assert set(map(id, (*tensors, *options))) >= set(map(id, values.values()))


def test_what_is_refused_is_not_kept_either():
    embeddings, weight, labels = torch.randn(4, 3), torch.randn(2, 3), torch.tensor([0, 1, 1, 0])
    values = [torch.zeros(2), torch.nn.Linear(2, 2)]
    kept = [weakref.ref(value) for value in values]
    with pytest.raises((TypeError, ValueError)):
        margin_softmax_loss(embeddings, weight, labels, class_weight=(values[0],))
    with pytest.raises((TypeError, ValueError)):
        margin_softmax_loss(embeddings, weight, labels, margin=values[1])
    values.clear()
    gc.collect()
    assert [value() for value in kept] == [None, None]


def test_several_centers_are_routed_once(monkeypatch, device_for):
    device_for("contrast", "cpu")
    made = []
    original = registry.resolve
    monkeypatch.setattr(registry, "resolve", lambda *args: made.append(args) or original(*args))
    x, labels, generator = torch.randn(4, 3), torch.tensor([0, 1, 1, 0]), torch.Generator().manual_seed(0)
    weight = torch.randn(2, 5, 3, generator=generator)
    first = margin_softmax_loss(x, weight, labels, scale=3.125)
    routed = len(made)  # the search for the center, unless another call was like it, and the loss
    assert all(torch.equal(margin_softmax_loss(x, weight, labels, scale=3.125), first) for _ in range(3))
    assert len(made) == routed > 0


def test_no_tensor_outlives_the_calls_it_was_given_to():
    embeddings, weight, labels = torch.randn(4, 3, requires_grad=True), torch.randn(2, 3), torch.tensor([0, 1, 1, 0])
    margin = torch.tensor(0.25)
    kept = [weakref.ref(t) for t in (embeddings, weight, labels, margin)]
    for given in (0.25, margin, 0.25, margin):
        margin_softmax_loss(embeddings, weight, labels, margin=given).backward()
    del embeddings, weight, labels, margin, given
    assert [t() for t in kept] == [None] * 4
