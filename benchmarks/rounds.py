"""Calls that are timed in turns, in as many rounds as a limit of time allows."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from sightline.cli.measure import interleave, repetitions_within
from sightline.cli.peak_memory import describe_error


@dataclass
class Samples:
    """What every call returned in its rounds, and why a call took no further part."""

    values: dict[str, list[float]]
    errors: dict[str, str] = field(default_factory=dict)

    def take(self, runs: Mapping[str, Callable[[], float]], rounds: int) -> None:
        """Add so many rounds of the calls that have not failed."""
        going = {name: run for name, run in runs.items() if name not in self.errors}
        for _, name, value in interleave(going, dict.fromkeys(going, rounds)):
            if isinstance(value, Exception):
                self.errors[name] = describe_error(value)
            else:
                self.values[name].append(value)


def sample_in_rounds(runs: Mapping[str, Callable[[], float]], most: int, limit: float = float("inf")) -> Samples:
    """Call all in turns, at most `most` rounds after one that warms up, and for about `limit` seconds altogether.

    Where there is no time for a second round, the first one counts: calls so long do not need to be warm.

    Example:
        >>> sample_in_rounds({"a": lambda: 1.0, "b": lambda: 2.0}, most=2).values
        {'a': [1.0, 1.0], 'b': [2.0, 2.0]}
    """
    samples = Samples({name: [] for name in runs})
    start = time.perf_counter()
    samples.take(runs, 1)
    round_seconds = time.perf_counter() - start
    if 2 * round_seconds <= limit:
        samples.values = {name: [] for name in runs}
        samples.take(runs, repetitions_within(limit - round_seconds, round_seconds, most))
    return samples
