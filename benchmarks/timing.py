"""Implementations take turns, round by round, in one process.

A turn ends when what it started has ended: on a GPU, when the device has nothing left to do. The same holds for all,
and a turn is long enough for what the waiting costs not to show.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

WARM_UP_S = 0.05  # each implementation, beyond its first call, which may compile
TURN_S = 0.001  # a turn is as many calls as fill this: short calls are timed several at once
LEAST_ROUNDS, MOST_ROUNDS = 5, 300
# One that is this many times slower than the fastest leaves after LEAST_ROUNDS rounds: its figure needs no more.
FAR_BEHIND = 20.0

Call = Callable[[], Any]
Clock = Callable[[], float]


@dataclass(frozen=True)
class Times:
    """Seconds a call, one entry a round."""

    seconds: tuple[float, ...]
    calls_per_turn: int

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def iqr(self) -> float:
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return high - low


def waiting_for(device: str) -> Call | None:
    """What waits for the device; None where calls are over when they return."""
    return torch.cuda.synchronize if device == "cuda" else None


def take_turns(
    steps: dict[str, Call], seconds_each: float, clock: Clock = time.perf_counter, wait: Call | None = None
) -> dict[str, Times]:
    """Median-ready times of all steps, measured in about `seconds_each` for each of them."""
    calls = {name: _warm_up(step, clock, wait) for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    racing, rounds = list(steps), 0
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection would hit whoever is running
    try:
        start = clock()
        while rounds < LEAST_ROUNDS or (rounds < MOST_ROUNDS and clock() - start < seconds_each * len(steps)):
            for name in racing:
                seconds[name].append(_turn(steps[name], calls[name], clock, wait))
            rounds += 1
            if rounds == LEAST_ROUNDS:
                medians = {name: statistics.median(values) for name, values in seconds.items()}
                fastest = min(medians.values(), default=0.0)
                racing = [name for name in racing if medians[name] < FAR_BEHIND * fastest]
    finally:
        if collecting:
            gc.enable()
    return {name: Times(tuple(values), calls[name]) for name, values in seconds.items()}


def _warm_up(step: Call, clock: Clock, wait: Call | None) -> int:
    """Calls for a turn."""
    _turn(step, 1, clock, wait)
    start, calls = clock(), 0
    while calls == 0 or clock() - start < WARM_UP_S:
        _turn(step, 1, clock, wait)
        calls += 1
    for_turn = max(1, round(TURN_S * calls / (clock() - start)))
    # Calls that follow one another without a wait in between take less than those above.
    while wait is not None and (seconds := for_turn * _turn(step, for_turn, clock, wait)) < TURN_S:
        for_turn = math.ceil(1.1 * for_turn * TURN_S / seconds)
    return for_turn


def _turn(step: Call, calls: int, clock: Clock, wait: Call | None = None) -> float:
    """Seconds a call."""
    start = clock()
    for _ in range(calls):
        step()
    if wait is not None:
        wait()
    return (clock() - start) / calls


def fastest(steps: list[Call], rounds: int = 3, wait: Call | None = None) -> Call:
    """The step whose best call is the shortest, to give a peer its best setting; not one that is out of memory."""

    def best(step: Call) -> float:
        try:
            return min(_turn(step, 1, time.perf_counter, wait) for _ in range(rounds + 1))
        except torch.OutOfMemoryError:
            return math.inf

    return min(steps, key=best)
