"""What takes a child process with it: an implementation that does not come back, or leaves the device useless.

Each is a finding of kind "lost", so that the next child of the group leaves that implementation out of that case and
goes on. One that only ran out of time gets a second chance.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from gpu.steps import record

LONGEST = 45.0  # seconds of one implementation: compiling, its check, or one round
CHANCES = 2
EXIT_CODE = 5


def given_up(found: Mapping[str, Any]) -> dict[str, str]:
    """What is left out from now on, of all groups, and why: "case, implementation" to the reason."""
    lost: Mapping[str, Any] = found.get("lost", {})
    return {name: entry["why"] for name, entry in lost.items() if entry["times"] >= CHANCES}


class Watch:
    """Watches the implementations of one group of cases; `found`: what earlier children handed over."""

    def __init__(self, group: str, found: Mapping[str, Any], longest: float = LONGEST) -> None:
        self.group, self.longest = group, longest
        self.lost: dict[str, dict[str, Any]] = dict(found.get("lost", {}))
        last = found.get("running", {}).get(group)
        if last is not None and last["case"] is not None and last["case"] not in found.get("cases", {}):
            self.lose(last["case"], last["implementation"], "its process ended")

    def lose(self, case: str, implementation: str, why: str, for_good: bool = False) -> None:
        """Write down that a child ended in this implementation."""
        name = f"{case}, {implementation}"
        times = CHANCES if for_good else self.lost.get(name, {}).get("times", 0) + 1
        self.lost[name] = {"times": times, "why": why}
        record({"kind": "lost", "name": name, **self.lost[name]})

    def left_out(self, case: str, implementations: Iterable[str]) -> dict[str, str]:
        """The implementations that have had their chances, and what became of them."""
        why = given_up({"lost": self.lost})
        return {name: f"lost: {why[key]}" for name in implementations if (key := f"{case}, {name}") in why}

    def begin(self, case: str | None, implementation: str | None) -> None:
        """Say what runs from now on; None: nothing that the next child should hold responsible."""
        record({"kind": "running", "name": self.group, "case": case, "implementation": implementation})

    @contextmanager
    def over(self, case: str, implementation: str) -> Iterator[None]:
        """End this process where what follows takes too long: a hanging call of the driver cannot be interrupted."""

        def give_up() -> None:
            self.lose(case, implementation, f"it did not come back in {self.longest:.0f} s")
            self.begin(None, None)
            os._exit(EXIT_CODE)

        timer = threading.Timer(self.longest, give_up)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
