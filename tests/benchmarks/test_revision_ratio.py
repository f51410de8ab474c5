"""A tree beside another: both run in processes of their own, and what is written is the ratio of neighbouring calls."""

from __future__ import annotations

from pathlib import Path

import pytest
import revision_ratio
from page.revision import revision_section
from revision_ratio import CASES, OWN, Case

DIRECTIONS = [("softmax", "forward"), ("lssar", "backward"), ("lssa", "decode"), ("causal", "decode")]
DIRECTIONS += [("causal", "backward"), ("unordered", "forward")]


def test_a_tree_beside_itself(tmp_path: Path) -> None:
    cases = [Case(kernel, direction, "float32", 32) for kernel, direction in DIRECTIONS]
    found = revision_ratio.measure("itself", OWN, cases, processes=2, rounds=3, sample_seconds=1e-4)
    assert found["libraries"][0] == found["libraries"][1]
    assert [(entry["kernel"], entry["direction"]) for entry in found["timings"]] == DIRECTIONS
    for entry in found["timings"]:
        assert 0 < entry["ratio"]["p10"] <= entry["ratio"]["median"] <= entry["ratio"]["p90"]
    described = {"device": {"name": "d", "threads": 1, "kind": "cpu"}, "instruction_set": {"chosen": "i"}}
    page = "\n".join(revision_section({**found, **described, "versions": {}, "command": "c"}))
    assert "revision itself" in page
    assert page.count("N = 32") == len(cases)


def test_ratios_are_of_neighbours_and_above_one_where_this_tree_is_faster() -> None:
    class Drifting:
        """Takes its seconds times a drift that both trees share."""

        turn = 0

        def __init__(self, seconds: float) -> None:
            self.own = seconds

        def seconds(self, case: Case, calls: int) -> float:
            Drifting.turn += 1
            return self.own * (1 + Drifting.turn // 2)

    pairs = revision_ratio.sample(Drifting(3.0), Drifting(1.5), CASES[0], 9, 1e-9)
    found = revision_ratio.compare(CASES[0], pairs)
    assert len(pairs) == 9
    assert found["ratio"]["median"] == pytest.approx(2.0, rel=0.2)
    assert found["before"]["p90"] > 1.5 * found["before"]["p10"]


def test_a_folder_without_a_library_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a built sightline in"):
        revision_ratio.Tree(tmp_path)


def test_cases_are_distinct() -> None:
    assert len(set(CASES)) == len(CASES) == 28
