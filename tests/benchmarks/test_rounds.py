"""rounds.py: turns within a limit of time, and what failed."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import pytest
from rounds import sample_in_rounds


class Clock:
    """A clock that moves when a call runs."""

    def __init__(self) -> None:
        self.now = 0.0

    def call(self, seconds: float) -> Callable[[], float]:
        def run() -> float:
            self.now += seconds
            return self.now

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    return clock


@pytest.mark.parametrize(
    ("limit", "rounds", "first"),
    [(100.0, 9, 2), (20.0, 9, 2), (10.0, 4, 2), (4.0, 1, 2), (3.9, 1, 1), (0.0, 1, 1)],
)
def test_rounds_fit_the_limit_and_the_first_one_counts_only_where_there_is_no_other(
    clock: Clock, limit: float, rounds: int, first: int
) -> None:
    found = sample_in_rounds({"a": clock.call(0.5), "b": clock.call(1.5)}, most=9, limit=limit)
    starts = [2.0 * turn for turn in range(first - 1, first - 1 + rounds)]
    assert found.values == {"a": [start + 0.5 for start in starts], "b": [start + 2.0 for start in starts]}
    assert found.errors == {}


def test_calls_take_turns() -> None:
    order: list[str] = []

    def named(name: str) -> Callable[[], float]:
        return lambda: order.append(name) or 0.0

    sample_in_rounds({"a": named("a"), "b": named("b")}, most=2)
    assert order == ["a", "b"] * 3


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_a_call_that_fails_is_named_and_takes_no_further_part(fails_at: int) -> None:
    calls = itertools.count(1)

    def fail() -> float:
        if next(calls) == fails_at:
            raise RuntimeError("out of numbers")
        return 1.0

    found = sample_in_rounds({"bad": fail, "good": lambda: 2.0}, most=4)
    assert found.errors == {"bad": "RuntimeError: out of numbers"}
    assert found.values["good"] == [2.0] * 4
    assert next(calls) == fails_at + 1
