"""Launches of a call, counted without a GPU: none more than there are."""

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import launches
from fused_margins.backends import budget


@pytest.fixture(autouse=True)
def _memory_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere in the tests new memory is filled, which is a launch."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)


def test_no_call_launches_more_than_it_did() -> None:
    found = {}
    with launches.without_driver() as nothing:
        for name, call in launches.calls().items():
            with budget.within_exponential_budget(None if "kept" in name else 0):
                of_triton, of_torch, host_us, empty_us = launches.measure(
                    call, launches.empty_call(), nothing, rounds=1
                )
            found[name] = of_triton, of_torch
            assert min(host_us, empty_us) > 0
    assert found == {  # of Triton, of torch: the gradient that comes in, and cuBLAS's products
        "margin softmax, 1024 x 512 x 10,000": (8, 1),
        "margin softmax, 1024 x 512 x 10,000, exponentials kept": (6, 3),
        "margin softmax, 256 x 512 x 64": (3, 1),
        "with smoothing, 1024 x 512 x 10,000": (8, 1),
        "with smoothing, 256 x 512 x 64": (3, 1),
        "easy positives, 2048 x 128": (3, 0),
        "hardest negatives, 2048 x 128": (3, 0),
        "easy positives, 256 x 128": (1, 0),
    }


def test_what_torch_launches_is_counted_and_views_are_not() -> None:
    x = torch.ones(4, 4)
    calls = {
        "views": (0, lambda: x.t()[1:].unsqueeze(0).expand(3, 3, 4).detach()),
        "a copy": (1, lambda: x.t().reshape(16)),
        "one": (1, lambda: x.topk(2)),
        "two": (2, lambda: x.double().tanh()),
        "one after another": (2, lambda: torch.cat([x, x]).sum()),
    }
    assert {name: launches.torch_launches(call) for name, (_, call) in calls.items()} == {
        name: expected for name, (expected, _) in calls.items()
    }
