"""Implementations take turns; a turn ends when its work has."""

import pytest
import torch

from benchmarks import timing


class Runners:
    """Steps that move a clock and write down their names."""

    def __init__(self, **seconds: float) -> None:
        self.now, self.order = 0.0, ""
        self.steps = {name: lambda name=name, s=s: self.run(name, s) for name, s in seconds.items()}

    def run(self, name: str, seconds: float) -> None:
        self.now += seconds
        self.order += name

    def times(self, seconds_each: float) -> dict[str, timing.Times]:
        return timing.take_turns(self.steps, seconds_each, clock=lambda: self.now)


def test_turns_alternate_and_the_times_are_those_of_the_clock() -> None:
    runners = Runners(a=0.01, b=0.02, c=0.03)
    times = runners.times(0.2)
    warm_up = "a" * 6 + "b" * 4 + "c" * 3  # the first call, and what fills WARM_UP_S
    assert runners.order == warm_up + "abc" * 10  # 0.6 s, 0.06 s a round
    assert {n: t.median for n, t in times.items()} == pytest.approx({"a": 0.01, "b": 0.02, "c": 0.03})
    assert all(len(t.seconds) == 10 and t.calls_per_turn == 1 for t in times.values())


def test_short_calls_are_timed_several_at_once() -> None:
    times = Runners(a=1e-5, b=5e-4).times(0.0)
    assert (times["a"].calls_per_turn, times["b"].calls_per_turn) == (100, 2)
    assert times["a"].median == pytest.approx(1e-5)


def test_rounds_are_at_least_and_at_most() -> None:
    assert len(Runners(a=10.0).times(0.0)["a"].seconds) == timing.LEAST_ROUNDS
    assert len(Runners(a=0.01).times(1e9)["a"].seconds) == timing.MOST_ROUNDS


def test_who_is_far_behind_leaves_after_the_least_rounds() -> None:
    times = Runners(fast=0.01, slow=0.5).times(10.0)
    assert len(times["slow"].seconds) == timing.LEAST_ROUNDS
    assert len(times["fast"].seconds) == timing.MOST_ROUNDS


def test_the_interquartile_range_is_not_moved_by_a_far_one() -> None:
    times = timing.Times((1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 900.0), 1)
    assert (times.median, times.iqr) == (4.0, 4.0)


def test_a_turn_ends_when_the_device_has_nothing_left_to_do() -> None:
    """Calls return at once and are done 10 us later each; a wait costs 20 us of its own."""
    now, done, waits = 0.0, 0.0, 0

    def step() -> None:
        nonlocal done
        done = max(done, now) + 1e-5

    def wait() -> None:
        nonlocal now, waits
        now, waits = max(now, done) + 2e-5, waits + 1

    times = timing.take_turns({"a": step}, 0.0, clock=lambda: now, wait=wait)["a"]
    assert times.calls_per_turn * times.median >= timing.TURN_S
    assert times.median == pytest.approx(1e-5, rel=0.05)  # the wait hardly shows
    assert waits > len(times.seconds)


def test_the_fastest_setting_is_one_that_fits_into_memory() -> None:
    def too_large() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert timing.fastest([too_large, dict]) is dict
