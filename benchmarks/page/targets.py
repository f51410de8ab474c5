"""The CPU targets: what every one of them wants, what the committed results say about it, and why it is not met."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

UNMEASURED = "unmeasured"
Documents = dict[str, dict[str, Any]]  # of one machine, by kind: "attention", "decoding", "options", ...


@dataclass(frozen=True)
class Measured:
    """The worst number of a target's cases, and where it was measured.

    limit: what the measurements themselves say about why it is no better.
    missing: cases that the target speaks of and that were not measured.
    """

    number: float
    where: str
    limit: str = ""
    missing: str = ""


@dataclass(frozen=True)
class Target:
    """A bound, and how the number that it bounds is found among the documents of a machine.

    show: writes the bound and the number, with their unit.
    """

    text: str
    bound: float
    find: Callable[[Documents], Measured | None]
    show: Callable[[float], str]
    at_most: bool = False

    def met(self, number: float) -> bool:
        """Whether this number is what is wanted."""
        return number <= self.bound if self.at_most else number >= self.bound

    def row(self, documents: Documents, reasons: dict[str, str]) -> tuple[str, ...]:
        """(target, wanted, measured, where, met, why not)."""
        wanted = f"{'at most' if self.at_most else 'at least'} {self.show(self.bound)}"
        found = self.find(documents)
        if found is None:
            return self.text, wanted, UNMEASURED, "", "", ""
        where = f"{found.where}; {found.missing} unmeasured" if found.missing else found.where
        measured = self.show(found.number)
        if not self.met(found.number) and measured == self.show(self.bound):
            measured = f"{'over' if self.at_most else 'under'} {measured}"
        if self.met(found.number):
            return self.text, wanted, measured, where, "so far" if found.missing else "yes", ""
        why = "; ".join(part for part in (found.limit, reasons.get(self.text, "")) if part)
        return self.text, wanted, measured, where, "no", why


def times(number: float) -> str:
    """A ratio.

    Example:
        >>> times(4.2), times(150.0)
        ('4.2x', '150x')
    """
    return f"{number:.1f}".removesuffix(".0") + "x" if number >= 10 else f"{number:.3f}".rstrip("0").rstrip(".") + "x"


def percent(number: float) -> str:
    """A share of one.

    Example:
        >>> percent(0.8), percent(0.7996)
        ('80%', '79.96%')
    """
    return f"{100 * number:.2f}".rstrip("0").rstrip(".") + "%"


def mebibytes(number: float) -> str:
    """Bytes.

    Example:
        >>> mebibytes(64 * 2**20)
        '64 MiB'
    """
    return f"{number / 2**20:.1f}".removesuffix(".0") + " MiB"


def worst(found: Iterable[Measured], at_most: bool = False) -> Measured | None:
    """The one furthest from what is wanted, or None where there is none."""
    choose = max if at_most else min
    return choose(found, key=lambda measured: measured.number, default=None)


def by_machine(documents: Sequence[dict[str, Any]]) -> list[Documents]:
    """The documents of CPUs by machine, instruction set and threads, and of each by kind."""
    machines: dict[tuple[str, str, int], Documents] = {}
    for document in documents:
        device = document["device"]
        if device["kind"] == "cpu":
            machine = device["name"], document["instruction_set"]["chosen"], device["threads"]
            kind = document["schema"].removeprefix("sightline-").partition("/")[0]
            machines.setdefault(machine, {})[kind] = document
    return list(machines.values())
