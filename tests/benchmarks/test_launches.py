"""Launches of a call, counted without a GPU: none more than there are."""

import pytest

pytest.importorskip("triton")

from benchmarks import launches


def test_no_call_launches_more_than_it_did() -> None:
    found = {}
    with launches.without_driver() as nothing:
        for name, call in launches.calls().items():
            if "smoothing" not in name:  # whose rows are a formula in torch
                of_triton, of_torch, host_us = launches.measure(call, nothing, rounds=1)
                found[name] = of_triton, of_torch
                assert host_us > 0
    assert found.pop("an empty autograd Function")[0] == 0
    assert {name.split(",")[0]: of_triton for name, (of_triton, _) in found.items()} == {
        "margin softmax": 9,
        "easy positives": 3,
        "hardest negatives": 3,
    }
    assert max(of_torch for _, of_torch in found.values()) == 1  # the gradient that comes in
